"""Captions to latents and images, by the teacher after many guided DDIM steps. SnapFusion Sec. 3.2."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.stages.settings import Device, Generation
from pipelines.tables.units import CaptionRows, FinishedRows, finish_unit, finite_rows
from snapfusion.models.bundle import Bundle, to_uint8
from snapfusion.models.load import load
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid


class GeneratePairs:
    """A teacher in an actor: `CaptionRows` in, `FinishedRows` of PAIRS out."""

    def __init__(self, *, teacher: str, settings: Generation, device: Device) -> None:
        self.settings = settings
        self.bundle = load(teacher, device=device.prepare(), dtype=device.torch_dtype)
        self.bundle.resize(settings.size or self.bundle.image_size)
        self.c_null = self.bundle.null_condition()
        self.grid = time_grid(settings.steps, schedule_steps=self.bundle.schedule.num_steps)
        self.environment = device.environment()

    def __call__(self, rows: CaptionRows) -> FinishedRows:
        """Draw all rows of a unit, in batches that depend on the unit alone."""
        began = time.monotonic()
        source_ids = [caption.id for caption in rows.captions]
        ids = [f"{source_id}#{rows.draw}" for source_id in source_ids]
        keys = [noise_key(self.settings.seed, source_id, rows.draw) for source_id in source_ids]
        texts = [caption.text for caption in rows.captions]
        token_ids = self.bundle.tokenize(texts) if texts else torch.empty(0, 0)
        latents, images = self.draw_all(token_ids, keys)
        finite = finite_rows(latents)
        columns: dict[str, Any] = {
            "id": ids,
            "source_id": source_ids,
            "caption": texts,
            "token_ids": token_ids.numpy(),
            "noise_key": keys,
            "draw": [rows.draw] * len(ids),
            "latent": latents,
            "image": images,
        }
        return finish_unit(
            columns,
            unit=rows.unit,
            rows=((id_, caption.ordinal) for id_, caption in zip(ids, rows.captions, strict=True)),
            finite=finite,
            rejections=rows.rejections,
            environment=self.environment,
            seconds=time.monotonic() - began,
        )

    def draw_all(self, token_ids: Tensor, keys: list[int]) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """Latents float16 [n,4,h,w] and n images uint8 [H,W,3] (None if left out), batch by batch."""
        size = self.settings.batch_size
        spans = [slice(start, start + size) for start in range(0, len(keys), size)]
        drawn = [self.draw(token_ids[span], keys[span]) for span in spans]
        latents = [latent.numpy() for latent, _ in drawn]
        images = (
            [image for _, batch in drawn for image in batch] if self.settings.images else [None] * len(keys)
        )
        return np.concatenate(latents) if latents else np.empty(
            (0, *self.bundle.latent_shape), np.float16
        ), images

    @torch.inference_mode()
    def draw(self, token_ids: Tensor, keys: list[int]) -> tuple[Tensor, np.ndarray]:
        """Latents float16 [B,4,h,w] on the CPU, and images uint8 [B,H,W,3] (empty if left out).

        The image is decoded from the latent as it is stored, so that a decoder which reads the table sees
        the very input its teacher had.
        """
        bundle = self.bundle
        eps = gaussian_batch(keys, bundle.latent_shape).to(bundle.device)
        denoiser = bundle.denoiser(
            bundle.encode_text(token_ids), w=self.settings.guidance, c_null=self.c_null
        )
        latents = sample(denoiser, eps, grid=self.grid, schedule=bundle.schedule).half()
        if not self.settings.images:
            return latents.cpu(), np.empty(0)
        return latents.cpu(), teacher_images(bundle, latents)


@torch.inference_mode()
def teacher_images(bundle: Bundle, latents: Tensor) -> np.ndarray:
    """The teacher's decode of latents [B,4,h,w] as uint8 [B,H,W,3] on the CPU."""
    return to_uint8(bundle.decode(latents.float())).permute(0, 2, 3, 1).cpu().numpy()
