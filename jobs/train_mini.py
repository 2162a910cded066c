"""Train the miniature from its seed: python -m jobs.train_mini --out DIR [--set key=value] [--dry-run]."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from snapfusion.mini.training.recipe import train
from snapfusion.mini.training.settings import MiniTraining
from snapfusion.settings import SettingsError

_REPORT_SECONDS = 10.0


@dataclass
class ProgressLines:
    """Prints a stage's step, loss, rate and time left, every ten seconds and at its end."""

    stage: str = ""
    started: float = 0.0
    first: int = 0
    printed: float = field(default=0.0)

    def __call__(self, stage: str, step: int, steps: int, loss: float) -> None:
        """After each step."""
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started, self.first, self.printed = stage, now, step, now
        elif now - self.printed >= _REPORT_SECONDS or step == steps:
            rate = (step - self.first) / (now - self.started)
            left = (steps - step) / rate
            print(
                f"{stage} {step}/{steps}  loss {loss:.4f}  {rate:.1f} steps/s  {left:.0f} s left", flush=True
            )
            self.printed = now


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train_mini", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints/ and weights/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and stop")
    arguments = parser.parse_args()
    try:
        settings = MiniTraining().with_values(arguments.set)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(settings.to_json())
    if arguments.dry_run:
        return 0
    torch.set_num_threads(1)
    try:
        train(settings, folder=arguments.out, on_progress=ProgressLines())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"weights: {arguments.out / 'weights'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
