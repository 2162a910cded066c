"""Settings of the trainings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from jobs.evaluation.settings import PromptSettings
from jobs.training.sources import TABLE_3, VPRED_MODEL
from pipelines.loading.settings import LoaderSettings
from pipelines.stages.settings import MetricSettings, SamplingSettings
from snapfusion.models.settings import Initialization
from snapfusion.settings import Settings
from snapfusion.training.settings import (
    LoopSettings,
    SkipSettings,
    StepDistillationSettings,
    VelocitySettings,
)

LoggerKind = Literal["tensorboard", "wandb", "mlflow"]


Sharding = Literal["none", "fsdp"]


class TrainerSettings(Settings):
    """How and where a training runs. None of it changes what is trained, beyond the order of float sums.

    Attributes:
        num_workers: processes, each of which takes its share of every global batch.
        min_workers: with how many of them it goes on while nodes are missing; None: with all or not at all.
            The batches stay the same, the order in which gradients are added does not: the weights then
            agree to rounding, no longer to the bit.
        resize_seconds: how often it is looked whether there is room for more workers.
        use_gpu: whether each has an accelerator; they then speak NCCL, else gloo.
        cpus_per_worker: logical CPUs that Ray sets aside for each.
        threads_per_worker: CPU threads of each.
        sharding: "none" keeps the whole training on each worker (DDP). "fsdp" spreads gradients, the
            optimizer's moments, the average and the weights over all, so that each keeps the whole network
            but once, at its first weights. The global batch is then a multiple of `num_workers`.
        micro_batch: rows of one forward pass; a larger share is accumulated.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: how many of the newest stay while training runs.
        curve_every: steps between points of the curve that is kept, and of the logs.
        log_to: where the course of training is written for others to draw (see `jobs.training.loggers`).
        max_failures: how often the workers are started again after one of them died.
        labels: what a node must be labelled for workers to run there, as in {"role": "trainer"}: in a cluster
            that also has spot nodes, those that are not (see `pipelines.ray_data.settings.Pool`).
    """

    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    resize_seconds: PositiveFloat = 60.0
    use_gpu: bool = False
    cpus_per_worker: PositiveFloat = 1.0
    threads_per_worker: PositiveInt = 1
    sharding: Sharding = "none"
    micro_batch: PositiveInt = 16
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    curve_every: PositiveInt = 10
    log_to: tuple[LoggerKind, ...] = ("tensorboard",)
    max_failures: NonNegativeInt = 2
    labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("min_workers")
    @classmethod
    def _fewer_are_fewer(cls, fewer: int | None, known: ValidationInfo) -> int | None:
        most = known.data.get("num_workers")
        if fewer is not None and most is not None and fewer > most:
            raise ValueError(f"at most num_workers ({most}) are accepted")
        return fewer


class DecoderSettings(Settings):
    """How the decoder is distilled. The defaults are the miniature's.

    Attributes:
        init: what the student starts from (see `HalfDecoder.from_vae`).
        target: the teacher's images as PAIRS store them, or decoded in the trainer, "online".
        loop: the optimizer's settings.
        loader: how rows are chosen and shuffled, and how many are held out.
        compare_random_init: whether a student from random weights is trained for as long, to compare.
        evaluation_rows: held-out rows that are evaluated, at most.
        timing_batches: sizes of batch at which both decoders are timed.
        timing_repeats: measurements of each.
        trainer: how and where training runs; the one part that may change between two starts of a run.
    """

    init: Initialization = "leading"
    target: Literal["stored", "online"] = "stored"
    loop: LoopSettings = LoopSettings(
        num_steps=800, global_batch=16, learning_rate=4e-3, warmup_steps=20, ema_decay=0.98
    )
    loader: LoaderSettings = LoaderSettings(held_out=0.1)
    compare_random_init: bool = True
    evaluation_rows: PositiveInt = 256
    timing_batches: tuple[PositiveInt, ...] = (1, 64)
    timing_repeats: Annotated[int, Field(ge=1)] = 15
    trainer: TrainerSettings = TrainerSettings(num_workers=2)


class ValidationSettings(Settings):
    """How a model is watched. None of it changes what is trained.

    Attributes:
        every: steps between looks, of which the last step always has one; null does not watch.
        prompts: captions; they should be none that are trained on.
        guidance: scales w of Eq. 3; the first decides which weights are best.
        steps: of DDIM; null takes the student's, or 50 where there is none.
        best: what decides: the lowest "fid", or the highest "clip".
        pictures: how many are shown, of the first captions.
        drawing: batch and noise; the same noise at every look. Its size null is that which is trained.
        judging: what FID and CLIP are measured with.
        references: a table REFERENCES that FID is taken to (in a job also "run:" and a place in the run);
            null takes held-out scenes of the miniature.
        dtype: of the networks that draw.
    """

    every: PositiveInt | None = None
    prompts: PromptSettings = PromptSettings(limit=200)
    guidance: Annotated[tuple[Annotated[float, Field(ge=1)], ...], Field(min_length=1)] = (2.0,)
    steps: PositiveInt | None = None
    best: Literal["fid", "clip"] = "fid"
    pictures: PositiveInt = 8
    drawing: SamplingSettings = SamplingSettings()
    judging: MetricSettings = MetricSettings()
    references: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


_NOT_IN_IDENTITY = ("trainer", "gradient_checkpointing", "watch")
"""Settings that may change between two starts of a run."""


class UNetTrainingSettings(Settings):
    """How a UNet is trained.

    Attributes:
        loop: the optimizer's settings.
        loader: how rows are chosen and shuffled, and how many are held out.
        evaluation_rows: held-out rows that are evaluated, at most.
        saved_as: dtype of the folders' weights. As float32 the text encoder and the VAE stay those that
            tables were made with, to the bit.
        gradient_checkpointing: whether the UNet computes its activations again in the backward pass, which
            takes time and spares memory.
        trainer: how and where training runs.
        watch: how the student is looked at on the way.
    """

    loop: LoopSettings
    loader: LoaderSettings = LoaderSettings(held_out=0.05)
    evaluation_rows: PositiveInt = 128
    saved_as: Literal["float32", "float16"] = "float32"
    gradient_checkpointing: bool = False
    trainer: TrainerSettings = TrainerSettings()
    watch: ValidationSettings = ValidationSettings()

    def deciding(self, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """The settings that decide the weights, as JSON values; not those named in `without`."""
        left_out = (*_NOT_IN_IDENTITY, *without)
        return {name: value for name, value in self.to_values().items() if name not in left_out}


class DistillSettings(UNetTrainingSettings):
    """How a student is distilled. The defaults are the miniature's.

    Attributes:
        name: of the student's folder in the run.
        teacher: its source, or "run:" and a place in the run; null takes the run's v model, or else the
            recipe's model.
        student: the source of its first weights, likewise; null takes the teacher's.
        table: URL of the table that rows are read from, or "run:" and a place in the run; null takes the
            run's `latents`, or `targets`.
        targets: "online", from the teacher in the trainer, or from the "table" TARGETS.
        teacher_dtype: of the teacher in the trainer.
        steps: what is learnt.
        loop: the optimizer's settings.
    """

    name: str = Field("student-8", pattern=r"^[A-Za-z0-9_.-]+$")
    teacher: str | None = None
    student: str | None = None
    table: str | None = None
    targets: Literal["online", "table"] = "online"
    teacher_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    steps: StepDistillationSettings = StepDistillationSettings()
    loop: LoopSettings = LoopSettings(
        num_steps=400, global_batch=64, learning_rate=4e-4, warmup_steps=20, ema_decay=0.99
    )


class VpredSettings(UNetTrainingSettings):
    """How a v model is made. The defaults are the miniature's.

    Attributes:
        velocity: what the loss draws.
        skip: how often blocks are left out (Eq. 5, robust training); null for never.
        loop: the optimizer's settings.
    """

    velocity: VelocitySettings = VelocitySettings()
    skip: SkipSettings | None = None
    loop: LoopSettings = LoopSettings(
        num_steps=1000, global_batch=64, learning_rate=1e-3, warmup_steps=50, ema_decay=0.99
    )


class EfficientSettings(Settings):
    """Which model, which architecture, and how it is trained.

    Attributes:
        begin: the source of the model that gives the first weights; it predicts v. In a job also "run:" and a
            place in the run.
        architecture: "table-3", "own", or the URL of an architecture's file, as `jobs.evolve_unet` leaves
            one; in a job also "run:" and a place in the run.
        training: L_ori (Eq. 6), the loss that the paper trains its UNet by before its steps are distilled.
    """

    begin: str = VPRED_MODEL
    architecture: str = TABLE_3
    training: VpredSettings = VpredSettings()


class RobustTrainingSettings(VpredSettings):
    """How a model is trained with blocks left out.

    Attributes:
        skip: how often.
    """

    skip: SkipSettings = SkipSettings()


class RobustSettings(Settings):
    """Which model, and how.

    Attributes:
        begin: the source of the first weights, which predict v; in a job also "run:" and a place in the run.
        training: how it is trained.
    """

    begin: str = VPRED_MODEL
    training: RobustTrainingSettings = RobustTrainingSettings()
