"""Evaluates models and samplers by FID, KID and CLIP over guidance scales; all is computed from tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jobs.evaluation.captions import captions_of, check_disjoint
from jobs.evaluation.curve_tables import EvaluatedCaptions, StartTable, TableMaker
from jobs.evaluation.floor import measure_floor
from jobs.evaluation.results import Comparison, EvaluationResults
from jobs.evaluation.settings import Contender, Criterion, EvaluationSettings, FidGap, TuningSettings
from jobs.evaluation.tuning import Choice, choose
from jobs.runtime.versions import versions
from pipelines.datasets.samples import seconds_per_image
from pipelines.ray_data.execution import Runner
from pipelines.sources.captions import captions_digest
from pipelines.stages.metric_networks import describe_features, describe_scorer
from snapfusion.metrics.curves import (
    Curve,
    CurveError,
    clip_at_equal_fid,
    gap_closed,
    metrics_at,
    paired_differences,
)
from snapfusion.metrics.moments import Moments


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
        ValueError: if captions for tuning are compared on, too.
    """
    maker = TableMaker(settings=settings, model=model, out=out, start=start, run=run)
    choice = None if settings.tuning is None else _tune(maker, settings.tuning)
    contenders = settings.contenders if choice is None else choice.contenders
    test = maker.evaluate(
        contenders, prompts=settings.prompts, references=settings.references, name="references"
    )
    curves = test.curves
    return {
        "protocol": _protocol(settings, test),
        "floor": measure_floor(maker, test),
        "tuning": None if choice is None else choice.record(),
        "tables": {name: table.lineage() for name, table in test.tables.items()},
        "curves": _curve_records(contenders, test, choice, source=settings.prompts.name),
        "baseline": settings.baseline,
        **_compared_with(settings.baseline, curves),
        "against": {name: _compared_with(name, curves) for name in settings.also_against},
        "gaps": [
            {**gap.to_values(), **_or_reason(_gap_closed, gap, curves)}
            for gap in settings.gaps
            if gap.student in curves  # not one of a family that was not chosen
        ],
        "criteria": [_judged(criterion, curves) for criterion in settings.criteria],
        "versions": versions(),
    }


def _tune(maker: TableMaker, tuning: TuningSettings) -> Choice:
    """Evaluate all contenders on the tuning captions, and choose."""
    settings = maker.settings
    names = (f"prompts {settings.prompts.name!r}", f"tuning.prompts {tuning.prompts.name!r}")
    check_disjoint(captions_of(settings.prompts), captions_of(tuning.prompts), names=names)
    evaluated = maker.evaluate(
        settings.contenders,
        prompts=tuning.prompts,
        references=tuning.references,
        name="tuning-references",
    )
    return choose(settings.contenders, evaluated)


def _protocol(settings: EvaluationSettings, test: EvaluatedCaptions) -> dict[str, Any]:
    """Everything that a published metric must be quoted with."""
    judging, prompts = settings.samples.judging, settings.prompts
    # A covariance of fewer images than features is singular, which makes FID too large: noted.
    moments = test.real.moments
    smallest = Moments(count=len(test.ids), mean=moments.mean, scatter=moments.scatter)
    notes = [
        f"{side}: {note}"
        for side, note in (("drawn", smallest.rank_warning()), ("reference", moments.rank_warning()))
        if note is not None
    ]
    if test.pairs is not None:
        notes += test.pairs.notes()
    return {
        "title": _title(settings, test),
        "captions": {
            "name": prompts.name,
            "url": prompts.url,
            "split": prompts.split,
            "draws": prompts.draws,
            "sha256": captions_digest(test.captions),
            "listed": len(test.captions) // prompts.draws,
            "compared": len(test.ids) // prompts.draws,
            "without_image": None if test.pairs is None else test.pairs.without_image,
        },
        "reference": {
            **test.references.lineage(),
            **test.references.identity,
            "split": None if settings.references.url else settings.references.split,
            "compared": moments.count,
            "paired": test.pairs is not None,
            "without_caption": None if test.pairs is None else test.pairs.without_caption,
        },
        "features": describe_features(judging.features),
        "scorer": describe_scorer(judging.scorer),
        "drawing": settings.samples.drawing.to_values(),
        "dtype": settings.samples.device.dtype,
        "intervals": _interval_text(settings),
        "notes": notes,
    }


def _title(settings: EvaluationSettings, test: EvaluatedCaptions) -> str:
    """What stands in every chart: captions, real images, and how FID sees them."""
    prompts, references, features = settings.prompts, settings.references, settings.samples.judging.features
    draws = f", {prompts.draws} images of each" if prompts.draws > 1 else ""
    real = "real images" if test.pairs is None else "real images, theirs by id"
    network = "FID by the oracle" if features.network == "oracle" else "FID by Inception"
    size = f" at {features.scaled_to or references.size} px" if references.url else ""
    return (
        f"{prompts.name}: {len(test.ids) // prompts.draws:,} captions{draws}; "
        f"{test.real.moments.count:,} {real}; {network}{size}"
    )


def _interval_text(settings: EvaluationSettings) -> str:
    if settings.prompts.draws > 1:
        return (
            f"95 % over {settings.prompts.draws} draws of the same captions: normal for means, Wilson's for "
            "proportions, else a jackknife that leaves out one draw of each"
        )
    return f"95 %: normal for means over captions, else a jackknife over {settings.groups} groups"


def _curve_records(
    contenders: Sequence[Contender], test: EvaluatedCaptions, choice: Choice | None, *, source: str
) -> dict[str, dict[str, Any]]:
    records = {}
    for contender in contenders:
        curve, table = test.curves[contender.name], test.tables[contender.name]
        points = [
            {
                "w": point.w,
                "evaluations": contender.sampler.evaluations(point.w, w_conditioned=table.identity["told_w"]),
                "seconds": seconds_per_image(table, source=source, w=point.w),
                **metrics_at(curve, point.w),
            }
            for point in curve.points
        ]
        best_w = None if choice is None else choice.best_w[contender.name]
        records[contender.name] = {**contender.to_values(), "best_w": best_w, "points": points}
    return records


def _compared_with(baseline: str, curves: Mapping[str, Curve]) -> Comparison:
    """The comparison of all other contenders with one."""
    base = curves[baseline]
    others = {name: curve for name, curve in curves.items() if name != baseline}
    return {
        "differences": {
            name: [
                {"w": point.w, **paired_differences(curve, base, w=point.w)}
                for point in curve.points
                if point.w in base.scales
            ]
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
