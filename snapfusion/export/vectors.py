"""Test vectors: what an application in another language holds its own loop to.

vectors.json    the captions with their token ids, the guidance scale, and of every array its file and shape
*.f32, *.i32    raw numbers, little-endian, in C order: float32 or int32

The arrays are one caption's: `token_ids` [2,L] of "" and the caption, `c` [2,L,D], `noise` [1,4,h,w], for
each step k `output-k` [2,4,h,w] of the UNet and `z-k` [1,4,h,w] where the step lands, and `image` [1,3,H,W].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snapfusion.export.loop import SamplingStep
from snapfusion.export.reference import Reference

INDEX = "vectors.json"
_SUFFIXES = {"float32": ".f32", "int32": ".i32"}


class VectorsError(ValueError):
    """Test vectors that are missing or not of the stated shape; names the array."""


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """What was read back.

    Attributes:
        caption: whose arrays they are.
        guidance: the w it was drawn with.
        token_ids: of each caption of the gate, as lists.
        arrays: by name.
    """

    caption: str
    guidance: float
    token_ids: Mapping[str, Sequence[int]]
    arrays: Mapping[str, np.ndarray]

    @property
    def steps(self) -> int:
        """How many steps they cover."""
        return sum(name.startswith("z-") for name in self.arrays)

    def reference(self, times: Sequence[int]) -> Reference:
        """What torch drew, as it was when they were written; `times` is where each step began."""
        z_t, moments = self.arrays["noise"], []
        for number, t in enumerate(times):
            z_next = self.arrays[f"z-{number}"]
            moments.append(SamplingStep(t=t, z_t=z_t, outputs=self.arrays[f"output-{number}"], z_next=z_next))
            z_t = z_next
        return Reference(
            caption=self.caption,
            ids=self.arrays["token_ids"],
            c=self.arrays["c"],
            noise=self.arrays["noise"],
            moments=tuple(moments),
            image=self.arrays["image"],
        )


def write_vectors(folder: Path, references: Sequence[Reference], *, guidance: float) -> None:
    """Write the first reference's arrays and every caption's token ids."""
    folder.mkdir(parents=True)
    first = references[0]
    arrays = _arrays(first)
    for name, array in arrays.items():
        (folder / _file_of(name, array)).write_bytes(np.ascontiguousarray(array).tobytes())
    index = {
        "caption": first.caption,
        "guidance": guidance,
        "token_ids": {
            "": first.ids[0].tolist(),
            **{reference.caption: reference.ids[1].tolist() for reference in references},
        },
        "arrays": {
            name: {"file": _file_of(name, array), "shape": list(array.shape)}
            for name, array in arrays.items()
        },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _arrays(reference: Reference) -> dict[str, np.ndarray]:
    arrays = {"token_ids": reference.ids, "c": reference.c, "noise": reference.noise}
    for number, moment in enumerate(reference.moments):
        arrays |= {f"output-{number}": moment.outputs, f"z-{number}": moment.z_next}
    return {**arrays, "image": reference.image}


def _file_of(name: str, array: np.ndarray) -> str:
    return f"{name}{_SUFFIXES[array.dtype.name]}"


def read_vectors(folder: Path) -> Vectors:
    """What `write_vectors` wrote.

    Raises:
        VectorsError: if a file is missing or has not the bytes of its shape.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        arrays = {name: _read(folder / told["file"], told["shape"]) for name, told in index["arrays"].items()}
        return Vectors(
            caption=index["caption"],
            guidance=float(index["guidance"]),
            token_ids=index["token_ids"],
            arrays=arrays,
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise VectorsError(f"{folder}: the test vectors cannot be read: {error}") from None


def _read(path: Path, shape: Sequence[int]) -> np.ndarray:
    dtype = "<i4" if path.suffix == _SUFFIXES["int32"] else "<f4"
    return np.frombuffer(path.read_bytes(), dtype).reshape(shape).copy()
