"""Evaluates models and samplers by FID and CLIP over guidance scales.

Each contender's images are a table of their own (SAMPLES), to which more guidance scales or captions are
appended; features of real images are computed once (REFERENCES). All metrics are computed from these tables.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from jobs.evaluation.results import Comparison, EvaluationResults
from jobs.evaluation.settings import Contender, Criterion, EvaluationSettings, FidGap, PromptSettings
from jobs.runtime.versions import versions
from pipelines.datasets.references import compute_references, moments_of
from pipelines.datasets.samples import generate_samples, read_scores, sampled_ids
from pipelines.ray_data.execution import Runner
from pipelines.rejections import Rejection
from pipelines.sources.captions import Caption, captions_digest, read_captions
from pipelines.stages.metric_networks import describe_features, describe_scorer
from pipelines.storage.objects import absolute_url
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress
from pipelines.tables.table import Snapshot
from pipelines.tables.usable_rows import check_usable
from snapfusion.metrics.curves import (
    Curve,
    CurveError,
    CurvePoint,
    clip_at_equal_fid,
    gap_closed,
    metrics_at,
    paired_differences,
)
from snapfusion.metrics.moments import Moments
from snapfusion.mini.scenes import HELD_OUT, caption_of, scene_of
from snapfusion.models.source import absolute_source

StartTable = Callable[[str, Any], tuple[Origin, OnProgress]]
"""(name of a table to fill, its parents) -> the origin kept beside its units, and a progress callback."""


def evaluate(
    settings: EvaluationSettings, *, model: str, out: str, start: StartTable, run: Runner
) -> EvaluationResults:
    """Generate the missing samples and compute the metrics.

    Args:
        settings: of the evaluation.
        model: source of the model of contenders that name none.
        out: folder or URL of the tables: `references`, and one for each contender.
        start: called for each table before it is filled.
        run: executes stages.

    Raises:
        NoUsableRows: if all rows of a table were rejected.
    """
    captions = captions_of(settings.prompts)
    origin, on_progress = start("references", {"pictures": settings.references.url or "scenes"})
    references = compute_references(
        settings.references,
        metrics=settings.samples.judging,
        url=f"{out}/references",
        origin=origin,
        run=run,
        on_progress=on_progress,
    )
    check_usable("REFERENCES", references)
    tables = {
        contender.name: _sample(contender, settings, captions, model=model, out=out, start=start, run=run)
        for contender in settings.contenders
    }
    ids = _shared_ids(settings, tables, captions)
    reference = moments_of(references)
    curves = {
        name: Curve(points=tuple(_points(settings, table, ids=ids)), reference=reference)
        for name, table in tables.items()
    }
    return {
        "protocol": _protocol(settings, captions, ids=ids, reference=reference, references=references),
        "tables": {name: table.lineage() for name, table in tables.items()},
        "curves": _curve_records(settings, curves, tables),
        "baseline": settings.baseline,
        **_compared_with(settings.baseline, curves),
        "against": {name: _compared_with(name, curves) for name in settings.also_against},
        "gaps": [{**gap.to_values(), **_or_reason(_gap_closed, gap, curves)} for gap in settings.gaps],
        "criteria": [_judged(criterion, curves) for criterion in settings.criteria],
        "versions": versions(),
    }


def _sample(
    contender: Contender,
    settings: EvaluationSettings,
    captions: Sequence[Caption | Rejection],
    *,
    model: str,
    out: str,
    start: StartTable,
    run: Runner,
) -> Snapshot:
    """Generate the missing samples of a contender; returns its table."""
    source = absolute_source(contender.model or model)
    origin, on_progress = start(contender.name, {"model": source, "captions": settings.prompts.url})
    table = generate_samples(
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
    check_usable(f"SAMPLES of {contender.name}", table)
    return table


def captions_of(prompts: PromptSettings) -> list[Caption | Rejection]:
    """The captions of the list, or those of held-out scenes."""
    if prompts.url is not None:
        return list(islice(read_captions(prompts.url, prompts.reading), prompts.limit))
    return [
        Caption(id=f"scene-{index}", ordinal=index, text=caption_of(scene_of(HELD_OUT + index)))
        for index in range(prompts.limit)
    ]


def _shared_ids(
    settings: EvaluationSettings, tables: Mapping[str, Snapshot], captions: Sequence[Caption | Rejection]
) -> list[str]:
    """Captions that all contenders have an image of at every guidance, in order: differences are paired."""
    sampled = [
        set(sampled_ids(table, source=settings.prompts.name, w=w))
        for table in tables.values()
        for w in settings.guidance
    ]
    ids = [row.id for row in captions if all(row.id in found for found in sampled)]
    if len(ids) < 2 * settings.groups:
        raise ValueError(
            f"all contenders have images of {len(ids)} captions; {2 * settings.groups} are needed for "
            f"{settings.groups} groups: raise evaluation.prompts.limit or lower evaluation.groups"
        )
    return ids


def _points(settings: EvaluationSettings, table: Snapshot, *, ids: Sequence[str]) -> Iterator[CurvePoint]:
    for w in settings.guidance:
        rows = read_scores(table, source=settings.prompts.name, w=w)
        index_of = {id_: index for index, id_ in enumerate(rows.ids)}
        chosen = np.array([index_of[id_] for id_ in ids])
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
    """Everything that a published metric must be quoted with."""
    judging = settings.samples.judging
    # A covariance of fewer images than features is singular, which makes FID too large: noted.
    smallest = Moments(count=len(ids), mean=reference.mean, scatter=reference.scatter)
    notes = [
        f"{side}: {note}"
        for side, note in (("drawn", smallest.rank_warning()), ("reference", reference.rank_warning()))
        if note is not None
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
        "features": describe_features(judging.features),
        "scorer": describe_scorer(judging.scorer),
        "drawing": settings.samples.drawing.to_values(),
        "dtype": settings.samples.device.dtype,
        "intervals": f"95 %: normal for means over captions, else a jackknife over {settings.groups} groups",
        "notes": notes,
    }


def _curve_records(
    settings: EvaluationSettings, curves: Mapping[str, Curve], tables: Mapping[str, Snapshot]
) -> dict[str, dict[str, Any]]:
    records = {}
    for contender in settings.contenders:
        curve, w_conditioned = curves[contender.name], tables[contender.name].identity["told_w"]
        points = [
            {
                "w": w,
                "evaluations": contender.sampler.evaluations(w, w_conditioned=w_conditioned),
                **metrics_at(curve, w),
            }
            for w in settings.guidance
        ]
        records[contender.name] = {**contender.to_values(), "points": points}
    return records


def _compared_with(baseline: str, curves: Mapping[str, Curve]) -> Comparison:
    """The comparison of all other contenders with one."""
    base = curves[baseline]
    others = {name: curve for name, curve in curves.items() if name != baseline}
    return {
        "differences": {
            name: [{"w": point.w, **paired_differences(curve, base, w=point.w)} for point in curve.points]
            for name, curve in others.items()
        },
        "equal_fid": {name: _or_reason(_equal_fid, curve, base) for name, curve in others.items()},
    }


def _equal_fid(curve: Curve, base: Curve) -> dict[str, Any]:
    return asdict(clip_at_equal_fid(curve, base))


def _gap_closed(gap: FidGap, curves: Mapping[str, Curve]) -> dict[str, Any]:
    student, few, many = (curves[name] for name in (gap.student, gap.few, gap.many))
    return {"closed": gap_closed(student, few=few, many=many, w=gap.w)}


def _judged(criterion: Criterion, curves: Mapping[str, Curve]) -> dict[str, Any]:
    """A criterion with the measured difference, and whether it is met."""
    ours, theirs = curves[criterion.contender], curves[criterion.against]
    difference = paired_differences(ours, theirs, w=criterion.w)[criterion.metric]
    return {
        **criterion.to_values(),
        "difference": difference,
        "met": bool(criterion.is_met(difference.value)),
    }


def _or_reason(compute: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - curves
    """A comparison, or the reason why the curves cannot be compared."""
    try:
        return compute(*arguments)
    except CurveError as reason:
        return {"no_reading": str(reason)}
