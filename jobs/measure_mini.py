"""Measure a miniature on held-out scenes: python -m jobs.measure_mini [--out FILE] [--set K=V].

With --out the figures are kept in FILE, and a second run adds what they lack; a page beside it shows them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jobs.exits import guarded, leave
from jobs.mini_page import write_page
from snapfusion.metrics.intervals import Interval
from snapfusion.mini.measure import Figures, MiniMeasurement, measure
from snapfusion.mini.weights import WEIGHTS, read_manifest
from snapfusion.settings import digest


@dataclass
class _Record:
    """The figures so far, in a file if there is one.

    Attributes:
        identity: what they are of: the weights, the scenes and the noise.
        path: of the file; None for none.
        figures: by part.
    """

    identity: dict[str, Any]
    path: Path | None
    figures: dict[str, dict[str, Interval]] = field(default_factory=dict)

    def read(self) -> None:
        """Take in what the file holds; `ValueError` if that is of something else."""
        if self.path is None or not self.path.exists():
            return
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--out: {self.path} is no file of figures ({error}); give another") from None
        if told["identity"] != self.identity:
            raise ValueError(
                f"--out: {self.path} holds figures of {told['identity']}, these are of {self.identity}; "
                "give another file"
            )
        self.figures = {
            part: {name: Interval(*ends) for name, ends in figures.items()}
            for part, figures in told["figures"].items()
        }

    def gather(self, part: str, figures: Figures) -> None:
        """Print a part's figures and keep them."""
        self.figures[part] = figures
        print(
            json.dumps({part: {name: [_rounded(x) for x in ends] for name, ends in figures.items()}}),
            flush=True,
        )
        if self.path is not None:
            told = {"identity": self.identity, "figures": self.figures}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)


def _weights(folder: Path) -> str:
    """One hash for all the weights in `folder`."""
    files = read_manifest(folder)["files"]
    return digest({name: told["sha256"] for name, told in files.items() if name.endswith(".safetensors")})


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m jobs.measure_mini", description=about)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with sd/, scorer/ and oracle/")
    parser.add_argument("--out", type=Path, help="file of figures, JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    options = parser.parse_args(argv)

    def work() -> None:
        settings = MiniMeasurement().with_values(options.set)
        print(settings.to_json())
        torch.set_num_threads(1)
        identity = {
            "weights": _weights(options.weights),
            "scenes": settings.scenes,
            "seed": settings.seed,
        }
        record = _Record(identity=identity, path=options.out)
        record.read()
        measure(settings, folder=options.weights, gather=record.gather, known=record.figures)
        if options.out is not None:
            page = write_page(options.weights, options.out.with_suffix(".html"), figures=record.figures)
            print(f"measure_mini: {options.out}, shown in {page}")

    return guarded("measure_mini", work)


if __name__ == "__main__":
    leave(main())
