"""A recipe as work: what each job reads, asks of its networks, writes and holds.

A guided step of DDIM is two passes of the UNet. A training's row is a forward and a backward pass for each
time that the student is asked of it: once in Eq. 6; in Eq. 11 once in a vanilla step and twice in a guided
one, and once more where L_ori has times of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from jobs.cli.in_run import stage_job
from jobs.cli.job import Job
from jobs.distill_plan import initial_models
from jobs.planning.forecast import PlannedStage, Work, WorkerGroup
from jobs.planning.memory import (
    DTYPE_BYTES,
    half_decoder_bytes,
    network_memory,
    training_memory,
    unet_bytes,
    vae_bytes,
)
from jobs.planning.passes import guided_steps, student_passes, teacher_passes
from jobs.planning.requests import TableWrites, TrainingReads
from jobs.planning.settings import PlanSettings
from jobs.planning.sizes import ModelSizes, NetworkSize
from jobs.run_pipeline import steps_of
from jobs.training.initial_weights import named_architecture
from jobs.training.settings import (
    DecoderSettings,
    DistillSettings,
    TrainerSettings,
    UNetTrainingSettings,
    VpredSettings,
)
from jobs.training.sources import EFFICIENT_MODEL, RECIPE_MODEL
from pipelines.ray_data.settings import Pool
from snapfusion.models.architecture import Architecture
from snapfusion.settings import SettingsError
from snapfusion.training.settings import LoopSettings
from snapfusion.training.step_distillation import BRANCHES

TEXT_BYTES = 150
"""Of a row's ids, caption and token ids in a table, as they compress: about so in LATENTS of any size."""
_TARGET_BYTES = 40
"""Of the numbers that were drawn for a target."""
_HALF = 2
"""Bytes of a stored number of a latent."""
_WEIGHT = 4
"""Bytes of a saved weight."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Rows that a run has to do with.

    Attributes:
        source: that are read.
        latents: that are usable.
        captions: that the teacher draws.
    """

    source: int
    latents: int
    captions: int


