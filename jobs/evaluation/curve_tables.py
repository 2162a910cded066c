"""Samples contenders for a set of captions, and reads their scores as curves over guidance.

Each contender's images are a table of their own (SAMPLES), to which more guidance scales or captions are
appended; features of real images are computed once (REFERENCES).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jobs.evaluation.caption_diversity import CaptionDiversity
from jobs.evaluation.caption_lists import CaptionList
from jobs.evaluation.captions import row_of_draw
from jobs.evaluation.distance_files import DistanceFiles, RealImages
from jobs.evaluation.settings import Contender, EvaluationSettings, PromptSettings
from pipelines.datasets.references import compute_references, features_of, moments_of
from pipelines.datasets.samples import (
    generate_samples,
    read_features,
    read_scores,
    sampled_ids,
    seconds_per_image,
)
from pipelines.datasets.settings import ReferencesSettings
from pipelines.ray_data.execution import Runner
from pipelines.storage.objects import absolute_url
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress
from pipelines.tables.table import Snapshot
from pipelines.tables.usable_rows import check_usable
from snapfusion.metrics.curve_point import CurvePoint
from snapfusion.metrics.curves import Curve
from snapfusion.metrics.image_groups import ImageGroups
from snapfusion.metrics.kernel import KernelReference
from snapfusion.metrics.neighbors import NEIGHBORS, NeighborReference
from snapfusion.metrics.parallel import Map, over_cores
from snapfusion.models.source import absolute_source

_DISTANCES = "distances"
"""Folder of what was computed from the tables."""

StartTable = Callable[[str, Any], tuple[Origin, OnProgress]]
"""(name of a table to fill, its parents) -> the origin kept beside its units, and a progress callback."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedCaptions:
    """Contenders evaluated on one set of captions.

    Attributes:
        listed: the captions.
        ids: of the images that are compared, draw by draw; all contenders have them at every guidance.
        curves: by contender.
        tables: of the contenders' samples.
        references: table of the real images.
        real: their features.
    """

    listed: CaptionList
    ids: Sequence[str]
    curves: Mapping[str, Curve]
    tables: Mapping[str, Snapshot]
    references: Snapshot
    real: RealImages

    def cost_of(self, contender: Contender, *, w: float) -> dict[str, Any]:
        """UNet passes of an image at one guidance, and the seconds that a worker took for one."""
        table = self.tables[contender.name]
        return {
            "evaluations": contender.sampler.evaluations(w, w_conditioned=table.identity["told_w"]),
            "seconds": seconds_per_image(table, source=self.listed.prompts.name, w=w),
        }


