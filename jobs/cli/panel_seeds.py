"""Averages the lines of a panel over training seeds, with intervals over seeds and images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from jobs.evaluation.results import Comparison, EvaluationResults
from jobs.recipes.ablation import Panel, contender_name
from snapfusion.metrics import intervals
from snapfusion.metrics.intervals import Interval


def over_seeds(panel: Panel, *, seeds: Sequence[int], results: EvaluationResults) -> Iterator[dict[str, Any]]:
    """A record of each line; the lines of a family are one, of the contenders that tuning has chosen."""
    for label in dict.fromkeys(line.label for line in panel.lines):
        lines = [line for line in panel.lines if line.label == label]
        is_student = lines[0].variant is not None
        contenders = [
            name
            for seed in (seeds if is_student else seeds[:1])
            for line in lines
            if (name := contender_name(line, seed)) in results["curves"]
        ]
        curves = [results["curves"][name] for name in contenders]
        yield {
            "name": label,
            "student": is_student,
            "contenders": contenders,
            "points": [
                _average(points) for points in zip(*(curve["points"] for curve in curves), strict=True)
            ],
            "best": _at_best_guidance(curves),
            "differences": _differences(panel, contenders, results) if is_student else {},
        }


def decide(difference: Interval) -> str:
    """Whether a difference is "higher" or "lower" than zero, or "undecided" because its interval holds it."""
    if difference.low > 0.0:
        return "higher"
    return "lower" if difference.high < 0.0 else "undecided"


def _at_best_guidance(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The metrics at each seed's own guidance; None without tuning."""
    if any(curve["best_w"] is None for curve in curves):
        return None
    points = [next(p for p in curve["points"] if p["w"] == curve["best_w"]) for curve in curves]
    return {**_average(points), "w": [point["w"] for point in points]}


def _average(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A point with the mean over seeds of each metric."""
    average: dict[str, Any] = {"w": points[0]["w"], "evaluations": points[0]["evaluations"]}
    seconds = [point["seconds"] for point in points if point.get("seconds") is not None]
    if len(seconds) == len(points):
        average["seconds"] = mean(seconds)
    for name, value in points[0].items():
        if isinstance(value, Interval):
            average[name] = intervals.over_seeds([point[name] for point in points])
    return average


def _differences(
    panel: Panel, contenders: Sequence[str], results: EvaluationResults
) -> dict[str, dict[str, dict[str, Any]]]:
    """By reference and metric: the mean difference over guidance and seeds, and what its interval decides."""
    compared: dict[str, Comparison] = {panel.baseline: results, panel.many: results["against"][panel.many]}
    return {
        reference: _decided([comparison["differences"][name] for name in contenders])
        for reference, comparison in compared.items()
    }


def _decided(by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    names = [name for name, value in by_seed[0][0].items() if isinstance(value, Interval)]
    # Averaged over guidance first, because points of one student are no independent evidence.
    means = {
        name: intervals.over_seeds(
            [intervals.average([point[name] for point in points]) for points in by_seed]
        )
        for name in names
    }
    return {name: {"difference": mean, "is": decide(mean)} for name, mean in means.items()}
