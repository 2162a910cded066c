"""Costs of trainings: passes of student and teacher, checkpoints, reads and memory."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from jobs.training.dmd2_costs import Dmd2Costs, dmd2_costs
from jobs.training.lora_costs import LoraCosts, lora_costs
from jobs.training.settings import (
    DecoderSettings,
    DistillSettings,
    TrainerSettings,
    UNetTrainingSettings,
    VpredSettings,
)
from pipelines.costs.requests import TrainingReads
from pipelines.costs.stage import (
    ALLOCATOR_SLACK,
    DTYPE_BYTES,
    WEIGHT_BYTES,
    DriverCost,
    StageCost,
    Work,
    WorkerGroup,
    ceil_div,
    loading_memory,
    unet_passes,
    vae_decodes,
)
from snapfusion.models.architecture import Architecture
from snapfusion.models.network_sizes import NetworkSizes
from snapfusion.training.passes import guided_steps, student_passes, teacher_passes
from snapfusion.training.settings import Dmd2Settings, LoopSettings


class _Loaded(NamedTuple):
    """Bytes of the driver when it loads a model, and of what it holds beside it then."""

    model: float
    beside: float = 0.0


class _Network(NamedTuple):
    """Trained parameters of a network, and frozen ones through which the gradient passes."""

    parameters: int
    frozen: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingCosts:
    """Costs of the trainings on one table of LATENTS.

    Attributes:
        sizes: of the model's networks.
        rows: of LATENTS.
        unit_rows: rows of its data files.
        row_bytes: of its rows.
        moment_bytes: of the optimizer's moments, per parameter.
        checkpointed: whether the rate of `train` includes gradient checkpointing.
    """

    sizes: NetworkSizes
    rows: int
    unit_rows: int
    row_bytes: float
    moment_bytes: float
    checkpointed: bool

    def velocity(self, verb: str, settings: VpredSettings, *, unet: Architecture | None = None) -> StageCost:
        """Cost of a training of the model's own UNet, or another, by L_ori alone. Eq. 5, 6."""
        unet = unet or self.sizes.architecture
        rows = settings.loop.num_steps * settings.loop.global_batch
        works = (
            Work(kind="train", units=rows, gmacs=self.sizes.of(unet).gmacs),
            unet_passes(self._evaluated(settings), unet, sizes=self.sizes, replicated=True),
        )
        return self._student(verb, settings, unet=unet, works=works)

    def distillation(
        self,
        settings: DistillSettings,
        *,
        teacher: Architecture,
        student: Architecture,
        w_conditioned_teacher: bool,
        targets_row_bytes: int,
    ) -> StageCost:
        """Cost of a step distillation. Eq. 11."""
        if settings.dmd2 is not None:
            return self._dmd2(settings, settings.dmd2, teacher=teacher, student=student)
        steps, loop, sizes = settings.targets_settings, settings.loop, self.sizes
        online, is_consistency = settings.targets == "online", settings.consistency is not None
        guided = guided_steps(loop.num_steps, seed=loop.seed, p=steps.cfg_probability)
        counts = {False: loop.num_steps - guided, True: guided}
        counts = {branch: count for branch, count in counts.items() if count}
        passes = {branch: 1 if is_consistency else student_passes(steps, guided=branch) for branch in counts}
        trained = loop.global_batch * sum(count * passes[branch] for branch, count in counts.items())
        # The held-out rows of each branch are evaluated before and after the training, without L_ori.
        evaluated = 2 * self._evaluated(settings) * sum(2 if branch else 1 for branch in counts)
        checkpointing, lora = settings.gradient_checkpointing, None
        if settings.lora is not None:
            lora = lora_costs(settings.lora, student, tokens=sizes.tokens, checkpointing=checkpointing)
        works = [
            Work(kind="train", units=trained, gmacs=(lora or sizes.of(student)).gmacs),
            unet_passes(evaluated, student, sizes=sizes, replicated=True),
        ]
        if is_consistency:
            # The student's or its average's own target, without a gradient.
            works.append(unet_passes(trained, student, sizes=sizes))
        if online:
            taught = loop.global_batch * sum(
                count * teacher_passes(steps, guided=branch, w_conditioned=w_conditioned_teacher)
                for branch, count in counts.items()
            )
            works.append(unet_passes(taught, teacher, sizes=sizes))
            works.append(unet_passes(evaluated * steps.k, teacher, sizes=sizes, replicated=True))
        teacher_bytes = (sizes.of(teacher).parameters + sizes.frozen) * DTYPE_BYTES[settings.teacher_dtype]
        costs = self if online else replace(self, row_bytes=targets_row_bytes)
        stage = costs._student(
            "distill_steps",
            settings,
            unet=student,
            works=tuple(works),
            passes=max(passes.values()),
            teacher_bytes=teacher_bytes if online else 0,
            # The driver holds the teacher, whose hash is part of the identity, while it loads the student.
            beside_bytes=(sizes.of(teacher).parameters + sizes.frozen) * WEIGHT_BYTES,
            lora=lora,
        )
        return replace(stage, name=settings.name)

    def _dmd2(
        self,
        distill: DistillSettings,
        settings: Dmd2Settings,
        *,
        teacher: Architecture,
        student: Architecture,
    ) -> StageCost:
        """Cost of distribution matching: a third UNet is trained beside the student (Yin et al. 2024)."""
        costs = dmd2_costs(
            distill,
            settings,
            teacher=teacher,
            student=student,
            sizes=self.sizes,
            evaluated=self._evaluated(distill),
        )
        frozen = self.sizes.of(teacher).parameters + self.sizes.frozen
        stage = self._student(
            "distill_steps",
            distill,
            unet=student,
            works=costs.works,
            teacher_bytes=frozen * DTYPE_BYTES[distill.teacher_dtype],
            beside_bytes=frozen * WEIGHT_BYTES,
            beside=costs,
        )
        return replace(stage, name=distill.name)

    def decoder(self, settings: DecoderSettings, *, row_bytes: float, unit_rows: int) -> StageCost:
        """Cost of the half-width decoder's training on PAIRS, against stored or decoded images."""
        loop, sizes, online = settings.loop, self.sizes, settings.target == "online"
        trainings = 2 if settings.compare_random_init else 1
        rows = trainings * loop.num_steps * loop.global_batch
        train = Work(kind="train_decoder", units=rows, gmacs=sizes.half.gmacs)
        return replace(self, row_bytes=row_bytes, unit_rows=unit_rows)._training(
            "distill_decoder",
            settings,
            network=_Network(sizes.half.parameters),
            works=(train, vae_decodes(rows, sizes=sizes)) if online else (train,),
            activations=sizes.half_bytes + (2 * sizes.vae_bytes if online else 0),
            frozen_bytes=(sizes.unet.parameters + sizes.frozen) * WEIGHT_BYTES,
            output_bytes=sizes.half.parameters * WEIGHT_BYTES,
            trainings=trainings,
            loaded=_Loaded(loading_memory(unet=sizes.unet.parameters, frozen=sizes.frozen)),
        )

    def _student(
        self,
        verb: str,
        settings: UNetTrainingSettings,
        *,
        unet: Architecture,
        works: tuple[Work, ...],
        passes: int = 1,
        teacher_bytes: int = 0,
        beside_bytes: int = 0,
        beside: Dmd2Costs | None = None,
        lora: LoraCosts | None = None,
    ) -> StageCost:
        network, checkpointing = self.sizes.of(unet), settings.gradient_checkpointing
        if checkpointing and not self.checkpointed:
            # Checkpointing repeats the forward pass of every trained row.
            repeated = sum(work.units for work in works if work.kind == "train")
            works = (*works, unet_passes(repeated, unet, sizes=self.sizes))
        # The folder has `model` and, if an average is kept, `raw`; and an adapter of each in two layouts.
        models = 1 if settings.loop.ema_decay is None else 2
        saved = network.parameters + self.sizes.frozen + (2 * lora.parameters if lora else 0)
        if beside:
            activations = beside.activations
        elif lora:
            activations = passes * lora.activations
        else:
            activations = passes * self.sizes.unet_bytes(unet, trained=True, checkpointing=checkpointing)
        return self._training(
            verb,
            settings,
            network=_Network(lora.parameters, network.parameters) if lora else _Network(network.parameters),
            works=works,
            activations=activations,
            frozen_bytes=self.sizes.frozen * WEIGHT_BYTES + teacher_bytes,
            output_bytes=saved * WEIGHT_BYTES * models,
            loaded=_Loaded(
                loading_memory(unet=network.parameters, frozen=self.sizes.frozen), beside=beside_bytes
            ),
            beside=beside,
        )

    def _training(
        self,
        verb: str,
        settings: UNetTrainingSettings | DecoderSettings,
        *,
        network: _Network,
        works: tuple[Work, ...],
        activations: int,
        frozen_bytes: int,
        output_bytes: float,
        loaded: _Loaded,
        trainings: int = 1,
        beside: Dmd2Costs | None = None,
    ) -> StageCost:
        loop, trainer, parameters = settings.loop, settings.trainer, network.parameters
        averages = 0 if loop.ema_decay is None else 1
        checkpoints = ceil_div(loop.num_steps, trainer.checkpoint_every) * trainings
        steps = trainings * loop.num_steps
        others = beside.beside if beside else 0
        updates = beside.updates if beside else steps * parameters / 1e6
        update = Work(kind="update", units=updates, replicated=True)
        # Weights, AdamW's two moments and the average.
        saved = (3 + averages) * parameters + 3 * others
        return StageCost(
            name=verb,
            verb=verb,
            rows=steps * loop.global_batch,
            groups=(
                WorkerGroup(
                    name="trainers",
                    # The other workers wait for the checkpoints.
                    works=(*works, update, _saves(checkpoints * saved)),
                    workers=trainer.num_workers,
                    on="accelerator",
                    max_workers=loop.global_batch,
                ),
            ),
            startup="training",
            output_bytes=output_bytes,
            reads=self._reads(
                settings, trainings=trainings, checkpoints=checkpoints, parameters=parameters, others=others
            ),
            driver=_driver(
                weights=trainings * (1 + averages) * parameters * WEIGHT_BYTES,
                loaded=loaded,
                output_bytes=output_bytes,
            ),
            peak_bytes=training_memory(
                parameters=parameters,
                beside=others,
                loop=loop,
                trainer=trainer,
                row_bytes=activations,
                frozen_bytes=frozen_bytes,
                frozen_parameters=network.frozen,
                moment_bytes=self.moment_bytes,
            ),
        )

    def _reads(
        self,
        settings: UNetTrainingSettings | DecoderSettings,
        *,
        trainings: int,
        checkpoints: int,
        parameters: int,
        others: int,
    ) -> TrainingReads:
        """Reads of the table, and checkpoints of a network of `parameters`, and of `others` beside it."""
        loop, loader, weights = settings.loop, settings.loader, parameters * WEIGHT_BYTES
        # Weights, AdamW's two moments and, of the trained network, the average.
        average = () if loop.ema_decay is None else (weights,)
        beside = (others * WEIGHT_BYTES, 2 * others * WEIGHT_BYTES) if others else ()
        return TrainingReads(
            steps=trainings * loop.num_steps,
            global_batch=loop.global_batch,
            window_units=loader.window_units,
            lanes=loader.lanes,
            unit_rows=self.unit_rows,
            row_bytes=self.row_bytes,
            checkpoints=checkpoints,
            checkpoint_bytes=(weights, 2 * weights, *average, *beside),
        )

    def _evaluated(self, settings: UNetTrainingSettings) -> float:
        """Held-out rows that an evaluation takes."""
        return min(settings.evaluation_rows, self.rows * settings.loader.held_out)


