"""Settings of architecture evolution and its random baseline."""

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
    """Settings of the random baseline of an evolved architecture.

    Attributes:
        count: number of random architectures.
        slack: relative difference from the evolved one's latency, by the table, that is accepted.
        seed: of the random architectures.
        training: of each architecture, from the robust model's weights.
        sampler: solver and steps.
        evaluation: guidance, captions, real images and metrics; the contenders are the architectures.
        timing: latency measurement of their UNets.
    """

    count: PositiveInt = 10
    slack: PositiveFloat = Field(0.03, lt=1.0)
    seed: int = Field(0, ge=0)
    training: VpredSettings = VpredSettings()
    sampler: Sampler = Sampler(steps=8)
    evaluation: EvaluationSettings = EvaluationSettings(guidance=(2.0, 4.0))
    timing: TimingSettings = TimingSettings()


class EvolutionSettings(Settings):
    """Settings of an architecture evolution.

    Attributes:
        latency_ms: objective S, milliseconds of a guided step by the latency table; must be set.
        begin: source of the robust model, or "run:" and a path in the run.
        table: latency table file, as `jobs.measure_latency` writes it, or "run:" and a path in the run; null
            takes the run's own, measured on this machine.
        device: required device of the table; null accepts any, or this machine if `table` is null.
        precision: required precision of the table; null accepts any, or `latency.precision` likewise.
        pace: limits of a round.
        rounds: at most.
        prompts: fixed captions by which blocks are scored.
        sampler: solver and steps.
        guidance: w.
        samples: sampling and scoring.
        training: robust training after each change.
    """

    latency_ms: PositiveFloat | None = None
    begin: str = ROBUST_MODEL
    table: str | None = None
    device: str | None = None
    precision: Precision | None = None
    pace: RoundLimits = RoundLimits()
    rounds: PositiveInt = 20
    prompts: PromptSettings = PromptSettings(name="validation", split="validation")
    sampler: Sampler = Sampler(steps=50)
    guidance: float = Field(7.5, ge=1.0)
    samples: SamplesSettings = SamplesSettings()
    training: RobustTrainingSettings = RobustTrainingSettings()

    def identity(self) -> dict[str, Any]:
        """The settings that determine the result, as JSON values; URLs and hardware are left out."""
        samples = self.samples
        return {
            "latency_ms": self.latency_ms,
            "pace": self.pace.to_values(),
            "sampler": self.sampler.identity(),
            "guidance": self.guidance,
            "drawing": samples.drawing.to_values(),
            "judging": samples.judging.identity(),
            "dtype": samples.device.dtype,
            "training": self.training.identity(),
        }
