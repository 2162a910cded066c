"""Computes the student's targets for latents, by k DDIM steps of the teacher. SnapFusion Eq. 7-10."""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from pipelines.stages.device import DTYPES, NetworkStage
from pipelines.stages.settings import Device, TeacherSettings
from pipelines.tables.units import LatentRows, finite_rows, shape_batches
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder, draw_caption_dropout
from snapfusion.training.distillation_batch import OnlineTargets
from snapfusion.training.draws import interval_ends, row_key


class ComputeTargets(NetworkStage[LatentRows, TeacherSettings]):
    """Turns `LatentRows` into `FinishedRows` of TARGETS by the teacher."""

    def __init__(self, *, model: str, settings: TeacherSettings, device: Device) -> None:
        super().__init__(model=model, settings=settings, device=device)
        captions = CaptionEncoder(self.bundle)
        # The class that also computes targets while training, so that both ways give equal targets.
        self.targets = OnlineTargets(self.bundle, captions=captions, settings=settings, seed=settings.seed)

    def columns(self, rows: LatentRows) -> tuple[dict[str, Any], list[bool]]:
        """Compute the targets of all rows of a unit."""
        ids = [id_ for id_, _ in rows.row_keys()]
        columns: dict[str, Any] = {
            "id": ids,
            "source_id": rows.source_ids,
            "draw": [rows.draw] * len(ids),
            "latent": rows.latents,
            "height": [latent.shape[1] * self.bundle.cell for latent in rows.latents],
            "width": [latent.shape[2] * self.bundle.cell for latent in rows.latents],
            **self.compute(rows),
        }
        if not rows.guided:
            columns["w"] = [None] * len(ids)
        return columns, finite_rows(columns["x_target"])

    def compute(self, rows: LatentRows) -> dict[str, list[Any]]:
        """The columns that are drawn or computed, in the rows' order; `w` is NaN in vanilla ones."""
        columns: dict[str, dict[int, Any]] = defaultdict(dict)
        for indices in shape_batches(rows.latents, self.settings.batch_size):
            latents = np.stack([rows.latents[index] for index in indices]).astype(np.float32)
            token_ids = torch.from_numpy(rows.token_ids[indices].astype(np.int64))
            ids = tuple(rows.ids[index] for index in indices)
            batch = Batch(ids=ids, columns={"latent": torch.from_numpy(latents), "token_ids": token_ids})
            for name, values in self.compute_batch(batch, draw=rows.draw, guided=rows.guided).items():
                columns[name].update(zip(indices, values, strict=True))
        return {name: [values[index] for index in sorted(values)] for name, values in columns.items()}

    @torch.inference_mode()
    def compute_batch(self, batch: Batch, *, draw: int, guided: bool) -> dict[str, np.ndarray]:
        """The columns of one batch. SnapFusion Eq. 7-9, in guided batches with Eq. 10."""
        settings, n = self.settings, len(batch)
        keys = [row_key(settings.seed, id_, draw) for id_ in batch.ids]
        targets = self.targets.compute(batch.to(self.bundle.device), keys, guided=guided)
        steps, schedule = settings.student_steps, self.bundle.schedule
        _, t2 = interval_ends(targets.interval, student_steps=steps, schedule=schedule)
        dropped = draw_caption_dropout(keys, fraction=0.0 if guided else settings.caption_dropout)
        no_caption = self.bundle.tokenize([""])
        columns = {
            "token_ids": torch.where(dropped.view(-1, 1), no_caption, batch["token_ids"]),
            "noise_key": torch.tensor(keys),
            "interval": targets.interval,
            "t": targets.t,
            "t2": t2,
            "k": torch.full((n,), settings.k),
            "w": torch.full((n,), math.nan) if targets.w is None else targets.w.flatten(),
            "x_target": targets.x_target.to(DTYPES[settings.x_dtype]),
        }
        return {name: column.cpu().numpy() for name, column in columns.items()}
