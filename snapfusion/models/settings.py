"""Values that settings of models accept."""

from __future__ import annotations

from typing import Literal

Initialization = Literal["leading", "random"]
"""Where the half-width decoder starts: the leading half of the full one's channels, or chance."""