def _driver(*, weights: float, loaded: _Loaded, output_bytes: float) -> DriverCost:
    """The driver of a training whose last checkpoints hold so many bytes of `weights`."""
    return DriverCost(
        # The last weights are read, and a model; it is saved, and copied into its folder.
        works=(_saves((weights + loaded.model + 2 * output_bytes) / WEIGHT_BYTES),),
        # Before the training its models are loaded; after it a model is, beside the last checkpoints.
        peak_bytes=loaded.model + max(loaded.beside, weights),
    )


def _saves(numbers: float) -> Work:
    """Float32 numbers that one process saves, or reads, copies and the like, which takes about as long."""
    return Work(kind="save_weights", units=numbers / 1e6, replicated=True)


def training_memory(
    *,
    parameters: int,
    loop: LoopSettings,
    trainer: TrainerSettings,
    row_bytes: int,
    frozen_bytes: int,
    moment_bytes: float,
    beside: int = 0,
    frozen_parameters: int = 0,
) -> float:
    """Peak bytes of one worker of a training.

    Args:
        parameters: of the trained network, in float32: weights, gradients and the moving average if any.
        loop: precision, global batch and moving average.
        trainer: workers that exchange gradients through buckets as large as these (DDP), or that shard
            weights, gradients, moments and average, each keeping the initial weights whole (FSDP).
        row_bytes: activation bytes of one row in a step, two a number.
        frozen_bytes: of networks that are not trained.
        moment_bytes: of the optimizer's moments, per parameter.
        beside: parameters of other networks that are trained in steps of their own, without an average.
        frozen_parameters: weights of the trained network that are not trained, beside an adapter.
    """
    workers, sharded = trainer.num_workers, trainer.sharding == "fsdp"
    state_bytes = 2 * WEIGHT_BYTES + moment_bytes + (WEIGHT_BYTES if loop.ema_decay is not None else 0)
    # Of networks with steps of their own only one has a gradient at a time, the largest at most.
    state = parameters * state_bytes + beside * (WEIGHT_BYTES + moment_bytes)
    state += max(0, beside - parameters) * WEIGHT_BYTES
    if sharded and workers > 1:
        networks = state / workers + (parameters + beside) * WEIGHT_BYTES
    else:
        networks = state + ((parameters + beside) * WEIGHT_BYTES if workers > 1 else 0)
    autocast = loop.precision != "float32"
    # A copy of a frozen weight is kept, too, as the gradient passes through its layer.
    casts = (parameters + beside + frozen_parameters) * DTYPE_BYTES[loop.precision] if autocast else 0
    rows = min(trainer.micro_batch, loop.global_batch)
    activations = casts + rows * row_bytes * (1 if autocast else 2) * ALLOCATOR_SLACK
    # AdamW updates all parameters at once and copies them once more; activations are freed by then.
    updating = max(parameters, beside) * WEIGHT_BYTES / (workers if sharded else 1)
    return networks + frozen_bytes + frozen_parameters * WEIGHT_BYTES + max(activations, updating)
