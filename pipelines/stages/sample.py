"""Captions to pictures by a model and a solver, and pictures to what the judges say of them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.stages.metric_networks import MetricNetworks
from pipelines.stages.settings import Device, MetricSettings, Sampler, SamplingSettings
from pipelines.tables.units import FinishedRows, PromptRows, finish_unit, finite_rows
from snapfusion.models.blocks import skipping_blocks
from snapfusion.models.bundle import to_uint8
from snapfusion.models.decoder import load_decoder
from snapfusion.models.load import load
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid


class SampleAndScore:
    """A model and its judges in an actor: `PromptRows` in, `FinishedRows` of SAMPLES out.

    Latents become pictures by the model's own decoder, or by the half-width one in the folder `decoder`.
    """

    def __init__(
        self,
        *,
        model: str,
        sampler: Sampler,
        drawing: SamplingSettings,
        judging: MetricSettings,
        device: Device,
        decoder: str | None = None,
    ) -> None:
        place = device.prepare()
        self.sampler = sampler
        self.drawing = drawing
        self.bundle = load(model, device=place, dtype=device.torch_dtype)
        self.bundle.resize(drawing.size or self.bundle.image_size)
        self.decoder = None if decoder is None else load_decoder(decoder).to(place, device.torch_dtype)
        self.c_null = self.bundle.null_condition()
        self.grid = time_grid(sampler.steps, schedule_steps=self.bundle.schedule.num_steps)
        self.judge = MetricNetworks(judging, device=place)
        self.environment = device.environment()

    def __call__(self, rows: PromptRows) -> FinishedRows:
        """Draw and judge all rows of a unit, in batches that depend on the unit alone."""
        began = time.monotonic()
        texts = [caption.text for caption in rows.captions]
        source_ids = [caption.id for caption in rows.captions]
        ids = [rows.row_id(source_id) for source_id in source_ids]
        keys = [noise_key("evaluation", self.drawing.seed, source_id) for source_id in source_ids]
        size = self.drawing.batch_size
        spans = [slice(start, start + size) for start in range(0, len(keys), size)]
        with skipping_blocks(self.bundle.unet, rows.without):
            batches = [self.draw_and_judge(texts[span], keys[span], w=rows.w) for span in spans]
        columns: dict[str, Any] = {
            "id": ids,
            "source_id": source_ids,
            "caption": texts,
            "w": [rows.w] * len(ids),
            "noise_key": keys,
        }
        for name in ("features", "clip", "right", "image", "finite"):
            parts = [batch[name] for batch in batches]
            columns[name] = np.concatenate(parts) if parts else np.empty((0,))
        finite = columns.pop("finite").tolist()
        if not self.drawing.images:
            columns["image"] = [None] * len(ids)
        return finish_unit(
            columns,
            unit=rows.unit,
            rows=((id_, caption.ordinal) for id_, caption in zip(ids, rows.captions, strict=True)),
            finite=finite,
            rejections=rows.rejections,
            environment=self.environment,
            seconds=time.monotonic() - began,
        )

    @torch.inference_mode()
    def draw_and_judge(self, texts: list[str], keys: list[int], *, w: float) -> dict[str, np.ndarray]:
        """What SAMPLES holds of a batch, by column, and which rows are `finite`; images uint8 [B,H,W,3]."""
        latents = self.draw(texts, keys, w=w)
        finite = finite_rows(latents.cpu().numpy())
        images = to_uint8(self.decode(latents.nan_to_num(0.0, 0.0, 0.0)))
        told = {
            "features": self.judge.features(images),
            "clip": self.judge.clip(images, texts),
            "right": self.judge.attributes(images, texts),
            "image": images.permute(0, 2, 3, 1).cpu(),
        }
        return {name: values.numpy() for name, values in told.items()} | {"finite": np.array(finite)}

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], float32 [B,3,H,W]."""
        if self.decoder is None:
            return self.bundle.decode(latents)
        return self.decoder.decode(latents.to(self.bundle.unet.dtype)).float()

    def draw(self, texts: list[str], keys: list[int], *, w: float) -> Tensor:
        """Latents float32 [B,4,h,w] of captions, from the noise of their keys."""
        bundle = self.bundle
        c = bundle.encode_text(bundle.tokenize(texts))
        eps = gaussian_batch(keys, bundle.latent_shape).to(bundle.device)
        denoiser = bundle.denoiser(c, w=w, c_null=self.c_null)
        return sample(denoiser, eps, solver=self.sampler.solver, grid=self.grid, schedule=bundle.schedule)
