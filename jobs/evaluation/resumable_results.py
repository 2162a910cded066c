"""Figures as they are ready, kept in a file, so that a measurement that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapfusion.settings import differences


@dataclass
class ResumableResults:
    """The figures so far, in a file if there is one.

    Attributes:
        identity: what they are of, as JSON values: weights, scenes, noise.
        path: of the file; None for none.
        figures: numbers by name, by part.
    """

    identity: Mapping[str, Any]
    path: Path | None
    figures: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)

    def read(self) -> None:
        """Take in what the file holds; `ValueError` if that is of something else."""
        if self.path is None or not self.path.exists():
            return
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
            identity, parts = told["identity"], told["figures"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--out: {self.path} is no file of figures ({error!r}); give another file"
            ) from None
        if identity != self.identity:
            apart = "; ".join(differences(identity, dict(self.identity)))
            raise ValueError(
                f"--out: {self.path} holds figures of something else ({apart}); give another file"
            )
        self.figures = {
            part: {name: tuple(numbers) for name, numbers in figures.items()}
            for part, figures in parts.items()
        }

    def keep(self, part: str, figures: Mapping[str, Sequence[float]]) -> None:
        """Add a part's figures."""
        self.figures[part] = {name: tuple(numbers) for name, numbers in figures.items()}
        self.write()

    def write(self, **conclusions: Any) -> None:  # noqa: ANN401 - JSON values
        """Write the file, with what follows from the figures beside them."""
        if self.path is None:
            return
        told = {"identity": self.identity, "figures": self.figures, **conclusions}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(self.path)