@dataclass(frozen=True, kw_only=True)
class TableMaker:
    """Makes the tables of an evaluation.

    Attributes:
        settings: of the evaluation.
        model: source of the model of contenders that name none.
        out: folder or URL of the tables.
        start: called for each table before it is filled.
        run: executes stages.
    """

    settings: EvaluationSettings
    model: str
    out: str
    start: StartTable
    run: Runner

    def evaluate(
        self,
        contenders: Sequence[Contender],
        *,
        listed: CaptionList,
        name: str,
        diversity: CaptionDiversity | None = None,
    ) -> EvaluatedCaptions:
        """Generate the missing samples, and compute curves.

        Args:
            contenders: to evaluate.
            listed: captions and their real images.
            name: of the table of the real images.
            diversity: measures LPIPS of each caption's images; None for none.

        Raises:
            NoUsableRows: if all rows of a table were rejected.
            ValueError: if too few images are left to compare.
        """
        names = None if listed.pairs is None else listed.pairs.image_names
        real = self.references(listed.references, name=name, names=names)
        tables = {contender.name: self._sample(contender, listed) for contender in contenders}
        scales = {contender.name: self.settings.scales(contender) for contender in contenders}
        ids = self._shared_ids(listed, tables, scales)
        with over_cores() as parallel:
            images = self._real_images(real, parallel)
            files = DistanceFiles(url=f"{self.out}/{_DISTANCES}", real=images, parallel=parallel)
            curves = {
                name: Curve(
                    points=tuple(
                        self._points(
                            table, scales[name], listed.prompts, ids=ids, files=files, diversity=diversity
                        )
                    )
                )
                for name, table in tables.items()
            }
        return EvaluatedCaptions(
            listed=listed, ids=ids, curves=curves, tables=tables, references=real, real=images
        )

    def references(
        self, references: ReferencesSettings, *, name: str, names: Sequence[str] | None = None
    ) -> Snapshot:
        """The table `name` with features of all real images, or of those named.

        Raises:
            NoUsableRows: if all of them were rejected.
        """
        origin, on_progress = self.start(name, {"pictures": references.url or "scenes"})
        table = compute_references(
            references,
            metrics=self.settings.samples.judging,
            url=f"{self.out}/{name}",
            names=names,
            origin=origin,
            run=self.run,
            on_progress=on_progress,
        )
        check_usable("REFERENCES", table)
        return table

    def _sample(self, contender: Contender, listed: CaptionList) -> Snapshot:
        """Generate the missing samples of a contender; returns its table."""
        source = listed.prompts.name
        settings, model = self.settings, absolute_source(contender.model or self.model)
        origin, on_progress = self.start(
            contender.name, {"model": model, "captions": settings.prompts.url or source}
        )
        table = generate_samples(
            settings.samples,
            model=model,
            sampler=contender.sampler,
            guidance=settings.scales(contender),
            captions=listed.rows,
            source=source,
            url=f"{self.out}/{contender.table or contender.name}",
            decoder=contender.decoder and absolute_url(contender.decoder),
            origin=origin,
            run=self.run,
            on_progress=on_progress,
        )
        check_usable(f"SAMPLES of {contender.name}", table)
        return table

    def _shared_ids(
        self,
        listed: CaptionList,
        tables: Mapping[str, Snapshot],
        scales: Mapping[str, Sequence[float]],
    ) -> list[str]:
        """Images that all contenders have at each of their scales, draw by draw: differences are paired.

        A caption is left out if one of its draws is missing.
        """
        prompts = listed.prompts
        found = [
            set(sampled_ids(table, source=prompts.name, w=w))
            for name, table in tables.items()
            for w in scales[name]
        ]
        draws = range(prompts.draws)
        rows = [
            row
            for row in listed.once
            if all(row_of_draw(row, draw).id in ids for draw in draws for ids in found)
        ]
        needed = self.settings.least_captions(prompts)
        if len(rows) < needed:
            raise ValueError(
                f"all contenders have images of {len(rows)} captions; {needed} are needed for "
                f"{self.settings.groups} groups: raise evaluation.prompts.limit or lower evaluation.groups"
            )
        return [row_of_draw(row, draw).id for draw in draws for row in rows]

    def _real_images(self, table: Snapshot, parallel: Map) -> RealImages:
        """Moments of all real images, and the features of those for KID, precision and recall."""
        kernel = neighbors = None
        if limit := self.settings.kid_images:
            features = torch.from_numpy(features_of(table, limit=limit))
            kernel = KernelReference.of(features, parallel=parallel)
        if (limit := self.settings.neighbor_images) and table.num_rows > NEIGHBORS:
            if kernel is not None and limit == self.settings.kid_images:
                features = kernel.features  # kept once
            else:
                features = torch.from_numpy(features_of(table, limit=limit))
            neighbors = NeighborReference.of(features, parallel=parallel)
        return RealImages(moments=moments_of(table), kernel=kernel, neighbors=neighbors)

    def _points(
        self,
        table: Snapshot,
        scales: Sequence[float],
        prompts: PromptSettings,
        *,
        ids: Sequence[str],
        files: DistanceFiles,
        diversity: CaptionDiversity | None,
    ) -> Iterator[CurvePoint]:
        """The points of a contender, one after the other: features are not kept."""
        grouping = ImageGroups.of(len(ids), groups=self.settings.groups, draws=prompts.draws)
        for w in scales:
            rows = read_scores(table, source=prompts.name, w=w)
            index_of = {id_: index for index, id_ in enumerate(rows.ids)}
            chosen = np.array([index_of[id_] for id_ in ids])
            features = read_features(table, source=prompts.name, w=w, ids=ids)
            further = []
            if diversity is not None:
                further.append(
                    diversity.metric_of(
                        table,
                        source=prompts.name,
                        w=w,
                        ids=ids,
                        draws=prompts.draws,
                        parallel=files.parallel,
                    )
                )
            distances = files.distances(features, grouping=grouping, further=further)
            yield CurvePoint(
                w=w,
                distances=distances,
                clip=rows.clip[chosen].astype(np.float64),
                preferences={
                    name: values[chosen].astype(np.float64) for name, values in rows.preferences.items()
                },
                right=None if rows.right is None else rows.right[chosen],
                grouping=grouping,
            )
