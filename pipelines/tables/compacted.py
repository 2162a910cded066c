"""What the identity of a compacted table says of its parent."""

from collections.abc import Mapping
from typing import Any, Final

COMPACTED: Final = "compacted"
"""Key of the identity of a compacted table; the rest is the identity of its parent."""


def compaction_of(identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Name, identity and version of a compacted table's parent, and `file_mib`; None for other tables."""
    compaction: Mapping[str, Any] | None = identity.get(COMPACTED)
    return compaction
