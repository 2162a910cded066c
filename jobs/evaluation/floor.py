"""The floor of FID and KID: what as many real images have as are generated, which no model can be below."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from jobs.evaluation.curve_tables import EvaluatedCaptions, TableMaker
from pipelines.datasets.references import features_of
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.kernel import KernelSums
from snapfusion.metrics.moments import Moments


def measure_floor(maker: TableMaker, evaluated: EvaluatedCaptions) -> dict[str, Any] | None:
    """Mean and standard deviation over further sets of the reference's scenes, as JSON values.

    None unless the reference is the miniature's scenes, of which more can be rendered.
    """
    settings, count = maker.settings, len(evaluated.ids)
    references, redraws = settings.references, settings.floor_redraws
    if references.url is not None or redraws < 2:
        return None
    further = references.model_copy(
        update={
            "name": f"{references.name}-redrawn",
            "first": references.first + references.count,
            "count": redraws * count,
        }
    )
    table = maker.references(further, name="redrawn")
    sets = torch.from_numpy(features_of(table, limit=redraws * count)).split(count)
    values = {"fid": [frechet_distance(Moments.of(one), evaluated.real.moments) for one in sets]}
    if (kernel := evaluated.real.kernel) is not None:
        everything = [np.arange(count)]
        sums = (KernelSums.of(one, groups=everything, reference=kernel) for one in sets)
        values["kid"] = [each.distance([0]) for each in sums]
    return {
        "redraws": redraws,
        "images": count,
        **{name: {"mean": mean(each), "sd": stdev(each)} for name, each in values.items()},
    }
