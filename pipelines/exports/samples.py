"""Turns rows of LATENTS, PAIRS and TARGETS into samples: the content of each member, by its extension.

 latent.pth     the row's latent, float16 [4,h,w], times the scaling factor
 txt_emb.pth    its encoded caption, [L,D]
 noise.pth      PAIRS, TARGETS: its noise, float32 [4,h,w], `snapfusion.noise.gaussian` of its noise key
 x_target.pth   TARGETS: the x that the student predicts, [4,h,w]
 png            PAIRS that have images: the teacher's image
 txt            LATENTS, PAIRS: the caption
 json           its other columns, and the sides of its image

The `.pth` members are single tensors, as FastGen's loaders expect them; png and txt are what diffusers'
script of latent consistency distillation reads. LATENTS have no noise: a photograph's latent belongs to none.
"""

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.exports.settings import ExportSettings
from pipelines.stages.device import DTYPES, batch_slices
from pipelines.tables.schemas import read_array, read_arrays
from snapfusion.models.bundle import Bundle
from snapfusion.noise import gaussian

Sample = Mapping[str, bytes]
"""The members of a sample by extension."""


class SampleEncoder:
    """Encodes rows of one table.

    Args:
        bundle: the model whose text encoder is used.
        settings: of the export.
    """

    def __init__(self, bundle: Bundle, settings: ExportSettings) -> None:
        self._bundle = bundle
        self._batch_size = settings.batch_size
        self._dtype = DTYPES[settings.embedding_dtype]

    def samples(self, rows: pa.Table) -> Iterator[Sample]:
        """The sample of each row, in their order; one batch of captions is in memory at a time."""
        for span in batch_slices(rows.num_rows, self._batch_size):
            yield from self._batch(rows.slice(span.start, self._batch_size))

    def null_embedding(self) -> np.ndarray:
        """The encoded empty caption, [L,D]: the unconditional input."""
        embedding: np.ndarray = self._bundle.null_condition()[0].to(self._dtype).cpu().numpy()
        return embedding

    def _batch(self, rows: pa.Table) -> Iterator[Sample]:
        names = rows.schema.names
        token_ids = torch.from_numpy(read_array(rows, "token_ids").astype(np.int64))
        embeddings = self._bundle.encode_text(token_ids).to(self._dtype).cpu()
        latents = read_arrays(rows, "latent")
        targets = read_arrays(rows, "x_target") if "x_target" in names else [None] * len(latents)
        scalars = rows.select([field.name for field in rows.schema if not pa.types.is_binary(field.type)])
        images = rows["image"].to_pylist() if "image" in names else [None] * len(latents)
        for values, latent, embedding, target, image in zip(
            scalars.to_pylist(), latents, embeddings, targets, images, strict=True
        ):
            tensors = {"latent": torch.from_numpy(latent.copy()), "txt_emb": embedding}
            if "noise_key" in values:
                tensors["noise"] = gaussian(values["noise_key"], latent.shape)
            if target is not None:
                tensors["x_target"] = torch.from_numpy(target.copy())
            sample = {f"{name}.pth": to_pth(tensor) for name, tensor in tensors.items()}
            if image is not None:
                sample["png"] = image
            if "caption" in values:
                sample["txt"] = values["caption"].encode()
            yield {**sample, "json": self._json(values, latent.shape, has_image=image is not None)}

    def _json(self, values: dict[str, Any], shape: tuple[int, ...], *, has_image: bool) -> bytes:
        sides = {"height": shape[1] * self._bundle.cell, "width": shape[2] * self._bundle.cell}
        # The image has not been resized; of LATENTS' photographs the sides before are not known.
        original = {f"original_{name}": side for name, side in sides.items()} if has_image else {}
        return json.dumps({**values, **sides, **original}, sort_keys=True).encode()


def to_pth(tensor: Tensor) -> bytes:
    """A tensor as `torch.save` writes it; equal tensors give equal bytes."""
    buffer = io.BytesIO()
    # Cloned, because a view is saved with the whole storage that it is a view of.
    torch.save(tensor.clone(), buffer)
    return buffer.getvalue()
