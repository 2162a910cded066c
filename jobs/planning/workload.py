"""Turns a recipe into the costs of its stages, as the packages of the stages state them."""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cached_property

from jobs.cli.in_run import stage_job
from jobs.cli.job import Job
from jobs.evaluation.costs import evaluation_cost
from jobs.evolution.costs import evolution_cost
from jobs.planning.rates_and_prices import Rates
from jobs.planning.settings import PlanSettings
from jobs.recipes.verbs import initial_verbs, pipeline_verbs
from jobs.training.costs import TrainingCosts
from jobs.training.initial_weights import named_architecture
from jobs.training.settings import DistillSettings
from jobs.training.sources import EFFICIENT_MODEL
from pipelines.costs.stage import WEIGHT_BYTES, StageCost, loading_memory, local_cost
from pipelines.datasets import costs
from snapfusion.models.architecture import Architecture
from snapfusion.models.network_sizes import NetworkSizes
from snapfusion.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of rows: read from the source, encoded into LATENTS, and captions for the teacher."""

    source: int
    latents: int
    captions: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The stages of a job's recipe: what they cost on so many rows, with networks of these sizes."""

    job: Job
    settings: PlanSettings
    sizes: NetworkSizes
    counts: Counts
    rates: Rates

    def stages(self) -> list[StageCost]:
        """Costs of the stages in the order in which they run.

        Raises:
            SettingsError: if `plan.steps` names a job that cannot be planned.
        """
        unplanned, accepted = self.unplanned, ", ".join(self._costs)
        if self.settings.steps and unplanned:
            raise SettingsError(
                f"--set plan.steps: {unplanned[0]!r} cannot be planned; accepted are {accepted}"
            )
        return [stage for verb in self.verbs if verb not in unplanned for stage in self._costs[verb]()]

    @property
    def unplanned(self) -> list[str]:
        """Jobs of the run that have no rate."""
        return [verb for verb in self.verbs if verb not in self._costs]

    @property
    def verbs(self) -> tuple[str, ...]:
        """Jobs of the run, in order."""
        distill = self.job.recipe.distill
        if self.settings.steps:
            return self.settings.steps
        if distill.teacher is not None:
            return tuple(pipeline_verbs(self.job.recipe))
        tables = ("encode_latents", "compute_targets") if distill.targets == "table" else ("encode_latents",)
        return (*tables, "distill_schedule", "generate_pairs", "distill_decoder", "evaluate")

    @cached_property
    def _costs(self) -> dict[str, Callable[[], list[StageCost]]]:
        """The stages of each job that can be planned; computed on demand, as not all apply to every model."""
        recipe, sizes, velocity = self.job.recipe, self.sizes, self._trainings.velocity
        source, rows, captions = astuple(self.counts)
        scenes, png = recipe.source.scenes, 3 * sizes.bundle.image_size**2 * self.rates.png_share
        stored = recipe.pairs.generation.images and recipe.decoder.target == "stored"
        pair_bytes = costs.latents_row_bytes(sizes) + (png if stored else 0.0)
        return {
            "render_scenes": lambda: [
                local_cost("render_scenes", "render", units=scenes, rows=scenes, output_bytes=scenes * png)
            ],
            "encode_latents": lambda: [
                costs.latents_cost(recipe.latents, source_rows=source, rows=rows, sizes=sizes)
            ],
            "finetune_vpred": lambda: [velocity("finetune_vpred", recipe.vpred)],
            "train_robust": lambda: [velocity("train_robust", recipe.robust.training)],
            "evolve_unet": lambda: [evolution_cost(recipe.evolution, trainings=self._trainings)],
            "train_efficient": lambda: [
                velocity("train_efficient", recipe.efficient.training, unet=self.efficient)
            ],
            "compute_targets": lambda: [
                costs.targets_cost(
                    recipe.targets,
                    rows=rows,
                    unit_rows=recipe.latents.rows_per_unit,
                    teacher=self.architecture(recipe.distill.teacher),
                    sizes=sizes,
                )
            ],
            "distill_steps": lambda: [self.distillation(recipe.distill)],
            "generate_pairs": lambda: [
                costs.pairs_cost(recipe.pairs, captions=captions, png_bytes=png, sizes=sizes)
            ],
            "distill_decoder": lambda: [
                self._trainings.decoder(
                    recipe.decoder, row_bytes=pair_bytes, unit_rows=recipe.pairs.rows_per_unit
                )
            ],
            "compile_mobile": lambda: [
                local_cost("compile_mobile", "compile", units=1, peak_bytes=self._compile_bytes)
            ],
            "evaluate": lambda: [evaluation_cost(recipe.evaluation, unet_of=self.architecture, sizes=sizes)],
            # The models that the schedule starts from, then its students.
            "distill_schedule": lambda: [
                *(stage for verb in initial_verbs(recipe) for stage in self._costs[verb]()),
                *map(self.distillation, self._scheduled),
            ],
        }

    @cached_property
    def _trainings(self) -> TrainingCosts:
        return TrainingCosts(
            sizes=self.sizes,
            rows=self.counts.latents,
            unit_rows=self.job.recipe.latents.rows_per_unit,
            row_bytes=costs.latents_row_bytes(self.sizes),
            moment_bytes=self.settings.moment_bytes,
            checkpointed=self.rates.checkpointed,
        )

    @property
    def _compile_bytes(self) -> float:
        """Memory of a compilation beside the processes that it starts: the model, and a guided step of it."""
        sizes, batch = self.sizes, 2
        model = loading_memory(unet=sizes.unet.parameters, frozen=sizes.frozen + sizes.half.parameters)
        step = (sizes.unet.parameters + sizes.frozen) * WEIGHT_BYTES
        # Activations are counted in two bytes a number, and have four.
        step += 2 * max(batch * sizes.unet_bytes(sizes.architecture, trained=False), sizes.vae_bytes)
        return max(model, step)

    @property
    def target_bytes(self) -> int:
        """Bytes of a row of TARGETS."""
        return costs.targets_row_bytes(self.job.recipe.targets, self.sizes)

    def distillation(self, settings: DistillSettings) -> StageCost:
        """Cost of the step distillation of one student of the run."""
        w_conditioned = [
            f"run:{one.name}/model" for one in self.students() if one.targets_settings.w_conditioned
        ]
        return self._trainings.distillation(
            settings,
            teacher=self.architecture(settings.teacher),
            student=self.architecture(settings.student or settings.teacher),
            w_conditioned_teacher=settings.teacher in w_conditioned,
            targets_row_bytes=self.target_bytes,
        )

    @property
    def _scheduled(self) -> list[DistillSettings]:
        return [stage_job(self.job, stage).recipe.distill for stage in self.job.recipe.stages]

    def students(self) -> list[DistillSettings]:
        """Settings of the students that the planned jobs distil."""
        own = [self.job.recipe.distill] if "distill_steps" in self.verbs else []
        return own + (self._scheduled if "distill_schedule" in self.verbs else [])

    @cached_property
    def efficient(self) -> Architecture:
        """Architecture of the efficient UNet."""
        name = self.job.resolve(self.job.recipe.efficient.architecture)
        return named_architecture(name, own=self.sizes.architecture)

    def architecture(self, source: str | None) -> Architecture:
        """Architecture of the UNet of a model in the run; unknown sources count as the recipe's own model."""
        initial = {f"run:{stage.name}/model": stage.student for stage in self.job.recipe.stages}
        # Each lookup removes a student, so that a schedule whose students start from each other ends too.
        while source in initial:
            source = initial.pop(source)
        return self.efficient if source == EFFICIENT_MODEL else self.sizes.architecture
