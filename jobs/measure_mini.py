"""Measure a miniature on held-out scenes: python -m jobs.measure_mini [--out FILE] [--set K=V].

With --out the results are saved in FILE, and a second run adds what is missing; a page beside it shows them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from jobs.evaluation.resumable_results import ResumableResults
from jobs.reports.mini_page import write_page
from jobs.runtime.arguments import OneLineParser
from jobs.runtime.exit_codes import exit_process, run_guarded
from snapfusion.metrics.intervals import Interval
from snapfusion.mini.measure import MetricIntervals, measure_mini
from snapfusion.mini.settings import MiniMeasurementSettings
from snapfusion.mini.weights import WEIGHTS, read_manifest
from snapfusion.settings import digest


def _weights_digest(folder: Path) -> str:
    """One hash of all weights in `folder`."""
    files = read_manifest(folder)["files"]
    return digest({name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")})


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m jobs.measure_mini`."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = OneLineParser(prog="python -m jobs.measure_mini", description=about)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with sd/, scorer/ and oracle/")
    parser.add_argument("--out", type=Path, help="file of the results, JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")

    def work() -> None:
        options = parser.options(argv)
        settings = MiniMeasurementSettings().with_values(options.set)
        print(settings.to_json())
        torch.set_num_threads(1)
        identity = {
            "weights": _weights_digest(options.weights),
            "scenes": settings.scenes,
            "seed": settings.seed,
        }
        results = ResumableResults(identity=identity, path=options.out)
        results.read()

        def on_result(part: str, figures: MetricIntervals) -> None:
            rounded = {name: [_rounded(x) for x in ends] for name, ends in figures.items()}
            print(json.dumps({part: rounded}), flush=True)
            results.add(part, figures)

        measure_mini(settings, folder=options.weights, on_result=on_result, known=results.figures)
        if options.out is not None:
            figures = {
                part: {name: Interval(*ends) for name, ends in intervals.items()}
                for part, intervals in results.figures.items()
            }
            page = write_page(options.weights, options.out.with_suffix(".html"), figures=figures)
            print(f"measure_mini: {options.out}, shown in {page}")

    return run_guarded("measure_mini", work)


if __name__ == "__main__":
    exit_process(main())
