"""Latents to what the student should predict, by k DDIM steps of the teacher. SnapFusion Eq. 7-10."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import torch

from pipelines.stages.device import DTYPES
from pipelines.stages.settings import Device, TeacherSettings
from pipelines.tables.units import FinishedRows, LatentRows, finish_unit, finite_rows, group_by_shape
from snapfusion.models.load import load
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder, draw_caption_dropout
from snapfusion.training.distillation_batch import OnlineTargets
from snapfusion.training.draws import interval_ends, row_key


class ComputeTargets:
    """A teacher in an actor: `LatentRows` in, `FinishedRows` of TARGETS out."""

    def __init__(self, *, teacher: str, settings: TeacherSettings, device: Device) -> None:
        self.settings = settings
        self.bundle = load(teacher, device=device.prepare(), dtype=device.torch_dtype)
        # What teaches while training: a target is the same, whichever way it comes.
        self.targets = OnlineTargets(
            self.bundle,
            captions=CaptionEncoder(self.bundle),
            settings=settings,
            seed=settings.seed,
        )
        self.environment = device.environment()

    def __call__(self, rows: LatentRows) -> FinishedRows:
        """Targets of all rows of a unit, in batches that depend on the unit alone."""
        began = time.monotonic()
        ids = [f"{id_}#{rows.draw}" for id_ in rows.ids]
        columns: dict[str, Any] = {
            "id": ids,
            "source_id": rows.source_ids,
            "draw": [rows.draw] * len(ids),
            "latent": rows.latents,
            "height": [latent.shape[1] * self.bundle.cell for latent in rows.latents],
            "width": [latent.shape[2] * self.bundle.cell for latent in rows.latents],
            **self.taught(rows),
        }
        if not rows.guided:
            columns["w"] = [None] * len(ids)
        finite = finite_rows(columns["x_target"])
        return finish_unit(
            columns,
            unit=rows.unit,
            rows=((id_, ordinal) for ordinal, id_ in enumerate(ids)),
            finite=finite,
            environment=self.environment,
            seconds=time.monotonic() - began,
        )

    def taught(self, rows: LatentRows) -> dict[str, list[Any]]:
        """The columns that are drawn and computed, in the rows' order; `w` is NaN in vanilla ones.

        A batch holds rows of one shape.
        """
        columns: dict[str, dict[int, Any]] = {}
        for places in group_by_shape(rows.latents):
            whole = Batch(
                ids=tuple(rows.ids[place] for place in places),
                columns={
                    "latent": torch.from_numpy(
                        np.stack([rows.latents[place] for place in places]).astype(np.float32)
                    ),
                    "token_ids": torch.from_numpy(rows.token_ids[places].astype(np.int64)),
                },
            )
            parts = [
                self.teach(part, draw=rows.draw, guided=rows.guided)
                for part in whole.split(self.settings.batch_size)
            ]
            for name in parts[0]:
                values = itertools.chain(*(part[name] for part in parts))
                columns.setdefault(name, {}).update(zip(places, values, strict=True))
        return {name: [values[place] for place in sorted(values)] for name, values in columns.items()}

    @torch.inference_mode()
    def teach(self, batch: Batch, *, draw: int, guided: bool) -> dict[str, np.ndarray]:
        """The columns of one batch. SnapFusion Eq. 7-9, in guided batches with Eq. 10.

        A vanilla batch asks the teacher for no unconditional half.
        """
        settings, n = self.settings, len(batch)
        keys = [row_key(settings.seed, id_, draw) for id_ in batch.ids]
        lesson = self.targets.compute(batch.to(self.bundle.device), keys, guided=guided)
        _, t2 = interval_ends(
            lesson.interval, student_steps=settings.student_steps, schedule=self.bundle.schedule
        )
        dropped = draw_caption_dropout(keys, fraction=0.0 if guided else settings.caption_dropout)
        no_caption = self.bundle.tokenize([""])
        w = torch.full((n,), math.nan) if lesson.w is None else lesson.w.flatten()
        columns = {
            "token_ids": torch.where(dropped.view(-1, 1), no_caption, batch["token_ids"]),
            "noise_key": torch.tensor(keys),
            "interval": lesson.interval,
            "t": lesson.t,
            "t2": t2,
            "k": torch.full((n,), settings.k),
            "w": w,
            "x_target": lesson.x_target.to(DTYPES[settings.x_dtype]),
        }
        return {name: column.cpu().numpy() for name, column in columns.items()}
