"""Compare a robust miniature with a plain one by what they lose without blocks. SnapFusion Fig. 5.

    python -m jobs.measure_robustness PLAIN ROBUST --out FOLDER [--set K=V]

FOLDER/robustness.json   metrics without each group of blocks, losses, and the two models' ratio
FOLDER/robustness.png    images by both models, whole and without each group
FOLDER/robustness.html   both as a page

A second run adds what is missing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.cli.verb import Options, settings_verb
from jobs.evaluation.resumable_results import ResumableResults
from jobs.runtime.logs import logger
from jobs.runtime.progress import StatusLine, format_duration
from snapfusion.mini.settings import RobustnessSettings

if TYPE_CHECKING:
    from snapfusion.mini import robustness


_NAME = "robustness"


OPTIONS = [
    click.Argument(["plain"]),
    click.Argument(["robust"]),
    click.Option(["--out"], type=Path, required=True, help="folder of the results"),
]
"""A miniature without robust training (a folder, a URL, mini or mini-v), one trained robustly for as long."""


def measure(settings: RobustnessSettings, options: Options) -> None:
    """Measure what the folder lacks, and write its summary, image and page."""
    import torch

    from jobs.evaluation.robustness import source_label, summary_of, table_lines
    from jobs.reports.robustness_page import render_robustness, sample_sheet, sheet_image
    from snapfusion.mini import robustness
    from snapfusion.mini.oracle import load_oracle
    from snapfusion.models.bundle import weight_hash
    from snapfusion.models.load import load

    torch.set_num_threads(1)
    models, folder = {"plain": load(options.plain), "robust": load(options.robust)}, options.out
    robustness.check_comparable(models)
    oracle = load_oracle()
    results = ResumableResults(
        identity={
            "models": {name: model.fingerprint() for name, model in models.items()},
            "oracle": weight_hash(oracle),
            "settings": settings.to_values(),
        },
        path=folder / f"{_NAME}.json",
    )
    results.read()
    progress = _Progress(total=len(robustness.robustness_parts(settings, models)), done=len(results.figures))

    def on_result(part: robustness.RobustnessPart, metrics: robustness.PartMetrics) -> None:
        results.add(str(part), {str(metric): means for metric, means in metrics.items()})
        progress.show(len(results.figures))

    robustness.measure_robustness(
        settings, models=models, oracle=oracle, on_result=on_result, known=results.figures
    )
    readings = robustness.RobustnessResults(
        of={
            part: {metric: figures[metric] for metric in robustness.METRIC_NAMES}
            for part, figures in results.figures.items()
        },
        groups=tuple(robustness.groups_of(models["plain"])),
        seeds=settings.seeds,
    )
    labels = {name: source_label(model) for name, model in models.items()}
    results.save(models=labels, summary=summary_of(readings))
    sheet = sample_sheet(settings, models=models)
    sheet_image(sheet).save(folder / f"{_NAME}.png")
    page = folder / f"{_NAME}.html"
    text = render_robustness(settings=settings, sources=labels, readings=readings, sheet=sheet)
    page.write_text(text, encoding="utf-8")
    logger.info("\n".join(table_lines(readings)))
    logger.info(f"measure_robustness: {results.path}, shown in {page}")


class _Progress:
    """Prints how many parts are measured, and the time left."""

    def __init__(self, *, total: int, done: int) -> None:
        self._line, self._started = StatusLine(), time.monotonic()
        self._total, self._resumed_at = total, done

    def show(self, done: int) -> None:
        seconds = (time.monotonic() - self._started) / (done - self._resumed_at)
        left = format_duration((self._total - done) * seconds)
        self._line.show(f"{done} of {self._total} parts, {left} left", last=done == self._total)


main = settings_verb("measure_robustness", RobustnessSettings(), measure, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
