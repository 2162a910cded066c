"""Settings keys of earlier versions, and the names that replaced them."""

from __future__ import annotations

RENAMED_KEYS: dict[str, str] = {}
"""New dotted path by old dotted path or path prefix; an old key is refused with the new one in the message."""
