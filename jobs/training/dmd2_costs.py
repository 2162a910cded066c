"""What distribution matching costs: passes of three networks, and the memory of those that are trained."""

from dataclasses import dataclass

import torch

from jobs.training.settings import DistillSettings
from pipelines.costs.stage import Work, unet_passes
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import count_parameters
from snapfusion.models.gan_head import GanHead
from snapfusion.models.network_sizes import NetworkSizes
from snapfusion.training.passes import dmd2_passes
from snapfusion.training.settings import Dmd2Settings


@dataclass(frozen=True, kw_only=True)
class Dmd2Costs:
    """Costs of a training by distribution matching, beside those of any training of its student.

    Attributes:
        works: passes of generator, fake score and teacher.
        updates: 10^6 parameters that are updated in all steps.
        beside: parameters of the fake score and of the GAN's head, which are trained beside the student.
        activations: bytes of one row in the larger of the two kinds of steps, two a number.
    """

    works: tuple[Work, ...]
    updates: float
    beside: int
    activations: int


def dmd2_costs(
    distill: DistillSettings,
    settings: Dmd2Settings,
    *,
    teacher: Architecture,
    student: Architecture,
    sizes: NetworkSizes,
    evaluated: float,
) -> Dmd2Costs:
    """The costs of all steps, of which `fake_updates` train the fake score for each one of the generator.

    Args:
        distill: the whole training.
        settings: of the objective.
        teacher: architecture of the teacher, and so of the fake score.
        student: of the generator.
        sizes: of the model's networks.
        evaluated: held-out rows of an evaluation, of which there are two.
    """
    loop = distill.loop
    generator_steps = loop.num_steps // (settings.fake_updates + 1)
    fake_steps = loop.num_steps - generator_steps
    of_generator, of_fake = (dmd2_passes(settings, generator=generator) for generator in (True, False))
    rows, fake_rows = generator_steps * loop.global_batch, fake_steps * loop.global_batch
    student_passes = rows * of_generator.student + fake_rows * of_fake.student
    works = (
        Work(kind="train", units=rows * of_generator.trained, gmacs=sizes.of(student).gmacs),
        Work(kind="train", units=fake_rows * of_fake.trained, gmacs=sizes.of(teacher).gmacs),
        unet_passes(student_passes, student, sizes=sizes),
        unet_passes(rows * (of_generator.teacher + of_generator.fake), teacher, sizes=sizes),
        unet_passes(2 * evaluated * of_fake.student, student, sizes=sizes, replicated=True),
        unet_passes(2 * evaluated * (of_generator.teacher + 1), teacher, sizes=sizes, replicated=True),
    )
    beside = sizes.of(teacher).parameters + _head_parameters(settings, teacher)
    updated = generator_steps * sizes.of(student).parameters + fake_steps * beside
    bytes_of = {
        unet: sizes.unet_bytes(unet, trained=True, checkpointing=distill.gradient_checkpointing)
        for unet in (teacher, student)
    }
    gan = settings.gan is not None
    in_generator = of_generator.trained * bytes_of[student] + gan * bytes_of[teacher]
    return Dmd2Costs(
        works=works,
        updates=updated / 1e6,
        beside=beside,
        activations=max(in_generator, of_fake.trained * bytes_of[teacher]),
    )


def _head_parameters(settings: Dmd2Settings, teacher: Architecture) -> int:
    if settings.gan is None:
        return 0
    side = teacher.sample_size // 2 ** (len(teacher.channels) - 1)
    with torch.device("meta"):
        return count_parameters(GanHead(teacher.channels[-1], side=side, seed=0))
