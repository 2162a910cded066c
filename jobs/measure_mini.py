"""Measure a miniature on held-out scenes: python -m jobs.measure_mini [--out FILE] [--set K=V].

With --out the results are saved in FILE, and a second run adds what is missing; a page beside it shows them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.cli.verb import Options, settings_verb
from jobs.evaluation.resumable_results import ResumableResults
from jobs.runtime.logs import logger
from snapfusion.mini.settings import MiniMeasurementSettings
from snapfusion.mini.weights import WEIGHTS, read_manifest
from snapfusion.settings import digest

if TYPE_CHECKING:
    from snapfusion.mini.measure import MetricIntervals


OPTIONS = [
    click.Option(["--weights"], type=Path, default=WEIGHTS, help="folder with sd/, scorer/ and oracle/"),
    click.Option(["--out"], type=Path, help="file of the results, JSON"),
]


def measure(settings: MiniMeasurementSettings, options: Options) -> None:
    """Measure what the file of the results lacks, and write its page."""
    import torch

    from jobs.reports.mini_page import write_page
    from snapfusion.metrics.intervals import Interval
    from snapfusion.mini.measure import measure_mini

    torch.set_num_threads(1)
    identity = {
        "weights": _weights_digest(options.weights),
        "scenes": settings.scenes,
        "split": settings.split,
        "seed": settings.seed,
    }
    results = ResumableResults(identity=identity, path=options.out)
    results.read()

    def print_and_save(part: str, figures: MetricIntervals) -> None:
        rounded = {name: [float(f"{end:.4g}") for end in ends] for name, ends in figures.items()}
        logger.info(json.dumps({part: rounded}))
        results.add(part, figures)

    measure_mini(settings, folder=options.weights, on_result=print_and_save, known=results.figures)
    if options.out is not None:
        figures = {
            part: {name: Interval(*ends) for name, ends in intervals.items()}
            for part, intervals in results.figures.items()
        }
        page = write_page(options.weights, options.out.with_suffix(".html"), figures=figures)
        logger.info(f"measure_mini: {options.out}, shown in {page}")


def _weights_digest(folder: Path) -> str:
    """One hash of all weights in `folder`."""
    files = read_manifest(folder)["files"]
    return digest({name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")})


main = settings_verb("measure_mini", MiniMeasurementSettings(), measure, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
