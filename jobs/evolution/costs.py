"""Cost of an evolution of the UNet's architecture, as an upper bound."""

from dataclasses import replace

from jobs.evolution.settings import EvolutionSettings
from jobs.training.costs import TrainingCosts
from pipelines.costs.stage import StageCost, Work, unet_passes, vae_decodes


def evolution_cost(settings: EvolutionSettings, *, trainings: TrainingCosts) -> StageCost:
    """Cost of an evolution in which every round scores every block, and trains."""
    sizes, rounds = trainings.sizes, settings.rounds
    unet = sizes.architecture
    images = rounds * (len(unet.blocks) + 1) * settings.prompts.num_images
    training = trainings.velocity("evolve_unet", settings.training)
    (trainers,) = training.groups
    works = (
        unet_passes(images * settings.sampler.evaluations(settings.guidance), unet, sizes=sizes),
        vae_decodes(images, sizes=sizes),
        Work(kind="judge", units=images),
        *(replace(work, units=work.units * rounds) for work in trainers.works),
    )
    return replace(
        training,
        rows=training.rows * rounds,
        groups=(replace(trainers, name="models, then trainers", works=works),),
        output_bytes=training.output_bytes * rounds,
        reads=None,
        driver=replace(
            training.driver,
            works=tuple(replace(work, units=work.units * rounds) for work in training.driver.works),
        ),
    )
