"""Cost of an evaluation: passes of contenders, images, what the metric networks see, and the distances."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from jobs.evaluation.distance_costs import distances_cost
from jobs.evaluation.settings import EvaluationSettings
from pipelines.costs.stage import StageCost, Work, ceil_div, pool_group, unet_passes, vae_decodes
from pipelines.datasets.costs import TEXT_BYTES, table_cost, with_captions
from snapfusion.metrics.lpips import lpips_gmacs
from snapfusion.models.architecture import Architecture
from snapfusion.models.network_sizes import NetworkSizes

_FEATURE_BYTES = 4


def evaluation_cost(
    settings: EvaluationSettings, *, unet_of: Callable[[str | None], Architecture], sizes: NetworkSizes
) -> StageCost:
    """Cost of an evaluation; `unet_of` gives the architecture of the UNet of a contender's model."""
    prompts, samples = settings.num_images, settings.samples
    tables = settings.num_points
    images = prompts * tables
    works = [
        unet_passes(
            prompts * sum(contender.sampler.evaluations(w) for w in settings.scales(contender)),
            unet_of(contender.model),
            sizes=sizes,
        )
        for contender in settings.contenders
    ]
    works.append(vae_decodes(images, sizes=sizes))
    works.append(Work(kind="judge", units=images + settings.num_references))
    distances, lpips = distances_cost(settings), _lpips_work(settings, side=sizes.bundle.image_size)
    unet_bytes = sizes.unet_bytes(sizes.architecture, trained=False)
    stage = table_cost(
        "evaluate",
        samples,
        rows=images,
        groups=(
            pool_group("models", samples.models, *works, network=True),
            pool_group("writers", samples.writers, Work(kind="write", units=images)),
        ),
        output_bytes=images * (samples.judging.feature_count * _FEATURE_BYTES + TEXT_BYTES),
        units=ceil_div(prompts, samples.rows_per_unit) * tables,
        sizes=sizes,
        batch_bytes=samples.drawing.batch_size * max(2 * unet_bytes, sizes.vae_bytes),
    )
    tabled = with_captions(stage, settings.prompts.num_images).driver
    driver = replace(
        distances,
        works=(*tabled.works, *distances.works, *lpips),
        peak_bytes=max(tabled.peak_bytes, distances.peak_bytes),
    )
    return replace(stage, driver=driver)


def _lpips_work(settings: EvaluationSettings, *, side: int) -> Iterator[Work]:
    """LPIPS of the images of every point, if it is measured; of `side` pixels."""
    if settings.lpips is not None:
        prompts = settings.prompts
        captions = min(settings.lpips.captions, prompts.num_images // prompts.draws)
        images = settings.num_points * captions * prompts.draws
        yield Work(kind="lpips_image", units=images, gmacs=lpips_gmacs(settings.lpips.network, side=side))