@dataclass(frozen=True)
class Workload:
    """The stages of a recipe.

    Attributes:
        job: the recipe, and where its run is.
        settings: the planner's.
        sizes: the model's networks.
        counts: rows.
        png_share: bytes of a PNG, of those of its pixels.
        checkpointed: whether the rate of `train` holds what gradient checkpointing takes.
    """

    job: Job
    settings: PlanSettings
    sizes: ModelSizes
    counts: Counts
    png_share: float
    checkpointed: bool = False

    def stages(self) -> list[PlannedStage]:
        """In the order in which they are done.

        Raises:
            SettingsError: if a step is asked for that the planner does not know.
        """
        asked = self.settings.steps or ()
        if unknown := [verb for verb in asked if verb not in self._builders]:
            raise SettingsError(
                f"--set plan.steps: {unknown[0]!r} is not planned; {', '.join(self._builders)} are"
            )
        return [stage for verb in self.steps if verb in self._builders for stage in self._builders[verb]()]

    @property
    def unplanned(self) -> list[str]:
        """The steps of the run that no rate tells the time of."""
        return [verb for verb in self.steps if verb not in self._builders]

    @property
    def steps(self) -> tuple[str, ...]:
        """The jobs that are done, in their order."""
        if self.settings.steps:
            return self.settings.steps
        recipe = self.job.recipe
        if recipe.distill.teacher is not None:
            return tuple(verb for verb, _, _ in steps_of(self.job))
        targets = ("compute_targets",) if recipe.distill.targets == "table" else ()
        return ("encode_latents", *targets, "distill_plan", "generate_pairs", "distill_decoder", "evaluate")

    @cached_property
    def _builders(self) -> dict[str, Callable[[], list[PlannedStage]]]:
        recipe = self.job.recipe
        return {
            "render_scenes": lambda: [self._render()],
            "encode_latents": lambda: [self._latents()],
            "finetune_vpred": lambda: [
                self._velocity("finetune_vpred", recipe.vpred, self.sizes.architecture)
            ],
            "train_robust": lambda: [
                self._velocity("train_robust", recipe.robust.training, self.sizes.architecture)
            ],
            "evolve_unet": lambda: [self._evolution()],
            "train_efficient": lambda: [
                self._velocity("train_efficient", recipe.efficient.training, self.efficient)
            ],
            "compute_targets": lambda: [self._targets()],
            "distill_steps": lambda: [self._distilled(recipe.distill)],
            "distill_plan": self._plan,
            "generate_pairs": lambda: [self._pairs()],
            "distill_decoder": lambda: [self._decoder(recipe.decoder)],
            "compile_mobile": lambda: [_alone("compile_mobile", Work(kind="compile", units=1))],
            "evaluate": lambda: [self._evaluation()],
        }

    # Networks

    @cached_property
    def efficient(self) -> Architecture:
        """The architecture of the efficient UNet."""
        name = self.job.resolve(self.job.recipe.efficient.architecture)
        return named_architecture(name, own=self.sizes.architecture)

    @cached_property
    def _students(self) -> dict[str, str]:
        """What each student of the plan begins with, by its source."""
        return {f"run:{stage.name}/model": stage.student for stage in self.job.recipe.stages}

    def architecture(self, source: str | None) -> Architecture:
        """Of the UNet of a model in the run; what is not known here is taken for the recipe's own."""
        seen = set[str]()
        while source in self._students and source not in seen:
            seen.add(source)
            source = self._students[source]
        return self.efficient if source == EFFICIENT_MODEL else self.sizes.architecture

    def is_told(self, source: str | None) -> bool:
        """Whether a model in the run is a student that is told w."""
        return source in self._students and any(
            student.steps.w_conditioned
            for student in self.students()
            if source == f"run:{student.name}/model"
        )

    def _passes(self, units: float, architecture: Architecture, *, each: bool = False) -> Work:
        return Work(kind="pass", units=units, gmacs=self.sizes.of(architecture).gmacs, each=each)

    def _decodes(self, units: float) -> Work:
        return Work(kind="decode", units=units, gmacs=self.sizes.decoder.gmacs)

    @property
    def _latent_bytes(self) -> int:
        channels, height, width = self.sizes.bundle.latent_shape
        return channels * height * width * _HALF

    @property
    def _png_bytes(self) -> float:
        return 3 * self.sizes.bundle.image_size**2 * self.png_share

    @property
    def _all_parameters(self) -> int:
        return self.sizes.unet.parameters + self.sizes.frozen

    def _unet_row_bytes(self, architecture: Architecture) -> int:
        return unet_bytes(architecture, tokens=self.sizes.tokens, trained=False)

    # Tables

    def _render(self) -> PlannedStage:
        source = self.job.recipe.source
        work = Work(kind="render", units=source.scenes)
        return PlannedStage(
            name="render_scenes",
            verb="render_scenes",
            rows=source.scenes,
            parts=(WorkerGroup(name="driver", works=(work,), workers=1, on="core", most=1),),
            leaves=source.scenes * self._png_bytes,
            local=True,
        )

    def _latents(self) -> PlannedStage:
        settings, counts = self.job.recipe.latents, self.counts
        encode = Work(kind="encode", units=counts.latents, gmacs=self.sizes.encoder.gmacs)
        return PlannedStage(
            name="encode_latents",
            verb="encode_latents",
            rows=counts.source,
            parts=(
                _pool("readers", settings.readers, Work(kind="read", units=counts.source)),
                _pool("encoders", settings.encoders, encode, network=True),
                _pool("writers", settings.writers, Work(kind="write", units=counts.latents)),
            ),
            start="job",
            leaves=counts.latents * (self._latent_bytes + TEXT_BYTES),
            writing=TableWrites(
                units=_ceil(counts.source, settings.rows_per_unit),
                commit_seconds=settings.bounds.commit_seconds,
                rejects=counts.latents < counts.source,
            ),
            memory=network_memory(
                parameters=self._all_parameters,
                dtype=settings.device.dtype,
                row_bytes=vae_bytes(self.sizes),
                rows=settings.encoding.batch_size,
            ),
        )

    def _targets(self) -> PlannedStage:
        settings = self.job.recipe.targets
        teaching, p = settings.teaching, settings.cfg_probability
        rows = self.counts.latents * settings.draws
        teacher = self.architecture(self.job.recipe.distill.teacher)
        return PlannedStage(
            name="compute_targets",
            verb="compute_targets",
            rows=self.counts.latents,
            parts=(
                _pool(
                    "teachers",
                    settings.teachers,
                    self._passes(rows * teaching.k * (1.0 + p), teacher),
                    network=True,
                ),
                _pool("writers", settings.writers, Work(kind="write", units=rows)),
            ),
            start="job",
            leaves=rows * self.target_bytes,
            writing=TableWrites(
                units=_ceil(self.counts.latents, self.job.recipe.latents.rows_per_unit) * settings.draws,
                commit_seconds=settings.bounds.commit_seconds,
                rejects=False,
            ),
            memory=network_memory(
                parameters=self.sizes.of(teacher).parameters + self.sizes.frozen,
                dtype=settings.device.dtype,
                row_bytes=self._unet_row_bytes(teacher),
                rows=2 * teaching.batch_size,
            ),
        )

    @property
    def target_bytes(self) -> float:
        """Of a row of TARGETS."""
        x = {"float16": 1, "float32": 2}[self.job.recipe.targets.teaching.x_dtype]
        return self._latent_bytes * (1 + x) + TEXT_BYTES + _TARGET_BYTES

    def _pairs(self) -> PlannedStage:
        settings = self.job.recipe.pairs
        drawn, rows = settings.generation, self.counts.captions * settings.draws
        passes = rows * drawn.steps * (1 if drawn.guidance == 1.0 else 2)
        images = (self._decodes(rows),) if drawn.images else ()
        pngs = (Work(kind="write_image", units=rows),) if drawn.images else ()
        return PlannedStage(
            name="generate_pairs",
            verb="generate_pairs",
            rows=self.counts.captions,
            parts=(
                _pool(
                    "teachers",
                    settings.teachers,
                    self._passes(passes, self.sizes.architecture),
                    *images,
                    network=True,
                ),
                _pool("writers", settings.writers, Work(kind="write", units=rows), *pngs),
            ),
            start="job",
            leaves=rows * (self._latent_bytes + TEXT_BYTES + (self._png_bytes if drawn.images else 0.0)),
            writing=TableWrites(
                units=_ceil(self.counts.captions, settings.rows_per_unit) * settings.draws,
                commit_seconds=settings.bounds.commit_seconds,
                rejects=False,
            ),
            memory=network_memory(
                parameters=self._all_parameters,
                dtype=settings.device.dtype,
                row_bytes=max(
                    2 * self._unet_row_bytes(self.sizes.architecture), vae_bytes(self.sizes) * drawn.images
                ),
                rows=drawn.batch_size,
            ),
        )

    def _evaluation(self) -> PlannedStage:
        wanted = self.job.recipe.evaluation
        pictures = wanted.prompts.limit * len(wanted.guidance) * len(wanted.contenders)
        passes = [
            self._passes(
                wanted.prompts.limit * sum(contender.sampler.evaluations(w) for w in wanted.guidance),
                self.architecture(contender.model),
            )
            for contender in wanted.contenders
        ]
        samples = wanted.samples
        judged = Work(kind="judge", units=pictures + wanted.references.count)
        units = _ceil(wanted.prompts.limit, samples.rows_per_unit) * len(wanted.guidance)
        return PlannedStage(
            name="evaluate",
            verb="evaluate",
            rows=pictures,
            parts=(
                _pool("models", samples.models, *passes, self._decodes(pictures), judged, network=True),
                _pool("writers", samples.writers, Work(kind="write", units=pictures)),
            ),
            start="job",
            leaves=pictures * (samples.judging.feature_count * _WEIGHT + TEXT_BYTES),
            writing=TableWrites(
                units=units * len(wanted.contenders),
                commit_seconds=samples.bounds.commit_seconds,
                rejects=False,
            ),
            memory=network_memory(
                parameters=self._all_parameters,
                dtype=samples.device.dtype,
                row_bytes=max(2 * self._unet_row_bytes(self.sizes.architecture), vae_bytes(self.sizes)),
                rows=samples.drawing.batch_size,
            ),
        )

    # Trainings

    def _plan(self) -> list[PlannedStage]:
        """The models that a plan begins with, and its students."""
        first = {"vpred": "finetune_vpred", "efficient": "train_efficient"}
        stages = [stage for name, _, _ in initial_models(self.job) for stage in self._builders[first[name]]()]
        return [
            *stages,
            *(self._distilled(stage_job(self.job, stage).recipe.distill) for stage in self.job.recipe.stages),
        ]

    def students(self) -> list[DistillSettings]:
        """Those that the planned steps distil."""
        recipe, wanted = self.job.recipe, self.steps
        planned = [stage_job(self.job, stage).recipe.distill for stage in recipe.stages]
        own = [recipe.distill] if "distill_steps" in wanted else []
        return [*own, *(planned if "distill_plan" in wanted else [])]

    def _velocity(self, verb: str, settings: VpredSettings, architecture: Architecture) -> PlannedStage:
        loop, network = settings.loop, self.sizes.of(architecture)
        rows = loop.num_steps * loop.global_batch
        works = (
            Work(kind="train", units=rows, gmacs=network.gmacs),
            _updates(loop, network),
            self._passes(self._held_out(settings), architecture, each=True),
        )
        return self._training(
            verb, verb=verb, settings=settings, architecture=architecture, works=works, asked=1
        )

    def _distilled(self, settings: DistillSettings) -> PlannedStage:
        steps, loop = settings.steps, settings.loop
        teacher = self.architecture(settings.teacher or RECIPE_MODEL)
        student = self.architecture(settings.student or settings.teacher or RECIPE_MODEL)
        network, online = self.sizes.of(student), settings.targets == "online"
        guided = guided_steps(loop.num_steps, seed=loop.seed, p=steps.cfg_probability)
        vanilla = loop.num_steps - guided
        asked = {branch: student_passes(steps, guided=branch) for branch in BRANCHES}
        told = self.is_told(settings.teacher)
        lessons = {branch: teacher_passes(steps, guided=branch, told=told) for branch in BRANCHES}
        rows = loop.global_batch
        branches = [branch for branch, count in ((False, vanilla), (True, guided)) if count]
        # The held-out rows of each branch, before and after, without L_ori.
        looks = 2 * self._held_out(settings) * sum(2 if branch else 1 for branch in branches)
        works = [
            Work(
                kind="train",
                units=rows * (vanilla * asked[False] + guided * asked[True]),
                gmacs=network.gmacs,
            ),
            _updates(loop, network),
            self._passes(looks, student, each=True),
        ]
        if online:
            works.append(self._passes(rows * (vanilla * lessons[False] + guided * lessons[True]), teacher))
            works.append(self._passes(looks * steps.k, teacher, each=True))
        taught = self.sizes.of(teacher).parameters + self.sizes.frozen
        return self._training(
            settings.name,
            verb="distill_steps",
            settings=settings,
            architecture=student,
            works=tuple(works),
            asked=max(asked[branch] for branch in branches),
            teacher_bytes=taught * DTYPE_BYTES[settings.teacher_dtype] if online else 0,
            row_bytes=self._latent_bytes + TEXT_BYTES if online else self.target_bytes,
        )

    def _training(
        self,
        name: str,
        *,
        verb: str,
        settings: UNetTrainingSettings,
        architecture: Architecture,
        works: tuple[Work, ...],
        asked: int,
        teacher_bytes: int = 0,
        row_bytes: float | None = None,
    ) -> PlannedStage:
        loop, trainer, network = settings.loop, settings.trainer, self.sizes.of(architecture)
        if settings.gradient_checkpointing and not self.checkpointed:
            again = sum(work.units for work in works if work.kind == "train")
            works = (*works, self._passes(again, architecture))
        return PlannedStage(
            name=name,
            verb=verb,
            rows=loop.num_steps * loop.global_batch,
            parts=(_trainers(trainer, loop, works),),
            start="training",
            leaves=_saved(network, loop, frozen=self.sizes.frozen),
            reading=self._reading(loop, trainer, settings.loader.window_units, network, row_bytes=row_bytes),
            memory=training_memory(
                parameters=network.parameters,
                frozen=self.sizes.frozen,
                frozen_bytes=teacher_bytes,
                row_bytes=unet_bytes(
                    architecture,
                    tokens=self.sizes.tokens,
                    trained=True,
                    checkpointing=settings.gradient_checkpointing,
                ),
                rows=min(trainer.micro_batch, loop.global_batch) * asked,
                precision=loop.precision,
                moment_bytes=self.settings.moment_bytes,
                averaged=loop.ema_decay is not None,
                workers=trainer.num_workers,
                spread=trainer.sharding == "fsdp",
            ),
        )

    def _decoder(self, settings: DecoderSettings) -> PlannedStage:
        loop, half, online = settings.loop, self.sizes.half, settings.target == "online"
        trainings = 2 if settings.compare_random_init else 1
        rows = trainings * loop.num_steps * loop.global_batch
        works = [
            Work(kind="train_decoder", units=rows, gmacs=half.gmacs),
            _updates(loop, half, times=trainings),
        ]
        if online:
            works.append(self._decodes(rows))
        generation = self.job.recipe.pairs.generation
        stored = self._png_bytes if generation.images and not online else 0.0
        parameters = half.parameters
        return PlannedStage(
            name="distill_decoder",
            verb="distill_decoder",
            rows=rows,
            parts=(_trainers(settings.trainer, loop, tuple(works)),),
            start="training",
            leaves=half.parameters * _WEIGHT,
            reading=self._reading(
                loop,
                settings.trainer,
                settings.loader.window_units,
                half,
                row_bytes=self._latent_bytes + TEXT_BYTES + stored,
                unit_rows=self.job.recipe.pairs.rows_per_unit,
                times=trainings,
            ),
            memory=training_memory(
                parameters=parameters,
                frozen=self._all_parameters,
                frozen_bytes=0,
                row_bytes=half_decoder_bytes(self.sizes) + (2 * vae_bytes(self.sizes) if online else 0),
                rows=min(settings.trainer.micro_batch, loop.global_batch),
                precision=loop.precision,
                moment_bytes=self.settings.moment_bytes,
                averaged=loop.ema_decay is not None,
                workers=settings.trainer.num_workers,
                spread=False,
            ),
        )

    def _evolution(self) -> PlannedStage:
        """At most: every round scores every block, and trains."""
        wanted, architecture = self.job.recipe.evolution, self.sizes.architecture
        cuts = len(architecture.blocks) + 1
        pictures = wanted.rounds * cuts * wanted.prompts.limit
        passes = pictures * wanted.sampler.evaluations(wanted.guidance)
        trained = self._velocity("evolve_unet", wanted.training, architecture)
        works = [
            Work(kind=work.kind, units=work.units * wanted.rounds, gmacs=work.gmacs, each=work.each)
            for work in trained.parts[0].works
        ]
        drawn = (
            self._passes(passes, architecture),
            self._decodes(pictures),
            Work(kind="judge", units=pictures),
        )
        part = trained.parts[0]
        return PlannedStage(
            name="evolve_unet",
            verb="evolve_unet",
            rows=trained.rows * wanted.rounds,
            parts=(
                WorkerGroup(
                    name="models, then trainers",
                    works=(*drawn, *works),
                    workers=part.workers,
                    on="accelerator",
                    most=part.most,
                ),
            ),
            start="training",
            leaves=trained.leaves * wanted.rounds,
            memory=trained.memory,
        )

    def _held_out(self, settings: UNetTrainingSettings) -> float:
        """Rows that are evaluated."""
        return min(settings.evaluation_rows, self.counts.latents * settings.loader.held_out)

    def _reading(
        self,
        loop: LoopSettings,
        trainer: TrainerSettings,
        window_units: int,
        network: NetworkSize,
        *,
        row_bytes: float | None = None,
        unit_rows: int | None = None,
        times: int = 1,
    ) -> TrainingReads:
        weights = network.parameters * _WEIGHT
        averaged = (weights,) if loop.ema_decay is not None else ()
        return TrainingReads(
            steps=loop.num_steps * times,
            global_batch=loop.global_batch,
            window_units=window_units,
            unit_rows=unit_rows or self.job.recipe.latents.rows_per_unit,
            row_bytes=row_bytes or self._latent_bytes + TEXT_BYTES,
            checkpoints=_ceil(loop.num_steps, trainer.checkpoint_every) * times,
            checkpoint_bytes=(weights, 2 * weights, *averaged),
        )


def _pool(name: str, pool: Pool, *works: Work, network: bool = False) -> WorkerGroup:
    return WorkerGroup(name=name, works=works, workers=pool.actors, on="accelerator" if network else "core")


def _trainers(trainer: TrainerSettings, loop: LoopSettings, works: tuple[Work, ...]) -> WorkerGroup:
    return WorkerGroup(
        name="trainers",
        works=works,
        workers=trainer.num_workers,
        on="accelerator",
        most=loop.global_batch,
    )


def _updates(loop: LoopSettings, network: NetworkSize, *, times: int = 1) -> Work:
    return Work(kind="update", units=loop.num_steps * times * network.parameters / 1e6, each=True)


def _saved(network: NetworkSize, loop: LoopSettings, *, frozen: int) -> float:
    """Bytes of the folders `model` and, where an average is kept, `raw`."""
    return (network.parameters + frozen) * _WEIGHT * (1 if loop.ema_decay is None else 2)


def _alone(verb: str, *works: Work) -> PlannedStage:
    part = WorkerGroup(name="driver", works=works, workers=1, on="core", most=1)
    return PlannedStage(name=verb, verb=verb, rows=0, parts=(part,), local=True)


def _ceil(whole: int, part: int) -> int:
    return -(-whole // part)
