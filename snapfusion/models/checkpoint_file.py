"""Reading tensors of a safetensors file by their keys, without reading the whole file."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from snapfusion.models.errors import ModelError

_LFS_POINTER = b"version https://git-lfs"


class CheckpointFile:
    """A safetensors file, of which only the header is read when it is opened.

    Attributes:
        shapes: of the tensors by key.
        dtypes: that the tensors have, such as "F16" and "F32", in alphabetical order.
        metadata: the text in the header, {} if there is none.

    Raises:
        ModelError: if it is not a complete safetensors file.
    """

    def __init__(self, path: Path, *, source: str) -> None:
        if is_lfs_pointer(path):
            raise ModelError(
                f"{source}: {path.name} is a git-lfs pointer, not the weights; run `git lfs pull`"
            )
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{source}: {path.name} cannot be read: {error}") from None
        self.metadata: dict[str, str] = self._file.metadata() or {}
        slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118 - not a mapping
        self.shapes = {key: tuple(value.get_shape()) for key, value in slices.items()}
        self.dtypes: list[str] = sorted({value.get_dtype() for value in slices.values()})

    def tensor(self, key: str) -> Tensor:
        """Read one tensor; floating point as float32."""
        value: Tensor = self._file.get_tensor(key)
        return value.float() if value.is_floating_point() else value

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Read the tensors whose keys have a prefix; floating point as float32."""
        return {key: self.tensor(key) for key in self.shapes if key.startswith(prefix)}


def is_lfs_pointer(path: Path) -> bool:
    """Tell whether git-lfs left a pointer in the stead of a file."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER
