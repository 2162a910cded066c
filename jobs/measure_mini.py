"""Measure a miniature on held-out scenes: python -m jobs.measure_mini [--weights DIR] [--set key=value]."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from jobs.exits import guarded, leave
from snapfusion.mini.measure import Figures, MiniMeasurement, measure
from snapfusion.mini.weights import WEIGHTS


def _show(part: str, figures: Figures) -> None:
    print(json.dumps({part: {name: round(value, 4) for name, value in figures.items()}}), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.measure_mini", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with sd/, scorer/ and oracle/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    options = parser.parse_args(argv)

    def work() -> None:
        settings = MiniMeasurement().with_values(options.set)
        print(settings.to_json())
        torch.set_num_threads(1)
        measure(settings, folder=options.weights, on_figures=_show)

    return guarded("measure_mini", work)


if __name__ == "__main__":
    leave(main())
