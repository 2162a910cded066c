"""Cost of an evaluation: passes of every contender, images, and what the metric networks see."""

from collections.abc import Callable

from jobs.evaluation.settings import EvaluationSettings
from pipelines.costs.stage import StageCost, ceil_div, unet_passes
from pipelines.datasets.costs import samples_cost
from snapfusion.models.architecture import Architecture
from snapfusion.models.network_sizes import NetworkSizes


def evaluation_cost(
    settings: EvaluationSettings, *, architecture: Callable[[str | None], Architecture], sizes: NetworkSizes
) -> StageCost:
    """Cost of an evaluation; `architecture` gives that of the UNet of a contender's model."""
    prompts, samples = settings.prompts.limit, settings.samples
    tables = len(settings.guidance) * len(settings.contenders)
    passes = tuple(
        unet_passes(
            prompts * sum(contender.sampler.evaluations(w) for w in settings.guidance),
            architecture(contender.model),
            sizes=sizes,
        )
        for contender in settings.contenders
    )
    return samples_cost(
        samples,
        passes=passes,
        units=ceil_div(prompts, samples.rows_per_unit) * tables,
        images=prompts * tables,
        judged=prompts * tables + settings.references.count,
        sizes=sizes,
    )
