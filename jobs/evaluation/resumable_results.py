"""Results saved in a file as they come, so that a stopped measurement resumes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapfusion.settings import differences


@dataclass
class ResumableResults:
    """Results so far, in a file if there is one.

    Attributes:
        identity: of what is measured, as JSON values: weights, scenes, noise.
        path: of the file; None for none.
        figures: numbers by name, by part.
    """

    identity: Mapping[str, Any]
    path: Path | None
    figures: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)

    def read(self) -> None:
        """Load the file, if it exists.

        Raises:
            ValueError: if it is malformed, or holds results of something else.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            identity, parts = record["identity"], record["figures"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--out: {self.path} is no file of results ({error!r}); name another") from None
        if identity != self.identity:
            differing = "; ".join(differences(identity, dict(self.identity)))
            raise ValueError(
                f"--out: {self.path} holds results of something else ({differing}); name another"
            )
        self.figures = {
            part: {name: tuple(numbers) for name, numbers in figures.items()}
            for part, figures in parts.items()
        }

    def add(self, part: str, figures: Mapping[str, Sequence[float]]) -> None:
        """Add the results of a part, and save."""
        self.figures[part] = {name: tuple(numbers) for name, numbers in figures.items()}
        self.save()

    def save(self, **conclusions: Any) -> None:  # noqa: ANN401 - JSON values
        """Write the file, with conclusions from the results beside them."""
        if self.path is None:
            return
        record = {"identity": self.identity, "figures": self.figures, **conclusions}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced atomically: a run that is killed while writing keeps its earlier results.
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(self.path)
