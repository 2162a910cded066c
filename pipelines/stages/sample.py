"""Samples images from captions by a model and a solver, and scores them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.stages.device import NetworkStage, batch_slices
from pipelines.stages.metric_networks import MetricNetworks
from pipelines.stages.settings import Device, MetricSettings, Sampler, SamplingSettings
from pipelines.tables.units import PromptRows, finite_rows
from snapfusion.models.blocks import skipping_blocks
from snapfusion.models.bundle import to_uint8
from snapfusion.models.decoder import load_decoder
from snapfusion.models.defaults import sampling_grid
from snapfusion.noise import gaussian_batch, noise_key, step_noise
from snapfusion.sampling import sample


class SampleAndScore(NetworkStage[PromptRows, SamplingSettings]):
    """Turns `PromptRows` into `FinishedRows` of SAMPLES.

    Latents are decoded by the model's own decoder, or by the half-width one in the folder `decoder`. A record
    of a distillation, given in place of the model's own, decides its timesteps.
    """

    def __init__(
        self,
        *,
        model: str,
        sampler: Sampler,
        sampling: SamplingSettings,
        metrics: MetricSettings,
        device: Device,
        decoder: str | None = None,
        distillation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model=model, settings=sampling, device=device)
        if distillation is not None:
            self.bundle.distillation = distillation
        self.sampler = sampler
        self.bundle.resize(sampling.size or self.bundle.image_size)
        self.decoder = None if decoder is None else load_decoder(decoder).to(self.torch_device, self.dtype)
        self.c_null = self.bundle.encode_text(self.bundle.tokenize([sampler.negative_prompt]))
        self.grid = sampling_grid(self.bundle, steps=sampler.steps, solver=sampler.solver)
        self.metrics = metrics
        self.networks = MetricNetworks(metrics, device=self.torch_device)

    def columns(self, rows: PromptRows) -> tuple[dict[str, Any], list[bool]]:
        """Sample and score all rows of a unit."""
        texts = [caption.text for caption in rows.captions]
        # No model, solver or guidance in the key: all start from the same noise.
        keys = [noise_key("evaluation", self.settings.seed, caption.id) for caption in rows.captions]
        spans = batch_slices(len(keys), self.settings.batch_size)
        with skipping_blocks(self.bundle.unet, rows.without):
            batches = [self.sample_and_score(texts[span], keys[span], w=rows.w) for span in spans]
        columns: dict[str, Any] = {
            "id": [id_ for id_, _ in rows.row_keys()],
            "source_id": [caption.id for caption in rows.captions],
            "caption": texts,
            "w": [rows.w] * len(texts),
            "noise_key": keys,
        }
        scores = ("clip", *(one.name for one in self.metrics.preferences), "right")
        for name in ("features", *scores, "image", "finite"):
            parts = [batch[name] for batch in batches]
            columns[name] = np.concatenate(parts) if parts else np.empty((0,))
        finite = columns.pop("finite").tolist()
        if not self.settings.images:
            columns["image"] = [None] * len(texts)
        return columns, finite

    @torch.inference_mode()
    def sample_and_score(self, texts: list[str], keys: list[int], *, w: float) -> dict[str, np.ndarray]:
        """The computed columns of SAMPLES for a batch, and which rows are `finite`; image uint8 [B,H,W,3]."""
        latents = self.sample(texts, keys, w=w)
        finite = finite_rows(latents.cpu().numpy())
        # Rows that are not finite are rejected later; here they must not poison the batch's other images.
        images = to_uint8(self.decode(latents.nan_to_num(0.0, 0.0, 0.0)))
        columns = {
            "features": self.networks.features(images),
            "clip": self.networks.clip(images, texts),
            **self.networks.preferences(images, texts),
            "right": self.networks.attributes(images, texts),
            "image": images.permute(0, 2, 3, 1).cpu(),
        }
        return {name: values.numpy() for name, values in columns.items()} | {"finite": np.array(finite)}

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], float32 [B,3,H,W]."""
        if self.decoder is None:
            return self.bundle.decode(latents)
        return self.decoder.decode(latents.to(self.bundle.unet.dtype)).float()

    def sample(self, texts: list[str], keys: list[int], *, w: float) -> Tensor:
        """Latents float32 [B,4,h,w] of captions, from the noise of their keys."""
        bundle = self.bundle
        c = bundle.encode_text(bundle.tokenize(texts))
        eps = gaussian_batch(keys, bundle.latent_shape).to(bundle.device)
        denoiser = bundle.denoiser(
            c,
            w=w,
            c_null=self.c_null,
            rescaled=self.sampler.guidance_rescale,
            interval=self.sampler.guidance_interval,
        )
        return sample(
            denoiser,
            eps,
            solver=self.sampler.solver,
            grid=self.grid,
            schedule=bundle.schedule,
            noise=step_noise(keys, bundle.latent_shape, device=bundle.device),
        )
