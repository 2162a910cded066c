"""Generates latents and images from captions by many DDIM steps of the teacher. SnapFusion Sec. 3.2."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.stages.device import NetworkStage, batch_slices
from pipelines.stages.settings import Device, Generation
from pipelines.tables.units import CaptionRows, finite_rows
from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid
from snapfusion.training.draws import draw_guidance


class GeneratePairs(NetworkStage[CaptionRows, Generation]):
    """Turns `CaptionRows` into `FinishedRows` of PAIRS by the teacher."""

    def __init__(self, *, model: str, settings: Generation, device: Device) -> None:
        super().__init__(model=model, settings=settings, device=device)
        self.bundle.resize(settings.size or self.bundle.image_size)
        self.c_null = self.bundle.null_condition()
        self.grid = time_grid(settings.steps, schedule_steps=self.bundle.schedule.num_steps)

    def columns(self, rows: CaptionRows) -> tuple[dict[str, Any], list[bool]]:
        """Generate all rows of a unit."""
        texts = [caption.text for caption in rows.captions]
        # Of the caption's id, not of its position: another unit size or list order gives the same images.
        noise_keys = [noise_key(self.settings.seed, caption.id, rows.draw) for caption in rows.captions]
        token_ids = self.bundle.tokenize(texts) if texts else torch.empty(0, 0)
        latents, images = self.generate(token_ids, noise_keys)
        columns = {
            "id": [id_ for id_, _ in rows.row_keys()],
            "source_id": [caption.id for caption in rows.captions],
            "caption": texts,
            "token_ids": token_ids.numpy(),
            "noise_key": noise_keys,
            "draw": [rows.draw] * len(texts),
            "latent": latents,
            "image": images,
        }
        return columns, finite_rows(latents)

    def generate(self, token_ids: Tensor, keys: list[int]) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """Latents float16 [n,4,h,w] and n images uint8 [H,W,3] (None if left out), batch by batch."""
        spans = batch_slices(len(keys), self.settings.batch_size)
        batches = [self.generate_batch(token_ids[span], keys[span]) for span in spans]
        empty = np.empty((0, *self.bundle.latent_shape), np.float16)
        latents = np.concatenate([empty, *(batch.numpy() for batch, _ in batches)])
        if not self.settings.images:
            return latents, [None] * len(keys)
        return latents, [image for _, images in batches for image in images]

    @torch.inference_mode()
    def generate_batch(self, token_ids: Tensor, keys: list[int]) -> tuple[Tensor, np.ndarray]:
        """Latents float16 [B,4,h,w] on the CPU, and images uint8 [B,H,W,3] (empty if left out)."""
        bundle = self.bundle
        eps = gaussian_batch(keys, bundle.latent_shape).to(bundle.device)
        c = bundle.encode_text(token_ids)
        denoiser = bundle.denoiser(c, w=self.guidance_of(keys), c_null=self.c_null)
        latents = sample(denoiser, eps, grid=self.grid, schedule=bundle.schedule).half()
        if not self.settings.images:
            return latents.cpu(), np.empty(0)
        # Decoded after the cast to float16: a decoder trained on the table reads what its teacher read.
        return latents.cpu(), teacher_images(bundle, latents)

    def guidance_of(self, keys: list[int]) -> Tensor | float:
        """Guidance of rows: of them all, or float32 [B,1,1,1] drawn from their keys."""
        if self.settings.guidance_range is None:
            return self.settings.guidance
        w = draw_guidance(keys, cfg_range=self.settings.guidance_range)
        return w.view(-1, 1, 1, 1).to(self.bundle.device)


@torch.inference_mode()
def teacher_images(bundle: Bundle, latents: Tensor) -> np.ndarray:
    """The teacher's decode of latents [B,4,h,w], uint8 [B,H,W,3] on the CPU."""
    return to_uint8(bundle.decode(latents.float())).permute(0, 2, 3, 1).cpu().numpy()
