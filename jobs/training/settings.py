"""Settings of the trainings."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from jobs.evaluation.settings import PromptSettings
from jobs.training.sharding import Sharding, unshared_batch
from jobs.training.sources import TABLE_3, VPRED_MODEL
from pipelines.loading.settings import LoaderSettings
from pipelines.stages.settings import MetricSettings, SamplingSettings
from snapfusion.models.settings import Initialization
from snapfusion.settings import FOLDER_NAME, Settings
from snapfusion.training.settings import (
    Dmd2Settings,
    LcmSettings,
    LoopSettings,
    LoraSettings,
    PcmSettings,
    SkipSettings,
    StepDistillationSettings,
    VelocitySettings,
)

LoggerKind = Literal["tensorboard", "wandb", "mlflow"]
_OBJECTIVES = frozenset(("steps", "consistency", "dmd2"))


class TrainerSettings(Settings):
    """Settings of the workers. None of them changes what is learnt, beyond the order of float sums.

    Attributes:
        num_workers: data-parallel processes; each takes its share of every global batch.
        min_workers: workers with which training continues while nodes are missing; null needs all of them.
            Batches stay the same, but gradients are summed in another order: weights then agree to rounding,
            no longer to the bit.
        resize_seconds: interval between checks for room for more workers.
        use_gpu: one accelerator per worker and NCCL; otherwise CPUs and gloo.
        cpus_per_worker: logical CPUs that Ray reserves for each worker.
        threads_per_worker: CPU threads of each worker.
        sharding: "none" replicates the training on each worker (DDP). "fsdp" shards gradients, optimizer
            moments, EMA and weights; each worker still holds one whole copy of the initial weights. The
            global batch must then be a multiple of `num_workers`.
        micro_batch: rows of one forward pass; gradients of a larger share are accumulated.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: newest checkpoints kept while training runs.
        curve_every: steps between points of the training curve and of the logs.
        log_to: experiment loggers (see `jobs.training.loggers`).
        max_failures: restarts of the workers after one of them died.
        heartbeat_seconds: time without a sign of life after which the driver of a training counts as dead,
            and another one may continue it; a living one gives four in this time.
        labels: node labels that workers require, as in {"role": "trainer"}: keeps workers off spot nodes in
            a mixed cluster (see `pipelines.ray_data.settings.Pool`).
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
    heartbeat_seconds: PositiveFloat = 30.0
    labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("min_workers")
    @classmethod
    def _at_most_num_workers(cls, min_workers: int | None, info: ValidationInfo) -> int | None:
        num_workers = info.data.get("num_workers")
        if min_workers is not None and num_workers is not None and min_workers > num_workers:
            raise ValueError(f"at most num_workers ({num_workers}) are accepted")
        return min_workers


class ValidationSettings(Settings):
    """Settings of the validation during training. None of them changes what is learnt.

    Attributes:
        every: steps between validations; the last step always has one; null turns validation off.
        prompts: captions, which should not be training captions.
        guidance: scales w of Eq. 3; the first one selects the best weights.
        steps: DDIM steps; null takes the student's, or 50 for a model that is not distilled.
        best: criterion of the best weights: lowest "fid" or highest "clip".
        images: images shown, of the first captions.
        drawing: batch size, noise and image size; null size takes the size that is trained. Every validation
            uses the same noise.
        judging: networks of FID and CLIP.
        references: a table REFERENCES for FID, or "run:" and a path in the run; null takes held-out scenes
            of the miniature.
        dtype: of the sampling networks.
    """

    every: PositiveInt | None = None
    prompts: PromptSettings = PromptSettings(name="validation", split="validation")
    guidance: Annotated[tuple[Annotated[float, Field(ge=1)], ...], Field(min_length=1)] = (2.0,)
    steps: PositiveInt | None = None
    best: Literal["fid", "clip"] = "fid"
    images: PositiveInt = 8
    drawing: SamplingSettings = SamplingSettings()
    judging: MetricSettings = MetricSettings()
    references: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TableTrainingSettings(Settings):
    """Settings that every training on a table has.

    Attributes:
        loop: optimizer and schedule.
        loader: choice and shuffling of rows, and the held-out fraction.
        evaluation_rows: held-out rows evaluated, at most.
        trainer: the workers.
    """

    not_in_identity: ClassVar[tuple[str, ...]] = ("trainer",)
    """Settings that may differ when a run is resumed."""

    loop: LoopSettings
    loader: LoaderSettings
    evaluation_rows: PositiveInt
    trainer: TrainerSettings

    def identity(self) -> dict[str, Any]:
        """The settings that determine the weights, as JSON values."""
        values = {name: value for name, value in self.to_values().items() if name not in self.not_in_identity}
        # Earlier versions did not state them.
        if self.loop.arithmetic == 1:
            del values["loop"]["arithmetic"]
        if self.loader.lanes == 1:
            del values["loader"]["lanes"]
        return values

    @property
    def longest_wait(self) -> float | None:
        """Seconds for which a training on a growing table waits for units; None on one that is as it is."""
        return None

    def as_begun(self, stored: Mapping[str, Any]) -> Self:
        """These settings, with the arithmetic and the order of rows of a training begun as `stored`.

        Args:
            stored: its `identity`.
        """
        version = stored.get("loop", {}).get("arithmetic", 1)
        changes: dict[str, Any] = {"loop": self.loop.model_copy(update={"arithmetic": version})}
        if "lanes" not in stored.get("loader", {}):
            changes["loader"] = self.loader.model_copy(update={"lanes": 1})
        return self.model_copy(update=changes)

    @model_validator(mode="after")
    def _workers_share_a_batch(self) -> Self:
        trainer, rows = self.trainer, self.loop.global_batch
        if reason := unshared_batch(rows, world=trainer.num_workers, sharding=trainer.sharding):
            raise ValueError(reason)
        return self


