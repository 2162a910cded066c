"""Images to latents, by the teacher's VAE encoder, and captions to token ids."""

from __future__ import annotations

import time

import numpy as np
import torch
from pydantic import Field

from pipelines.stages.environment import Device
from pipelines.units import FinishedRows, ImageRows, finish, finite_rows
from snapfusion.models.load import load
from snapfusion.settings import Settings


class Encoding(Settings):
    """How images are encoded; every field changes the rows.

    Attributes:
        batch_size: images the encoder sees at once; fixed, because bits depend on it.
    """

    batch_size: int = Field(16, ge=1)


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
        }
        # The ordinal of a row within its shard is gone by now; its id finds it.
        return finish(
            columns,
            unit=rows.unit,
            rows=((id_, rows.unit.start) for id_ in rows.ids),
            finite=finite,
            rejections=rows.rejections,
            environment=self.environment,
            seconds=time.monotonic() - began,
        )

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Latents float16 [n,4,h,w] of images uint8 [n,S,S,3]."""
        size = self.settings.batch_size
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        batches = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        encoded = [self.bundle.encode_images(batch).half().cpu().numpy() for batch in batches]
        side = self.bundle.image_size // self.bundle.latent_shape[1]
        shape = (self.bundle.latent_shape[0], images.shape[1] // side, images.shape[2] // side)
        return np.concatenate(encoded) if encoded else np.empty((0, *shape), np.float16)
