"""Compares an evolved architecture with random ones of its latency, trained and scored in the same way.

Every architecture starts from the robust model's weights and has the same training, without block skipping:
only the choice of blocks differs.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jobs.evaluation.curve_tables import StartTable
from jobs.evaluation.evaluation import evaluate
from jobs.evaluation.settings import Contender, EvaluationSettings
from jobs.evaluation.timing import unet_benchmark
from jobs.evolution.settings import RandomBaselineSettings
from jobs.training.initial_weights import own_architecture, with_architecture
from jobs.training.metrics import StudentMetrics
from jobs.training.velocity import finetune_vpred
from pipelines.ray_data.execution import Runner
from snapfusion.evolution.latency import LatencyTable
from snapfusion.evolution.random_architectures import random_architecture
from snapfusion.evolution.stopwatch import Timing, time_in_turns
from snapfusion.models.architecture import Architecture

EVOLVED = "evolved"

COMPARED_METRICS = {"clip": 1.0, "fid": -1.0, "all_attributes": 1.0}
"""Metrics that are compared, with the sign by which larger is better."""


@dataclass(frozen=True, kw_only=True)
class RandomBaseline:
    """The random baseline of an evolved architecture, in the folder `out`.

    Attributes:
        settings: of the baseline.
        model: source of the robust model.
        evolved: architecture.
        table: latency table.
        latents_url: URL of LATENTS for training.
        out: folder or URL.
    """

    settings: RandomBaselineSettings
    model: str
    evolved: Architecture
    table: LatencyTable
    latents_url: str
    out: str

    def architectures(self) -> dict[str, Architecture]:
        """The evolved architecture and the random ones, by name.

        Raises:
            ValueError: if no random architecture of that latency is found.
        """
        origin, ms = own_architecture(self.model), self.table.predict_ms(self.evolved)
        slack = ms * self.settings.slack
        by_name = {
            f"chance-{index}": random_architecture(
                origin,
                table=self.table,
                low_ms=ms - slack,
                high_ms=ms + slack,
                seed=self.settings.seed + index,
            )
            for index in range(self.settings.count)
        }
        return {EVOLVED: self.evolved, **by_name}

    def compare(self, *, start: StartTable, run: Runner) -> dict[str, Any]:
        """Train, score and time all architectures, unless that is done already.

        Args:
            start: called for each table before it is filled.
            run: executes stages.

        Returns:
            JSON values: the "settings", the metrics of each architecture ("architectures"), and at each
            guidance the evolved one's beside the median of the others ("readings").
        """
        architectures = self.architectures()
        trained = {name: self._train(name, architecture) for name, architecture in architectures.items()}
        results = evaluate(
            self._evaluation(architectures), model=self.model, out=self.out, start=start, run=run
        )
        times = self._times(architectures)
        records = {
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
            "settings": self.settings.training.identity(),
            "latency": {"setting": self.table.setup.to_values(), "date": self.table.date},
            "protocol": results["protocol"],
            "architectures": records,
            "differences": results["differences"],
            "readings": [_reading(records, index) for index in range(len(self.settings.evaluation.guidance))],
        }

    def _train(self, name: str, architecture: Architecture) -> StudentMetrics:
        return finetune_vpred(
            self.settings.training,
            model=with_architecture(self.model, architecture, url=f"{self.out}/first/{name}"),
            latents_url=self.latents_url,
            out_url=f"{self.out}/trained/{name}",
            further=True,
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
            name: unet_benchmark(timing, architecture, tokens=tokens)
            for name, architecture in architectures.items()
        }
        # In turns, so that other load of the machine slows all of them alike.
        return time_in_turns(runs, turns=timing.turns)


def _reading(records: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The comparison at one guidance: evolved, median and best of the others, and how many are worse."""
    points = {name: record["points"][index] for name, record in records.items()}
    others = [name for name in records if name != EVOLVED]
    reading: dict[str, Any] = {"w": points[EVOLVED]["w"]}
    for metric, sign in COMPARED_METRICS.items():
        if metric in points[EVOLVED]:
            evolved = points[EVOLVED][metric][0]
            values = [points[name][metric][0] for name in others]
            reading[metric] = {
                "evolved": evolved,
                "median": statistics.median(values),
                "best": max(values, key=lambda value: sign * value),
                "worse": sum(sign * value < sign * evolved for value in values),
            }
    losses = [records[name]["loss"] for name in others]
    reading["loss"] = {"evolved": records[EVOLVED]["loss"], "median": statistics.median(losses)}
    return reading
