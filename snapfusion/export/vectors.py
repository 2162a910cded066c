"""Test vectors, which an application in another language compares its own sampling loop with.

vectors.json    captions with their token ids, the guidance scale, and the file and shape of every array
*.f32, *.i32    raw numbers, little-endian, in C order: float32 or int32

The arrays are one caption's: `token_ids` [2,L] of "" and the caption, `c` [2,L,D], `noise` [1,4,h,w], for
each step k `output-k` [2,4,h,w] of the UNet and the next latent `z-k` [1,4,h,w], and `image` [1,3,H,W]. Where
a step takes one pass, `output-k` is [1,4,h,w], of the caption alone. Where a step adds fresh noise, that is
`noise-k` [1,4,h,w].
"""

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
    """Test vectors that are missing or not of the stated shape."""


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Test vectors as read back.

    Attributes:
        caption: that the arrays belong to.
        guidance: w of the generation.
        token_ids: of each reference caption, as lists.
        arrays: by name.
    """

    caption: str
    guidance: float
    token_ids: Mapping[str, Sequence[int]]
    arrays: Mapping[str, np.ndarray]

    @property
    def num_steps(self) -> int:
        """Number of sampling steps that the arrays cover."""
        return sum(name.startswith("z-") for name in self.arrays)

    def reference(self, times: Sequence[int]) -> Reference:
        """The reference that the vectors were written from; `times` are the t of each step."""
        z_t, steps = self.arrays["noise"], []
        for k, t in enumerate(times):
            values = {"outputs": self.arrays[f"output-{k}"], "z_next": self.arrays[f"z-{k}"]}
            steps.append(SamplingStep(t=t, z_t=z_t, **values, fresh=self.arrays.get(f"noise-{k}")))
            z_t = values["z_next"]
        return Reference(
            caption=self.caption,
            ids=self.arrays["token_ids"],
            c=self.arrays["c"],
            noise=self.arrays["noise"],
            steps=tuple(steps),
            image=self.arrays["image"],
        )


def write_vectors(folder: Path, references: Sequence[Reference], *, guidance: float) -> None:
    """Write the first reference's arrays and every caption's token ids."""
    folder.mkdir(parents=True)
    first, files = references[0], {}
    for name, array in _arrays(first).items():
        file = f"{name}{_SUFFIXES[array.dtype.name]}"
        (folder / file).write_bytes(np.ascontiguousarray(array).tobytes())
        files[name] = {"file": file, "shape": list(array.shape)}
    token_ids = {"": first.ids[0].tolist()}
    token_ids |= {reference.caption: reference.ids[1].tolist() for reference in references}
    index = {"caption": first.caption, "guidance": guidance, "token_ids": token_ids, "arrays": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _arrays(reference: Reference) -> dict[str, np.ndarray]:
    arrays = {"token_ids": reference.ids, "c": reference.c, "noise": reference.noise}
    for k, step in enumerate(reference.steps):
        arrays |= {f"output-{k}": step.outputs, f"z-{k}": step.z_next}
        if step.fresh is not None:
            arrays[f"noise-{k}"] = step.fresh
    return {**arrays, "image": reference.image}


def read_vectors(folder: Path) -> Vectors:
    """Read the folder that `write_vectors` wrote.

    Raises:
        VectorsError: if a file is missing or its size does not match its shape.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        return Vectors(
            caption=index["caption"],
            guidance=float(index["guidance"]),
            token_ids=index["token_ids"],
            arrays={
                name: _read(folder / entry["file"], entry["shape"]) for name, entry in index["arrays"].items()
            },
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise VectorsError(f"{folder}: the test vectors cannot be read: {error}") from None


def _read(path: Path, shape: Sequence[int]) -> np.ndarray:
    dtype = "<i4" if path.suffix == _SUFFIXES["int32"] else "<f4"
    return np.frombuffer(path.read_bytes(), dtype).reshape(shape).copy()
