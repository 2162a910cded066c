"""Latents to what the student should predict, by k DDIM steps of the teacher. SnapFusion Eq. 7-10."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipelines.rejection import Rejected
from pipelines.stages.environment import DTYPES, Device
from pipelines.units import FinishedRows, LatentRows, finite_rows, keep_where
from snapfusion.distill import teacher_target
from snapfusion.models.load import load
from snapfusion.noise import gaussian_batch
from snapfusion.settings import Settings
from snapfusion.training.draws import CfgRange, draw_guidance, draw_intervals, interval_ends, row_key


class Teaching(Settings):
    """What the teacher computes; every field changes the rows.

    Attributes:
        student_steps: N_S, the steps of the student's grid.
        k: the teacher's steps for one of the student's, on the grid of k * N_S steps; 2 in SnapFusion.
        cfg_range: of w in guided rows.
        batch_size: rows the teacher is asked about at once (twice that with guidance); fixed, because bits
            depend on it.
        x_dtype: of the stored target. It is computed in float32.
        seed: of the noise keys.
    """

    student_steps: int = Field(8, ge=1, le=1000)
    k: int = Field(2, ge=1, le=1000)
    cfg_range: CfgRange = CfgRange()
    batch_size: int = Field(16, ge=1)
    x_dtype: Literal["float16", "float32"] = "float16"
    seed: int = Field(0, ge=0)


class ComputeTargets:
    """A teacher in an actor: `LatentRows` in, `FinishedRows` of TARGETS out."""

    def __init__(self, *, teacher: str, settings: Teaching, device: Device) -> None:
        self.settings = settings
        self.bundle = load(teacher, device=device.prepare(), dtype=device.torch_dtype)
        self.c_null = self.bundle.null_condition()
        self.environment = device.environment()

    def __call__(self, rows: LatentRows) -> FinishedRows:
        """Targets of all rows of a unit, in batches that depend on the unit alone."""
        began = time.monotonic()
        settings = self.settings
        keys = [row_key(settings.seed, id_, rows.draw) for id_ in rows.ids]
        interval = draw_intervals(keys, student_steps=settings.student_steps)
        t, t2 = interval_ends(interval, student_steps=settings.student_steps, schedule=self.bundle.schedule)
        w = draw_guidance(keys, cfg_range=settings.cfg_range) if rows.guided else None
        x_target = self.teach_all(rows, keys=keys, interval=interval, t=t, w=w)
        ids = [f"{id_}#{rows.draw}" for id_ in rows.ids]
        columns: dict[str, Any] = {
            "id": ids,
            "source_id": rows.source_ids,
            "draw": [rows.draw] * len(ids),
            "token_ids": rows.token_ids,
            "latent": rows.latents,
            "noise_key": keys,
            "interval": interval.tolist(),
            "t": t.tolist(),
            "t2": t2.tolist(),
            "k": [settings.k] * len(ids),
            "w": [None] * len(ids) if w is None else w.tolist(),
            "x_target": x_target,
        }
        finite = finite_rows(x_target)
        bad = [
            Rejected("not_finite").record(id=id_, source=rows.unit.source, ordinal=ordinal)
            for ordinal, (id_, good) in enumerate(zip(ids, finite, strict=True))
            if not good
        ]
        return FinishedRows(
            unit=rows.unit,
            columns={name: keep_where(finite, values) for name, values in columns.items()},
            rejections=bad,
            environment=self.environment,
            seconds=time.monotonic() - began,
        )

    def teach_all(
        self, rows: LatentRows, *, keys: list[int], interval: Tensor, t: Tensor, w: Tensor | None
    ) -> np.ndarray:
        """x-targets [n,4,h,w] in the stored dtype, batch by batch."""
        size = self.settings.batch_size
        spans = [slice(start, start + size) for start in range(0, len(keys), size)]
        taught = [
            self.teach(
                torch.from_numpy(rows.latents[span].astype(np.float32)),
                torch.from_numpy(rows.token_ids[span].astype(np.int64)),
                eps=gaussian_batch(keys[span], self.bundle.latent_shape),
                interval=interval[span],
                t=t[span],
                w=1.0 if w is None else w[span].view(-1, 1, 1, 1),
            )
            for span in spans
        ]
        stored = DTYPES[self.settings.x_dtype]
        return torch.cat(taught).to(stored).numpy() if taught else np.empty((0, *self.bundle.latent_shape))

    @torch.inference_mode()
    def teach(
        self,
        latent: Tensor,
        token_ids: Tensor,
        *,
        eps: Tensor,
        interval: Tensor,
        t: Tensor,
        w: Tensor | float,
    ) -> Tensor:
        """x-targets float32 [B,4,h,w] on the CPU. SnapFusion Eq. 7-9, guided as in Eq. 10 where w is not 1.

        Args:
            latent: float32 [B,4,h,w].
            token_ids: int64 [B,L].
            eps: float32 [B,4,h,w].
            interval: int64 [B].
            t: int64 [B], the interval's first time.
            w: float32 [B,1,1,1], or 1.0 for a vanilla batch, whose unconditional half is not computed.
        """
        bundle, settings = self.bundle, self.settings
        latent, eps, interval, t = (value.to(bundle.device) for value in (latent, eps, interval, t))
        w = w.to(bundle.device) if isinstance(w, Tensor) else w
        z_t = bundle.schedule.diffuse(x=latent, eps=eps, t=t)
        return teacher_target(
            bundle.denoiser(bundle.encode_text(token_ids), w=w, c_null=self.c_null),
            z_t,
            interval=interval,
            student_steps=settings.student_steps,
            k=settings.k,
            schedule=bundle.schedule,
        ).cpu()
