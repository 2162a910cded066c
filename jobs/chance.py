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
from pydantic import Field, PositiveFloat, PositiveInt

from jobs.evaluation import Contender, Evaluation, Start, evaluate
from jobs.finetune_vpred import VpredSettings, finetune_vpred
from jobs.first_weights import own_architecture, with_architecture
from jobs.reports import OnReport
from jobs.timing import TimingSettings
from pipelines.execution import Runner
from pipelines.stages.sample import Sampler
from snapfusion.evolution.chance import by_chance
from snapfusion.evolution.latency import LatencyTable
from snapfusion.evolution.stopwatch import Times, take_turns
from snapfusion.models.architecture import Architecture
from snapfusion.models.unet import build
from snapfusion.settings import Settings

EVOLVED = "evolved"


class ChanceSettings(Settings):
    """Against how many, and how all of them are trained, judged and timed.

    Attributes:
        count: architectures by chance.
        slack: by how much their time may differ from the evolved one's by the table, as a share of it.
        seed: of the draws.
        training: of each, from the robust model's weights.
        sampler: solver and steps.
        evaluation: guidance, captions, real pictures and judges; the contenders are these architectures.
        timing: how their UNets are timed, in turns.
    """

    count: PositiveInt = 10
    slack: PositiveFloat = Field(0.03, lt=1.0)
    seed: int = Field(0, ge=0)
    training: VpredSettings = VpredSettings()
    sampler: Sampler = Sampler(steps=8)
    evaluation: Evaluation = Evaluation(guidance=(2.0, 4.0))
    timing: TimingSettings = TimingSettings()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An evolved architecture and those it is compared with.

    Attributes:
        settings: how.
        model: the source of the robust model.
        evolved: the architecture.
        table: by which time is told.
        latents_url: of the table that training reads.
        out: folder or URL.
    """

    settings: ChanceSettings
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
            f"chance-{number}": by_chance(
                origin,
                table=self.table,
                low_ms=ms - slack,
                high_ms=ms + slack,
                seed=self.settings.seed + number,
            )
            for number in range(self.settings.count)
        }
        return {EVOLVED: self.evolved, **by_name}

    def compare(self, *, start: Start, run: Runner, on_report: OnReport) -> dict[str, Any]:
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
            "latency": {"setting": self.table.setting.to_values(), "date": self.table.date},
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

    def _evaluation(self, names: Iterable[str]) -> Evaluation:
        contenders = tuple(
            Contender(name=name, model=f"{self.out}/trained/{name}", sampler=self.settings.sampler)
            for name in names
        )
        values = {"contenders": contenders, "baseline": EVOLVED, "also_against": (), "gaps": ()}
        return self.settings.evaluation.model_copy(update=values)

    def _times(self, architectures: Mapping[str, Architecture]) -> dict[str, Times]:
        timing = self.settings.timing
        torch.set_num_threads(timing.threads)
        tokens = self.table.frame.tokens
        runs = {
            name: timing.ready(build(one).eval(), timing.inputs_of(one, tokens=tokens))
            for name, one in architectures.items()
        }
        return take_turns(runs, turns=timing.turns)


FIGURES = {"clip": 1.0, "fid": -1.0, "all_attributes": 1.0}
"""What is compared, by its name in an evaluation, and whether more of it is better."""


def _reading(told: Mapping[str, Any], number: int) -> dict[str, Any]:
    """At one guidance: the evolved one's figures, the others' median, and how many of them are worse."""
    points = {name: one["points"][number] for name, one in told.items()}
    others = [name for name in told if name != EVOLVED]
    found: dict[str, Any] = {"w": points[EVOLVED]["w"]}
    for figure, sign in FIGURES.items():
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
