"""Measure a miniature on held-out scenes: python -m jobs.measure_mini [--weights DIR] [--set key=value]."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from snapfusion.mini.measure import Figures, MiniMeasurement, measure
from snapfusion.mini.weights import WEIGHTS
from snapfusion.settings import SettingsError


def _show(part: str, figures: Figures) -> None:
    print(json.dumps({part: {name: round(value, 4) for name, value in figures.items()}}), flush=True)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jobs.measure_mini", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with sd/, scorer/ and oracle/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    arguments = parser.parse_args()
    try:
        settings = MiniMeasurement().with_values(arguments.set)
        print(settings.to_json())
        torch.set_num_threads(1)
        measure(settings, folder=arguments.weights, on_figures=_show)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
