"""Hold a robust training of the miniature to a plain one: what is lost without blocks. SnapFusion Fig. 5.

    python -m jobs.measure_robustness PLAIN ROBUST --out FOLDER [--set K=V]

FOLDER/robustness.json   figures without each group of blocks, what is lost, and the two models' ratio
FOLDER/robustness.png    pictures of both models, whole and without each group
FOLDER/robustness.html   both as a page

A second run adds what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jobs.evaluation.resumable_results import ResumableResults
from jobs.reports.robustness_page import render_robustness, sample_sheet, sheet_image
from jobs.runtime.arguments import OneLineParser
from jobs.runtime.exit_codes import exit_process, run_guarded
from jobs.runtime.progress import StatusLine, format_duration
from snapfusion.metrics.intervals import Interval
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.robustness import (
    METRIC_NAMES,
    WHOLE,
    LossComparison,
    Metric,
    PartMetrics,
    RobustnessPart,
    RobustnessResults,
    check_comparable,
    groups_of,
    measure_robustness,
    robustness_parts,
)
from snapfusion.mini.settings import RobustnessSettings
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.load import load

_NAME = "robustness"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = OneLineParser(prog="python -m jobs.measure_robustness", description=about)
    parser.add_argument("plain", help="a miniature trained plainly: a folder, a URL, mini or mini-v")
    parser.add_argument("robust", help="one trained robustly as long, of the same blocks")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")

    def work() -> None:
        options = parser.options(argv)
        settings = RobustnessSettings().with_values(options.set)
        print(settings.to_json())
        torch.set_num_threads(1)
        sources = {"plain": options.plain, "robust": options.robust}
        models = {name: load(source) for name, source in sources.items()}
        check_comparable(models)
        measure(settings, models=models, folder=options.out)

    return run_guarded("measure_robustness", work)


def measure(settings: RobustnessSettings, *, models: Mapping[str, Bundle], folder: Path) -> None:
    """Measure what `folder` lacks, and write what follows from all of it."""
    oracle = load_oracle()
    record = ResumableResults(
        identity={
            "models": {name: model.fingerprint() for name, model in models.items()},
            "oracle": weight_hash(oracle),
            "settings": settings.to_values(),
        },
        path=folder / f"{_NAME}.json",
    )
    record.read()
    progress = _Progress(parts=len(robustness_parts(settings, models)), known=len(record.figures))

    def gather(part: RobustnessPart, reading: PartMetrics) -> None:
        record.keep(str(part), {str(figure): means for figure, means in reading.items()})
        progress.say(len(record.figures))

    measure_robustness(settings, models=models, oracle=oracle, gather=gather, known=record.figures)
    readings = RobustnessResults(
        of={part: _reading(figures) for part, figures in record.figures.items()},
        groups=tuple(groups_of(models["plain"])),
        seeds=settings.seeds,
    )
    told = {name: source_label(model) for name, model in models.items()}
    record.write(models=told, summary=summary_of(readings))
    sheet = sample_sheet(settings, models=models)
    sheet_image(sheet).save(folder / f"{_NAME}.png")
    page = folder / f"{_NAME}.html"
    text = render_robustness(settings=settings, sources=told, readings=readings, sheet=sheet)
    page.write_text(text, encoding="utf-8")
    print(_table(readings))
    print(f"measure_robustness: {record.path}, shown in {page}")


class _Progress:
    """Says how many parts are measured, and how long the rest will take."""

    def __init__(self, *, parts: int, known: int) -> None:
        self._line, self._started = StatusLine(), time.monotonic()
        self._parts, self._known = parts, known

    def say(self, done: int) -> None:
        taken = (time.monotonic() - self._started) / (done - self._known)
        left = format_duration((self._parts - done) * taken)
        self._line.show(f"{done} of {self._parts} parts, {left} left", last=done == self._parts)


def source_label(model: Bundle) -> str:
    """What a model is called in a file: as it was given, but a place on this machine by its weights."""
    source = model.source
    if Path(source).is_absolute() or source.startswith("file:"):
        return f"UNet {model.fingerprint()['unet'][:12]}"
    return source


def summary_of(readings: RobustnessResults) -> dict[str, Any]:
    """Figures with their intervals and what is lost, as JSON values; `null` for a ratio that says nothing."""
    return {
        figure: {
            "value": {
                model: {
                    group: readings.value(figure, model=model, group=group)
                    for group in (WHOLE, *readings.groups)
                }
                for model in ("plain", "robust")
            },
            "lost": {group: asdict(readings.lost(figure, group=group)) for group in readings.groups},
            "lost_on_average": asdict(readings.lost_on_average(figure)),
            "below_plain_on_average": asdict(readings.below_plain(figure)),
            "lost_on_average_by_seed": {
                str(seed): asdict(readings.lost_on_average(figure, seeds=[seed])) for seed in readings.seeds
            },
        }
        for figure in METRIC_NAMES
    }


def _reading(figures: Mapping[str, tuple[float, ...]]) -> PartMetrics:
    return {figure: figures[figure] for figure in METRIC_NAMES}


def _table(readings: RobustnessResults) -> str:
    return "\n".join(line for figure in METRIC_NAMES for line in _lines(readings, figure))


def _lines(readings: RobustnessResults, figure: Metric) -> list[str]:
    head = {"attributes": "attributes right, of 1", "detail": "detail, PSNR in dB"}[figure]
    lines = [f"{head:24}{'plain':>9}{'robust':>9}{'plain loses':>13}{'robust loses':>14}  robust / plain"]
    for group in (WHOLE, *readings.groups):
        values = (readings.value(figure, model=model, group=group).value for model in ("plain", "robust"))
        row = f"  {group:22}" + "".join(f"{value:9.3f}" for value in values)
        lines.append(row if group == WHOLE else row + _losses(readings.lost(figure, group=group)))
    lines.append(f"  {'mean over groups':22}{'':18}{_losses(readings.lost_on_average(figure))}")
    lines += [
        f"  {f'seed {seed}':22}{'':18}{_losses(readings.lost_on_average(figure, seeds=[seed]))}"
        for seed in readings.seeds
    ]
    lines.append(f"  {'below whole plain':22}{'':18}{_losses(readings.below_plain(figure))}")
    return lines


def _losses(lost: LossComparison) -> str:
    ratio = "plain loses nothing that shows" if lost.ratio is None else _format_interval(lost.ratio)
    return f"{lost.plain.value:z13.3f}{lost.robust.value:z14.3f}  {ratio}"


def _format_interval(ends: Interval) -> str:
    return f"{ends.value:.2f} ({ends.low:.2f} to {ends.high:.2f})"


if __name__ == "__main__":
    exit_process(main())
