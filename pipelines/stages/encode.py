"""Images to latents, by the teacher's VAE encoder, and captions to token ids."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from pipelines.stages.settings import Device, Encoding
from pipelines.tables.units import FinishedRows, ImageRows, finish_unit, finite_rows, group_by_shape
from snapfusion.models.load import load


class EncodeLatents:
    """A VAE encoder in an actor: `ImageRows` in, `FinishedRows` of LATENTS out."""

    def __init__(self, *, model: str, settings: Encoding, device: Device) -> None:
        self.settings = settings
        self.bundle = load(model, device=device.prepare(), dtype=device.torch_dtype)
        self.environment = device.environment()

    def __call__(self, rows: ImageRows) -> FinishedRows:
        """Encode all rows of a unit, in batches that depend on the unit alone."""
        began = time.monotonic()
        latents = self.encode(rows.images)
        finite = finite_rows(latents)
        columns = {
            "id": rows.ids,
            "source_id": rows.source_ids,
            "caption": rows.captions,
            "token_ids": self.bundle.tokenize(rows.captions).numpy() if rows.captions else [],
            "latent": latents,
            "height": [image.shape[0] for image in rows.images],
            "width": [image.shape[1] for image in rows.images],
        }
        # The ordinal of a row within its shard is gone by now; its id finds it.
        return finish_unit(
            columns,
            unit=rows.unit,
            rows=((id_, rows.unit.start) for id_ in rows.ids),
            finite=finite,
            rejections=rows.rejections,
            environment=self.environment,
            seconds=time.monotonic() - began,
        )

    def encode(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The latent of each image, float16 [4,h,w] of uint8 [H,W,3]; a batch holds images of one shape."""
        size = self.settings.batch_size
        latents: dict[int, np.ndarray] = {}
        for places in group_by_shape(images):
            for start in range(0, len(places), size):
                chosen = places[start : start + size]
                pixels = torch.from_numpy(np.stack([images[place] for place in chosen])).permute(0, 3, 1, 2)
                encoded = self.bundle.encode_images(pixels).half().cpu().numpy()
                latents.update(zip(chosen, encoded, strict=True))
        return [latents[place] for place in range(len(images))]
