"""Measure a miniature on held-out scenes: python -m jobs.measure_mini [--out FILE] [--set K=V].

With --out the results are saved in FILE, and a second run adds what is missing; a page beside it shows them.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from jobs.cli.job import run_with_settings
from jobs.evaluation.resumable_results import ResumableResults
from jobs.reports.mini_page import write_page
from jobs.runtime.exit_codes import exit_process
from snapfusion.metrics.intervals import Interval
from snapfusion.mini.measure import MetricIntervals, measure_mini
from snapfusion.mini.settings import MiniMeasurementSettings
from snapfusion.mini.weights import WEIGHTS, read_manifest
from snapfusion.settings import digest


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the measured weights and the file of the results."""
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with sd/, scorer/ and oracle/")
    parser.add_argument("--out", type=Path, help="file of the results, JSON")


def measure(settings: MiniMeasurementSettings, options: argparse.Namespace) -> None:
    """Measure what the file of the results lacks, and write its page."""
    torch.set_num_threads(1)
    identity = {"weights": _weights_digest(options.weights), "scenes": settings.scenes, "seed": settings.seed}
    results = ResumableResults(identity=identity, path=options.out)
    results.read()

    def print_and_save(part: str, figures: MetricIntervals) -> None:
        rounded = {name: [float(f"{end:.4g}") for end in ends] for name, ends in figures.items()}
        print(json.dumps({part: rounded}), flush=True)
        results.add(part, figures)

    measure_mini(settings, folder=options.weights, on_result=print_and_save, known=results.figures)
    if options.out is not None:
        figures = {
            part: {name: Interval(*ends) for name, ends in intervals.items()}
            for part, intervals in results.figures.items()
        }
        page = write_page(options.weights, options.out.with_suffix(".html"), figures=figures)
        print(f"measure_mini: {options.out}, shown in {page}")


def _weights_digest(folder: Path) -> str:
    """One hash of all weights in `folder`."""
    files = read_manifest(folder)["files"]
    return digest({name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")})


main = partial(
    run_with_settings, "measure_mini", MiniMeasurementSettings(), measure, about=__doc__, options=add_options
)

if __name__ == "__main__":
    exit_process(main())
