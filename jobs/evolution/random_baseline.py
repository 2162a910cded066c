"""Whether an evolved architecture is better than chance: others of its latency, trained and judged as it is.

Every architecture begins with the robust model's weights and takes the same training, without blocks left
out; so nothing differs but which blocks there are.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jobs.evaluation.evaluation import StartTable, evaluate
from jobs.evaluation.settings import Contender, EvaluationSettings
from jobs.evaluation.timing import benchmark_of, unet_inputs
from jobs.evolution.settings import RandomBaselineSettings
from jobs.training.initial_weights import own_architecture, with_architecture
from jobs.training.progress_channel import OnReport
from jobs.training.velocity import finetune_vpred
from pipelines.ray_data.execution import Runner
from snapfusion.evolution.latency import LatencyTable
from snapfusion.evolution.random_architectures import random_architecture
from snapfusion.evolution.stopwatch import Timing, time_in_turns
from snapfusion.models.architecture import Architecture
from snapfusion.models.unet import build_unet

EVOLVED = "evolved"


@dataclass(frozen=True, kw_only=True)
class RandomBaseline:
    """An evolved architecture and those it is compared with.

    Attributes:
        settings: how.
        model: the source of the robust model.
        evolved: the architecture.
        table: by which time is told.
        latents_url: of the table that training reads.
        out: folder or URL.
    """

    settings: RandomBaselineSettings
    model: str
    evolved: Architecture
    table: LatencyTable
    latents_url: str
    out: str

    def architectures(self) -> dict[str, Architecture]:
        """The evolved one, and those by chance, by name.

        Raises:
            ValueError: if chance gives none of that time.
        """
        origin, ms = own_architecture(self.model), self.table.predict_ms(self.evolved)
        slack = ms * self.settings.slack
        by_name = {
            f"chance-{number}": random_architecture(
                origin,
                table=self.table,
                low_ms=ms - slack,
                high_ms=ms + slack,
                seed=self.settings.seed + number,
            )
            for number in range(self.settings.count)
        }
        return {EVOLVED: self.evolved, **by_name}

    def compare(self, *, start: StartTable, run: Runner, on_report: OnReport) -> dict[str, Any]:
        """Train, judge and time them; what is trained or drawn already is not done again.

        Args:
            start: told of each table that is about to be made.
            run: what sends units through the stages.
            on_report: told of the progress of training.

        Returns:
            What was done ("settings"), each architecture's figures ("architectures"), and at each guidance
            the evolved one's beside the median of the others ("readings"), as JSON values.
        """
        architectures = self.architectures()
        trained = {
            name: self._train(name, architecture, on_report=on_report)
            for name, architecture in architectures.items()
        }
        results = evaluate(
            self._evaluation(architectures), model=self.model, out=self.out, start=start, run=run
        )
        times = self._times(architectures)
        told = {
            name: {
                "architecture": architecture.to_values(),
                "predicted_ms": self.table.predict_ms(architecture),
                "measured": times[name].to_values(),
                "loss": trained[name]["evaluation"]["loss"],
                "points": results["curves"][name]["points"],
            }
            for name, architecture in architectures.items()
        }
        return {
            "settings": self.settings.training.deciding(),
            "latency": {"setting": self.table.setup.to_values(), "date": self.table.date},
            "protocol": results["protocol"],
            "architectures": told,
            "differences": results["differences"],
            "readings": [_reading(told, number) for number in range(len(self.settings.evaluation.guidance))],
        }

    def _train(self, name: str, architecture: Architecture, *, on_report: OnReport) -> dict[str, Any]:
        first = with_architecture(self.model, architecture, url=f"{self.out}/first/{name}")
        return finetune_vpred(
            self.settings.training,
            model=first,
            latents_url=self.latents_url,
            out_url=f"{self.out}/trained/{name}",
            further=True,
            on_report=on_report,
        )

    def _evaluation(self, names: Iterable[str]) -> EvaluationSettings:
        contenders = tuple(
            Contender(name=name, model=f"{self.out}/trained/{name}", sampler=self.settings.sampler)
            for name in names
        )
        values = {"contenders": contenders, "baseline": EVOLVED, "also_against": (), "gaps": ()}
        return self.settings.evaluation.model_copy(update=values)

    def _times(self, architectures: Mapping[str, Architecture]) -> dict[str, Timing]:
        timing = self.settings.timing
        torch.set_num_threads(timing.threads)
        tokens = self.table.dimensions.tokens
        runs = {
            name: benchmark_of(timing, build_unet(one).eval(), unet_inputs(timing, one, tokens=tokens))
            for name, one in architectures.items()
        }
        return time_in_turns(runs, turns=timing.turns)


COMPARED_METRICS = {"clip": 1.0, "fid": -1.0, "all_attributes": 1.0}
"""What is compared, by its name in an evaluation, and whether more of it is better."""


def _reading(told: Mapping[str, Any], number: int) -> dict[str, Any]:
    """At one guidance: the evolved one's figures, the others' median, and how many of them are worse."""
    points = {name: one["points"][number] for name, one in told.items()}
    others = [name for name in told if name != EVOLVED]
    found: dict[str, Any] = {"w": points[EVOLVED]["w"]}
    for figure, sign in COMPARED_METRICS.items():
        if figure in points[EVOLVED]:
            mine = points[EVOLVED][figure][0]
            theirs = [points[name][figure][0] for name in others]
            found[figure] = {
                "evolved": mine,
                "median": statistics.median(theirs),
                "best": max(theirs, key=lambda value: sign * value),
                "worse": sum(sign * value < sign * mine for value in theirs),
            }
    losses = [told[name]["loss"] for name in others]
    found["loss"] = {"evolved": told[EVOLVED]["loss"], "median": statistics.median(losses)}
    return found