class UNetTrainingSettings(TableTrainingSettings):
    """Settings that every training of a UNet has.

    Attributes:
        saved_as: dtype of the published weights. As float32 the text encoder and the VAE stay bit for bit
            those that tables were made with.
        gradient_checkpointing: recompute the UNet's activations in the backward pass: slower, less memory.
        validation: sampling and scoring during training.
    """

    not_in_identity: ClassVar[tuple[str, ...]] = ("trainer", "gradient_checkpointing", "validation")

    loader: LoaderSettings = LoaderSettings(held_out=0.05)
    evaluation_rows: PositiveInt = 128
    saved_as: Literal["float32", "float16"] = "float32"
    gradient_checkpointing: bool = False
    trainer: TrainerSettings = TrainerSettings()
    validation: ValidationSettings = ValidationSettings()


class DistillSettings(UNetTrainingSettings):
    """Settings of a step distillation. The defaults are the miniature's.

    Attributes:
        name: folder of the student in the run.
        teacher: source of the teacher, or "run:" and a path in the run; null takes the run's v model if
            there is one, else the recipe's model.
        student: source of the initial weights, likewise; null takes the teacher's.
        table: URL of the training table, or "run:" and a path in the run; null takes the run's `latents` or
            `targets`.
        targets: "online" has the trainer run the teacher on LATENTS; "table" reads TARGETS.
        teacher_dtype: dtype of an online teacher.
        steps: step distillation objective.
        consistency: another objective in place of `steps`, by its `method`: {"method": "lcm"} (Luo et al.
            2023) or {"method": "pcm"} (Wang et al. 2024), with the objective's own settings; null for none.
        dmd2: distribution matching in place of `steps` (Yin et al. 2024); null for none.
        lora: {"rank": 16} trains an adapter of that rank in place of all weights, by `steps` or
            `consistency`, and publishes it beside the student; null trains all weights.
        loop: optimizer and schedule.
    """

    not_in_identity: ClassVar[tuple[str, ...]] = (
        *UNetTrainingSettings.not_in_identity,
        "name",
        "teacher",
        "student",
        "table",
    )

    name: str = Field("student-8", pattern=FOLDER_NAME)
    teacher: str | None = None
    student: str | None = None
    table: str | None = None
    targets: Literal["online", "table"] = "online"
    teacher_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    steps: StepDistillationSettings = StepDistillationSettings()
    consistency: Annotated[LcmSettings | PcmSettings, Field(discriminator="method")] | None = None
    dmd2: Dmd2Settings | None = None
    lora: LoraSettings | None = None
    loop: LoopSettings = LoopSettings(
        num_steps=400, global_batch=64, learning_rate=4e-4, warmup_steps=20, ema_decay=0.99
    )

    @model_validator(mode="after")
    def _objective_is_one(self) -> Self:
        if self.dmd2 is not None and self.consistency is not None:
            raise ValueError("dmd2 and consistency are two objectives: set one of them to null")
        if self.dmd2 is not None and self.lora is not None:
            raise ValueError("lora and dmd2: dmd2 trains all weights of the student; set one of them to null")
        if self.dmd2 is not None and self.targets == "table":
            raise ValueError(
                "dmd2 takes no targets from a table, because its teacher judges the student's own samples: "
                "set targets=online"
            )
        return self

    @model_validator(mode="after")
    def _objective_goes_with_the_loop(self) -> Self:
        if self.dmd2 is not None and self.loop.num_steps <= self.dmd2.fake_updates:
            raise ValueError(
                f"loop.num_steps {self.loop.num_steps} ends before the generator's first update, which is in "
                f"step {self.dmd2.fake_updates + 1}: {self.dmd2.fake_updates} of the fake score come before "
                "it (dmd2.fake_updates)"
            )
        if isinstance(self.consistency, LcmSettings) and self.loop.ema_decay is None:
            raise ValueError(
                "loop.ema_decay is null, and the target of method lcm is the averaged student: set it"
            )
        if self.lora is not None and self.trainer.sharding == "fsdp":
            raise ValueError(
                "trainer.sharding is fsdp, which an adapter is not trained with: set trainer.sharding=none; "
                "its moments, gradients and average are small"
            )
        return self

    @property
    def table_kind(self) -> Literal["latents", "pairs", "targets"]:
        """What the training table holds, and its name in the run."""
        if self.dmd2 is not None and self.dmd2.reads_pairs:
            return "pairs"
        return "latents" if self.targets == "online" else "targets"

    @property
    def objective(self) -> str:
        """Name of the objective: "steps", "lcm", "pcm" or "dmd2"."""
        if self.dmd2 is not None:
            return "dmd2"
        return "steps" if self.consistency is None else self.consistency.method

    @property
    def targets_settings(self) -> StepDistillationSettings:
        """The grid, guidance and branches of the targets, by the objective; `dmd2` has no other targets."""
        other = self.dmd2 or self.consistency
        return self.steps if other is None else other.targets

    def identity(self) -> dict[str, Any]:
        """The settings that determine the weights, as JSON values."""
        values = super().identity()
        # Only one of them has an effect; trainings begun with version 0.1 have "steps" alone.
        used = "dmd2" if self.dmd2 else "consistency" if self.consistency else "steps"
        unused = {*_OBJECTIVES} - {used} | ({"lora"} if self.lora is None else set())
        return {name: value for name, value in values.items() if name not in unused}


