"""Settings of architecture evolution and its random baseline."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from jobs.evaluation.settings import EvaluationSettings, PromptSettings, TimingSettings
from jobs.training.settings import RobustTrainingSettings, VpredSettings
from jobs.training.sources import ROBUST_MODEL
from pipelines.datasets.settings import SamplesSettings
from pipelines.stages.settings import Sampler
from snapfusion.evolution.settings import Precision, RoundLimits
from snapfusion.settings import Settings


class RandomBaselineSettings(Settings):
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
    evaluation: EvaluationSettings = EvaluationSettings(guidance=(2.0, 4.0))
    timing: TimingSettings = TimingSettings()


class EvolutionSettings(Settings):
    """How an architecture is evolved.

    Attributes:
        latency_ms: S, milliseconds of a guided step that the UNet may take, by the table; null must be set.
        begin: the source of the robust model; in a job also "run:" and a place in the run.
        table: the latency table's file, as `jobs.measure_latency` writes it or as a device's owner did; in a
            job also "run:" and a place in the run. Null takes the run's own of this machine.
        device: what the table must call its device; null takes any, or this machine where `table` is null.
        precision: of the networks in the table; null takes any, or `latency.precision` likewise.
        pace: how far a round goes.
        rounds: at most.
        prompts: the fixed captions that blocks are scored by.
        sampler: solver and steps.
        guidance: w.
        samples: how pictures are drawn and judged.
        training: robust training after each change.
    """

    latency_ms: PositiveFloat | None = None
    begin: str = ROBUST_MODEL
    table: str | None = None
    device: str | None = None
    precision: Precision | None = None
    pace: RoundLimits = RoundLimits()
    rounds: PositiveInt = 20
    prompts: PromptSettings = PromptSettings(limit=200)
    sampler: Sampler = Sampler(steps=50)
    guidance: float = Field(7.5, ge=1.0)
    samples: SamplesSettings = SamplesSettings()
    training: RobustTrainingSettings = RobustTrainingSettings()

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the outcome, as JSON values; not where anything lies or runs."""
        samples = self.samples
        return {
            "latency_ms": self.latency_ms,
            "pace": self.pace.to_values(),
            "sampler": self.sampler.to_values(),
            "guidance": self.guidance,
            "drawing": samples.drawing.to_values(),
            "judging": samples.judging.to_values(),
            "dtype": samples.device.dtype,
            "training": self.training.deciding(),
        }
