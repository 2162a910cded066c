"""An evaluation: who is compared, on which captions, held against which pictures; and its figures.

Each contender's pictures are a table of their own (SAMPLES), which more guidance scales or captions add to;
real pictures are described once (REFERENCES). The figures are computed from the tables, and can be again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from jobs.evaluation.settings import EvaluationSettings, FidGap, PromptSettings
from pipelines.datasets.references import compute_references, moments_of
from pipelines.datasets.samples import generate_samples, read_scores, sampled_ids
from pipelines.ray_data.execution import Runner
from pipelines.rejections import Rejection
from pipelines.sources.captions import Caption, captions_digest, read_captions
from pipelines.storage.objects import absolute_url
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress
from pipelines.tables.table import Snapshot
from snapfusion.metrics.curves import (
    Curve,
    CurvePoint,
    IncomparableCurvesError,
    clip_at_equal_fid,
    gap_closed,
    metrics_at,
    paired_differences,
)
from snapfusion.metrics.moments import Moments
from snapfusion.mini.scenes import HELD_OUT, caption_of, scene_of

StartTable = Callable[[str, Any], tuple[Origin, OnProgress]]
"""(what begins, its parents) -> what to keep beside its units, and what to tell of its progress."""


def evaluate(
    settings: EvaluationSettings, *, model: str, out: str, start: StartTable, run: Runner
) -> dict[str, Any]:
    """Draw what is not drawn yet, and read the figures off the tables.

    Args:
        settings: who and how.
        model: of the contenders that name none.
        out: folder or URL that the tables lie in: `references`, and one for each contender.
        start: told of each table that is about to be made.
        run: what sends units through the stages.

    Returns:
        What was compared and how ("protocol"), the figures of each contender ("curves"), how each stands to
        the baseline ("differences", "equal_fid") and to others ("against"), and "gaps", as JSON values; an
        interval is an `Interval`.
    """
    captions = captions_of(settings.prompts)
    origin, on_progress = start("references", {"pictures": settings.references.url or "scenes"})
    references = compute_references(
        settings.references,
        judging=settings.samples.judging,
        url=f"{out}/references",
        origin=origin,
        run=run,
        on_progress=on_progress,
    )
    tables: dict[str, Snapshot] = {}
    for contender in settings.contenders:
        source = _absolute_source(contender.model or model)
        origin, on_progress = start(contender.name, {"model": source, "captions": settings.prompts.url})
        tables[contender.name] = generate_samples(
            settings.samples,
            model=source,
            sampler=contender.sampler,
            guidance=settings.guidance,
            captions=captions,
            source=settings.prompts.name,
            url=f"{out}/{contender.table or contender.name}",
            decoder=contender.decoder and absolute_url(contender.decoder),
            origin=origin,
            run=run,
            on_progress=on_progress,
        )
    ids = _shared_ids(settings, tables, captions)
    reference = moments_of(references)
    curves = {name: _curve(settings, table, ids=ids, reference=reference) for name, table in tables.items()}
    return {
        "protocol": _protocol(settings, captions, ids=ids, reference=reference, references=references),
        "tables": {name: table.lineage() for name, table in tables.items()},
        **_comparisons(settings, curves, tables),
    }


def _absolute_source(model: str) -> str:
    """A folder by its absolute path: a worker may stand elsewhere."""
    return absolute_url(model) if Path(model).is_dir() else model


def captions_of(prompts: PromptSettings) -> list[Caption | Rejection]:
    """The captions of the list, or of held-out scenes."""
    if prompts.url is not None:
        return list(islice(read_captions(prompts.url, prompts.reading), prompts.limit))
    return [
        Caption(id=f"scene-{number}", ordinal=number, text=caption_of(scene_of(HELD_OUT + number)))
        for number in range(prompts.limit)
    ]


def _shared_ids(
    settings: EvaluationSettings, tables: Mapping[str, Snapshot], captions: Sequence[Caption | Rejection]
) -> list[str]:
    """The captions whose picture no contender lost at any guidance, in order: differences are paired."""
    drawn = [
        set(sampled_ids(table, source=settings.prompts.name, w=w))
        for table in tables.values()
        for w in settings.guidance
    ]
    ids = [row.id for row in captions if all(row.id in there for there in drawn)]
    if len(ids) < 2 * settings.groups:
        raise ValueError(
            f"{len(ids)} captions were drawn by all contenders; {2 * settings.groups} are needed for "
            f"{settings.groups} groups: raise evaluation.prompts.limit or lower evaluation.groups"
        )
    return ids


def _curve(settings: EvaluationSettings, table: Snapshot, *, ids: Sequence[str], reference: Moments) -> Curve:
    return Curve(points=tuple(_points(settings, table, ids=ids)), reference=reference)


def _points(settings: EvaluationSettings, table: Snapshot, *, ids: Sequence[str]) -> Iterator[CurvePoint]:
    for w in settings.guidance:
        rows = read_scores(table, source=settings.prompts.name, w=w)
        position = {id_: place for place, id_ in enumerate(rows.ids)}
        chosen = np.array([position[id_] for id_ in ids])
        yield CurvePoint.of(
            w=w,
            features=rows.features[chosen],
            clip=rows.clip[chosen],
            right=None if rows.right is None else rows.right[chosen],
            groups=settings.groups,
        )


def _protocol(
    settings: EvaluationSettings,
    captions: Sequence[Caption | Rejection],
    *,
    ids: Sequence[str],
    reference: Moments,
    references: Snapshot,
) -> dict[str, Any]:
    """All that a figure must be quoted with."""
    judging = settings.samples.judging
    smallest = Moments(count=len(ids), mean=reference.mean, scatter=reference.scatter)
    notes = [
        f"{side}: {said}"
        for side, said in (("drawn", smallest.shortfall()), ("reference", reference.shortfall()))
        if said is not None
    ]
    return {
        "captions": {
            "name": settings.prompts.name,
            "url": settings.prompts.url,
            "sha256": captions_digest(captions),
            "listed": len(captions),
            "compared": len(ids),
        },
        "reference": {**references.lineage(), **references.identity, "compared": reference.count},
        "features": judging.describe_features(),
        "scorer": judging.describe_scorer(),
        "drawing": settings.samples.drawing.to_values(),
        "dtype": settings.samples.device.dtype,
        "intervals": f"95 %: normal for means over captions, else a jackknife over {settings.groups} groups",
        "notes": notes,
    }


def _comparisons(
    settings: EvaluationSettings, curves: Mapping[str, Curve], tables: Mapping[str, Snapshot]
) -> dict[str, Any]:
    return {
        "curves": {
            contender.name: {
                **contender.to_values(),
                "points": [
                    {
                        "w": w,
                        "evaluations": contender.sampler.evaluations(
                            w, told=tables[contender.name].identity["told_w"]
                        ),
                        **metrics_at(curves[contender.name], w),
                    }
                    for w in settings.guidance
                ],
            }
            for contender in settings.contenders
        },
        "baseline": settings.baseline,
        **_compared_with(settings, curves, baseline=settings.baseline),
        "against": {name: _compared_with(settings, curves, baseline=name) for name in settings.also_against},
        "gaps": [
            {**gap.to_values(), **_reading_or_reason(partial(_gap_closed, gap, curves))}
            for gap in settings.gaps
        ],
    }


def _compared_with(
    settings: EvaluationSettings, curves: Mapping[str, Curve], *, baseline: str
) -> dict[str, Any]:
    """How each other contender stands to one."""
    others = {name: curve for name, curve in curves.items() if name != baseline}
    return {
        "differences": {
            name: [{"w": w, **paired_differences(curve, curves[baseline], w=w)} for w in settings.guidance]
            for name, curve in others.items()
        },
        "equal_fid": {
            name: _reading_or_reason(partial(_equal_fid, curve, curves[baseline]))
            for name, curve in others.items()
        },
    }


def _equal_fid(curve: Curve, baseline: Curve) -> dict[str, Any]:
    return asdict(clip_at_equal_fid(curve, baseline))


def _gap_closed(gap: FidGap, curves: Mapping[str, Curve]) -> dict[str, Any]:
    student, few, many = (curves[name] for name in (gap.student, gap.few, gap.many))
    return {"closed": gap_closed(student, few=few, many=many, w=gap.w)}


def _reading_or_reason(reading: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return reading()
    except IncomparableCurvesError as reason:
        return {"no_reading": str(reason)}
