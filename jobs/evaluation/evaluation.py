"""Evaluates models and samplers by FID, KID and CLIP over guidance scales; all is computed from tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jobs.evaluation.caption_diversity import CaptionDiversity
from jobs.evaluation.caption_lists import CaptionList, check_enough, list_captions
from jobs.evaluation.captions import check_disjoint
from jobs.evaluation.curve_tables import EvaluatedCaptions, StartTable, TableMaker
from jobs.evaluation.floor import measure_floor
from jobs.evaluation.results import Comparison, EvaluationResults
from jobs.evaluation.settings import Contender, Criterion, EvaluationSettings, FidGap
from jobs.evaluation.tuning import Choice, choose
from jobs.evaluation.weight_files import check_weights
from jobs.runtime.versions import versions
from pipelines.ray_data.execution import Runner
from pipelines.sources.captions import captions_digest
from pipelines.stages.metric_networks import describe_features, describe_preferences, describe_scorer
from snapfusion.metrics.curves import (
    Curve,
    CurveError,
    clip_at_equal_fid,
    gap_closed,
    metrics_at,
    paired_differences,
)
from snapfusion.metrics.moments import Moments
from snapfusion.models.decoder import load_decoder
from snapfusion.models.load import load_prediction_type


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
        SourceError: if captions or their images cannot be read.
        ValueError: if captions for tuning are compared on, too, or weights or models are missing.
    """
    # What can be refused is refused before anything is generated, which may take days.
    check_weights(settings)
    diversity = None if settings.lpips is None else CaptionDiversity(settings.lpips)
    _check_models(settings, model=model)
    listed = list_captions(settings.prompts, settings.references)
    check_enough(listed, settings)
    maker = TableMaker(settings=settings, model=model, out=out, start=start, run=run)
    choice = _tune(maker, listed)
    contenders = settings.contenders if choice is None else choice.contenders
    test = maker.evaluate(contenders, listed=listed, name="references", diversity=diversity)
    curves = test.curves
    return {
        "protocol": _protocol(settings, test, diversity),
        "floor": measure_floor(maker, test),
        "tuning": None if choice is None else choice.record(),
        "tables": {name: table.lineage() for name, table in test.tables.items()},
        "curves": _curve_records(contenders, test, choice),
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


def _check_models(settings: EvaluationSettings, *, model: str) -> None:
    """Refuse models and decoders that are not there; weights of models are not read.

    Raises:
        ValueError: naming the first contender with one.
    """
    for contender in settings.contenders:
        try:
            load_prediction_type(contender.model or model)
            if contender.decoder is not None:
                load_decoder(contender.decoder)
        except ValueError as error:
            raise ValueError(f"contender {contender.name!r}: {error}") from None


def _tune(maker: TableMaker, compared: CaptionList) -> Choice | None:
    """Evaluate all contenders on the tuning captions, and choose; None without any."""
    settings = maker.settings
    if (tuning := settings.tuning) is None:
        return None
    listed = list_captions(tuning.prompts, tuning.references)
    names = (f"prompts {settings.prompts.name!r}", f"tuning.prompts {tuning.prompts.name!r}")
    check_disjoint(compared.rows, listed.rows, names=names)
    check_enough(listed, settings)
    evaluated = maker.evaluate(settings.contenders, listed=listed, name="tuning-references")
    return choose(settings.contenders, evaluated)


def _protocol(
    settings: EvaluationSettings, test: EvaluatedCaptions, diversity: CaptionDiversity | None
) -> dict[str, Any]:
    """Everything that a published metric must be quoted with."""
    judging, prompts, pairs = settings.samples.judging, settings.prompts, test.listed.pairs
    # A covariance of fewer images than features is singular, which makes FID too large: noted.
    moments = test.real.moments
    smallest = Moments(count=len(test.ids), mean=moments.mean, scatter=moments.scatter)
    notes = [
        f"{side}: {note}"
        for side, note in (("drawn", smallest.rank_warning()), ("reference", moments.rank_warning()))
        if note is not None
    ]
    if pairs is not None:
        notes += pairs.notes()
    return {
        "title": _title(settings, test),
        "captions": {
            "name": prompts.name,
            "url": prompts.url,
            "split": prompts.split,
            "draws": prompts.draws,
            "sha256": captions_digest(test.listed.rows),
            "listed": len(test.listed.once),
            "compared": len(test.ids) // prompts.draws,
            "without_image": None if pairs is None else pairs.without_image,
        },
        "reference": {
            **test.references.lineage(),
            **test.references.identity,
            "split": None if settings.references.url else settings.references.split,
            "compared": moments.count,
            "paired": pairs is not None,
            "without_caption": None if pairs is None else pairs.without_caption,
        },
        "features": describe_features(judging.features),
        "scorer": describe_scorer(judging.scorer),
        "preferences": describe_preferences(judging.preferences),
        "lpips": None if diversity is None else diversity.describe(),
        "drawing": settings.samples.drawing.to_values(),
        "dtype": settings.samples.device.dtype,
        "intervals": _interval_text(settings),
        "notes": notes,
    }


def _title(settings: EvaluationSettings, test: EvaluatedCaptions) -> str:
    """What stands in every chart: captions, real images, and how FID sees them."""
    prompts, references, features = settings.prompts, settings.references, settings.samples.judging.features
    draws = f", {prompts.draws} images of each" if prompts.draws > 1 else ""
    real = "real images" if test.listed.pairs is None else "real images, theirs by id"
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
    contenders: Sequence[Contender], test: EvaluatedCaptions, choice: Choice | None
) -> dict[str, dict[str, Any]]:
    records = {}
    for contender in contenders:
        curve = test.curves[contender.name]
        points = [
            {"w": point.w, **test.cost_of(contender, w=point.w), **metrics_at(curve, point.w)}
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
