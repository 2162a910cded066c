"""Values of settings of models; importable without torch."""

from typing import Literal

Initialization = Literal["leading", "random"]
"""Initial weights of the half-width decoder: the leading half of the full decoder's channels, or random."""
