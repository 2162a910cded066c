"""Summarizes what a plain and a robust model lose without groups of blocks. SnapFusion Fig. 5."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from snapfusion.metrics.intervals import Interval
from snapfusion.mini.robustness import METRIC_NAMES, WHOLE, LossComparison, Metric, RobustnessResults
from snapfusion.models.bundle import Bundle


def source_label(model: Bundle) -> str:
    """A model's source, as results record it; a path of this machine is replaced by the UNet's hash."""
    source = model.source
    if Path(source).is_absolute() or source.startswith("file:"):
        return f"UNet {model.fingerprint()['unet'][:12]}"
    return source


def summary_of(results: RobustnessResults) -> dict[str, Any]:
    """Metrics and losses with their intervals, as JSON values; null for a ratio without a meaning."""
    return {
        metric: {
            "value": {
                model: {
                    group: results.value(metric, model=model, group=group)
                    for group in (WHOLE, *results.groups)
                }
                for model in ("plain", "robust")
            },
            "lost": {group: asdict(results.lost(metric, group=group)) for group in results.groups},
            "lost_on_average": asdict(results.lost_on_average(metric)),
            "below_plain_on_average": asdict(results.below_plain(metric)),
            "lost_on_average_by_seed": {
                str(seed): asdict(results.lost_on_average(metric, seeds=[seed])) for seed in results.seeds
            },
        }
        for metric in METRIC_NAMES
    }


def table_lines(results: RobustnessResults) -> list[str]:
    """The results as a table."""
    return [line for metric in METRIC_NAMES for line in _metric_lines(results, metric)]


def _metric_lines(results: RobustnessResults, metric: Metric) -> Iterator[str]:
    head = {"attributes": "attributes right, of 1", "detail": "detail, PSNR in dB"}[metric]
    yield f"{head:24}{'plain':>9}{'robust':>9}{'plain loses':>13}{'robust loses':>14}  robust / plain"
    for group in (WHOLE, *results.groups):
        values = (results.value(metric, model=model, group=group).value for model in ("plain", "robust"))
        row = f"  {group:22}" + "".join(f"{value:9.3f}" for value in values)
        yield row if group == WHOLE else row + _losses(results.lost(metric, group=group))
    means = {
        "mean over groups": results.lost_on_average(metric),
        **{f"seed {seed}": results.lost_on_average(metric, seeds=[seed]) for seed in results.seeds},
        "below whole plain": results.below_plain(metric),
    }
    for label, lost in means.items():
        yield f"  {label:22}{'':18}{_losses(lost)}"


def _losses(lost: LossComparison) -> str:
    ratio = "no significant loss of plain" if lost.ratio is None else _format_interval(lost.ratio)
    return f"{lost.plain.value:z13.3f}{lost.robust.value:z14.3f}  {ratio}"


def _format_interval(interval: Interval) -> str:
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
