"""Damage to files that a test expects to be found."""

from pathlib import Path


def flip_byte(path: Path) -> None:
    """Change one bit of the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