class VpredSettings(UNetTrainingSettings):
    """Settings of a training by the velocity loss (Eq. 6). The defaults are the miniature's.

    Attributes:
        velocity: velocity loss.
        skip: block skip probabilities of robust training (Eq. 5); null skips none.
        follow: train while LATENTS are written, as `--follow` does: epoch 0 reads units in their planned
            order.
        follow_seconds: without a new version of LATENTS after which a training that waits for units ends.
        loop: optimizer and schedule.
    """

    not_in_identity: ClassVar[tuple[str, ...]] = (*UNetTrainingSettings.not_in_identity, "follow_seconds")

    velocity: VelocitySettings = VelocitySettings()
    skip: SkipSettings | None = None
    follow: bool = False
    follow_seconds: PositiveFloat = 600.0
    loop: LoopSettings = LoopSettings(
        num_steps=1000, global_batch=64, learning_rate=1e-3, warmup_steps=50, ema_decay=0.99
    )

    def identity(self) -> dict[str, Any]:
        """The settings that determine the weights, as JSON values."""
        values = super().identity()
        # Of the others the identity stays that of earlier versions.
        return values if self.follow else {name: values[name] for name in values if name != "follow"}

    @property
    def longest_wait(self) -> float | None:
        """Seconds for which a training on a growing table waits for units; None on one that is as it is."""
        return self.follow_seconds if self.follow else None

    def as_begun(self, stored: Mapping[str, Any]) -> Self:
        """These settings, with the arithmetic and the order of rows of a training begun as `stored`."""
        return super().as_begun(stored).model_copy(update={"follow": stored.get("follow", False)})


class RobustTrainingSettings(VpredSettings):
    """Settings of a training with stochastic block skipping.

    Attributes:
        skip: block skip probabilities.
    """

    skip: SkipSettings = SkipSettings()


class RobustSettings(Settings):
    """Settings of the run's robust model.

    Attributes:
        begin: source of the initial weights, which predict v, or "run:" and a path in the run.
        training: robust training.
    """

    begin: str = VPRED_MODEL
    training: RobustTrainingSettings = RobustTrainingSettings()


class EfficientSettings(Settings):
    """Settings of the run's efficient model.

    Attributes:
        begin: source of the initial weights, which predict v, or "run:" and a path in the run.
        architecture: "table-3", "own", or the URL of an architecture file as `jobs.evolve_unet` writes it, or
            "run:" and its path in the run.
        training: training by L_ori (Eq. 6), before the steps are distilled.
    """

    begin: str = VPRED_MODEL
    architecture: str = TABLE_3
    training: VpredSettings = VpredSettings()


class DecoderSettings(TableTrainingSettings):
    """Settings of the decoder distillation. The defaults are the miniature's.

    Attributes:
        init: initial weights of the student (see `HalfDecoder.from_vae`).
        target: teacher images as PAIRS "stored" them, or decoded "online" in the trainer.
        compare_random_init: also train a student from random weights for as many steps, for comparison.
        timing_batches: batch sizes at which both decoders are timed.
        timing_repeats: repetitions of each measurement.
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
