"""Encodes images into latents by the VAE, and captions into token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipelines.stages.device import NetworkStage
from pipelines.stages.settings import Encoding
from pipelines.tables.units import ImageRows, finite_rows, shape_batches


class EncodeLatents(NetworkStage[ImageRows, Encoding]):
    """Turns `ImageRows` into `FinishedRows` of LATENTS."""

    def columns(self, rows: ImageRows) -> tuple[dict[str, Any], list[bool]]:
        """Encode all rows of a unit."""
        latents = self.encode(rows.images)
        columns = {
            "id": rows.ids,
            "source_id": rows.source_ids,
            "caption": rows.captions,
            "token_ids": self.bundle.tokenize(rows.captions).numpy() if rows.captions else [],
            "latent": latents,
            "height": [image.shape[0] for image in rows.images],
            "width": [image.shape[1] for image in rows.images],
        }
        return columns, finite_rows(latents)

    def encode(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The latent of each image, float16 [4,h,w] of uint8 [H,W,3]; a batch holds images of one shape."""
        latents: dict[int, np.ndarray] = {}
        for indices in shape_batches(images, self.settings.batch_size):
            pixels = torch.from_numpy(np.stack([images[index] for index in indices])).permute(0, 3, 1, 2)
            encoded = self.bundle.encode_images(pixels).half().cpu().numpy()
            latents.update(zip(indices, encoded, strict=True))
        return [latents[index] for index in range(len(images))]
