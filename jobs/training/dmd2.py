"""Distribution matching under Ray Train (Yin et al. 2024, DMD2): what is trained, recorded and refused."""

from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from jobs.training.settings import DistillSettings
from jobs.training.spec import Training, TrainingError, first_differences
from jobs.training.student import EVALUATION_STEP, LATENT_COLUMNS, make_training
from jobs.training.table_training import TrainingInputs
from pipelines.datasets.latents import without_size
from pipelines.loading.buckets import make_loader
from pipelines.stages.device import DTYPES
from pipelines.tables.table import Snapshot, TableError
from snapfusion.models.bundle import Bundle
from snapfusion.models.gan_head import head_for, middle_shape
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.models.load import load, load_network
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.sampling import time_grid
from snapfusion.schedule import Schedule
from snapfusion.solver_names import CONSISTENCY
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.dmd2 import FAKE_SCORE, GAN_HEAD, Dmd2Objective
from snapfusion.training.networks import MODEL, Networks
from snapfusion.training.settings import BRANCHES, Dmd2Settings, NetworkSettings

PAIR_COLUMNS = (*LATENT_COLUMNS, "noise_key")
"""Columns of PAIRS that the regression reads."""


def dmd2_training(
    inputs: TrainingInputs[DistillSettings],
    settings: Dmd2Settings,
    *,
    bundle: Bundle,
    captions: CaptionEncoder,
) -> Training:
    """Assemble the training of a student at its initial weights, in a worker."""
    distill, device = inputs.settings, bundle.device
    teacher, student = inputs.sources["teacher"], inputs.sources["student"]
    others = _networks_beside(distill, settings, teacher=teacher, device=device)
    objective = Dmd2Objective(
        settings,
        teacher=load(teacher, device=str(device), dtype=DTYPES[distill.teacher_dtype]),
        captions=captions,
        seed=distill.loop.seed,
    )
    loader = make_loader(columns=PAIR_COLUMNS if settings.reads_pairs else LATENT_COLUMNS, **inputs.loading())

    @torch.no_grad()
    def held_out_loss(networks: dict[str, nn.Module]) -> dict[str, Any]:
        losses = list[torch.Tensor]()
        view = Networks(trained={}, bare={name: net.eval() for name, net in networks.items()}, averages={})
        batches = loader.held_out(rows=distill.trainer.micro_batch, limit=distill.evaluation_rows)
        for batch in batches:
            losses.append(objective.held_out(view, batch.to(device), step=EVALUATION_STEP))
        return {BRANCHES[True]: {"loss": float(torch.cat(losses).mean())}}

    def evaluate() -> dict[str, Any]:
        initial = {MODEL: _unet(student, device=device), FAKE_SCORE: _unet(teacher, device=device)}
        before = held_out_loss(initial)
        return {"before": before, "after": held_out_loss(training.networks)}

    training = make_training(
        inputs,
        role="student",
        bundle=bundle,
        objective=objective,
        loader=loader,
        evaluate=evaluate,
        distillation=dmd2_record(settings, schedule=bundle.schedule),
        others=others,
    )
    return training


def _networks_beside(
    distill: DistillSettings, settings: Dmd2Settings, *, teacher: str, device: torch.device
) -> dict[str, tuple[nn.Module, NetworkSettings]]:
    """The fake score, which begins as the teacher, and the head of the GAN, with their optimizers."""
    fake = _unet(teacher, device=device).train().requires_grad_(requires_grad=True)
    if distill.gradient_checkpointing:
        fake.enable_gradient_checkpointing()
    shared = {name: getattr(distill.loop, name) for name in NetworkSettings.model_fields}
    of_fake = settings.fake or NetworkSettings(**shared | {"ema_decay": None})
    networks: dict[str, tuple[nn.Module, NetworkSettings]] = {FAKE_SCORE: (fake, of_fake)}
    if settings.gan is not None:
        networks[GAN_HEAD] = head_for(fake, seed=distill.loop.seed), settings.gan.head or of_fake
    return networks


def _unet(source: str, *, device: torch.device) -> UNet2DConditionModel | BlockUNet:
    """The UNet of a model in float32."""
    return cast("UNet2DConditionModel | BlockUNet", load_network(source, part="unet").to(device))


def dmd2_record(settings: Dmd2Settings, *, schedule: Schedule) -> dict[str, Any]:
    """What the student's folder records of how it was distilled, and so how it is sampled."""
    return {
        "method": "dmd2",
        "steps": settings.steps,
        # Its grid has no other points, so those of fewer steps are times that it was trained at.
        "points": settings.steps,
        "timesteps": list(time_grid(settings.steps, schedule_steps=schedule.num_steps)[:-1]),
        "sampler": CONSISTENCY,
        "cfg_probability": 1.0,
        "w_conditioned": False,
        # The student gives guided images without guidance of its own.
        "cfg_range": {"low": 1.0, "high": 1.0},
        "teacher_guidance": {"low": settings.guidance, "high": settings.guidance},
    }


def check_dmd2(settings: Dmd2Settings, *, teacher: Bundle, student: Bundle) -> None:
    """Refuse models that do not go with the method and its settings.

    Raises:
        TrainingError: naming what does not.
        ValueError: if the steps do not divide those of the models' schedule.
    """
    settings.check_schedule(student.schedule.num_steps)
    for bundle, role in ((teacher, "teacher"), (student, "student")):
        if has_guidance_embedding(bundle.unet):
            raise TrainingError(
                f"the {role} {bundle.source} is w-conditioned, and in method dmd2 no network takes w: name "
                "another one"
            )
    if settings.gan is not None and (side := middle_shape(teacher.unet)[1]) < 2:
        raise TrainingError(
            f"the middle of {teacher.source} has {side} x {side} features, and the GAN's head needs 2 x 2: "
            "set dmd2.gan=null"
        )


def check_pairs(table: Snapshot, *, settings: Dmd2Settings, teacher: Bundle) -> None:
    """Refuse PAIRS of a model that differs from the teacher in more than its UNet, or of another guidance.

    Raises:
        TableError: naming what differs.
    """
    recorded, expected = (
        {
            "text_encoder": model["weights"]["text_encoder"],
            "vae": model["weights"]["vae"],
            "scaling_factor": model["scaling_factor"],
            "latent_shape": without_size(model)["latent_shape"],
            "schedule": model["schedule"],
        }
        for model in (table.identity["model"], teacher.describe())
    )
    if differing := first_differences(recorded, expected):
        raise TableError(f"{table.url} was made with another model than {teacher.source}: {differing}")
    generation = table.identity["generation"]
    w = generation["guidance"] if generation.get("guidance_range") is None else "a range"
    if w != settings.guidance:
        raise TableError(
            f"{table.url} was generated at guidance {w}, and dmd2.guidance is {settings.guidance:g}, so the "
            "regression would pull the student elsewhere: generate PAIRS at that guidance "
            "(pairs.generation.guidance, with guidance_range=null), or change dmd2.guidance"
        )
