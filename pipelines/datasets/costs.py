"""Costs of the stages that write tables: work of each worker group, bytes, commits and memory."""

from dataclasses import replace

from pipelines.costs.requests import TableWrites
from pipelines.costs.stage import (
    DriverCost,
    StageCost,
    Work,
    WorkerGroup,
    ceil_div,
    loading_memory,
    network_memory,
    pool_group,
    unet_passes,
    vae_decodes,
)
from pipelines.datasets.settings import LatentsSettings, PairsSettings, SamplesSettings, TargetsSettings
from pipelines.ray_data.settings import window_items
from snapfusion.models.architecture import Architecture
from snapfusion.models.network_sizes import NetworkSizes

TEXT_BYTES = 150
"""Compressed bytes of a row's ids, caption and token ids, measured on LATENTS of any size."""
_DRAW_BYTES = 40
"""Compressed bytes of the random draws of a row of TARGETS."""
UNIT_BYTES = 3_000
"""Memory of a driver for a unit: its item on the way to workers, its manifest and its file."""
CAPTION_BYTES = 800
"""Memory of a driver for a caption of 60 characters: listed, and pickled on its way to workers."""


def latents_row_bytes(sizes: NetworkSizes) -> int:
    """Bytes of a row of LATENTS."""
    return sizes.latent_bytes + TEXT_BYTES


def targets_row_bytes(settings: TargetsSettings, sizes: NetworkSizes) -> int:
    """Bytes of a row of TARGETS, which stores a latent and the teacher's prediction of x."""
    x = {"float16": 1, "float32": 2}[settings.teaching.x_dtype]
    return sizes.latent_bytes * (1 + x) + TEXT_BYTES + _DRAW_BYTES


def latents_cost(settings: LatentsSettings, *, source_rows: int, rows: int, sizes: NetworkSizes) -> StageCost:
    """Cost of LATENTS, for which `rows` of `source_rows` are usable."""
    encode = Work(kind="encode", units=rows, gmacs=sizes.encoder_gmacs)
    return table_cost(
        "encode_latents",
        settings,
        rows=source_rows,
        groups=(
            pool_group("readers", settings.readers, Work(kind="read", units=source_rows)),
            pool_group("encoders", settings.encoders, encode, network=True),
            pool_group("writers", settings.writers, Work(kind="write", units=rows)),
        ),
        output_bytes=rows * latents_row_bytes(sizes),
        units=ceil_div(source_rows, settings.rows_per_unit),
        rejects=rows < source_rows,
        sizes=sizes,
        batch_bytes=settings.encoding.batch_size * sizes.vae_bytes,
    )


def targets_cost(
    settings: TargetsSettings, *, rows: int, unit_rows: int, teacher: Architecture, sizes: NetworkSizes
) -> StageCost:
    """Cost of TARGETS of `rows` rows of LATENTS, whose units have `unit_rows`."""
    targets, teaching = rows * settings.draws, settings.teaching
    passes = unet_passes(targets * teaching.k * (1.0 + settings.cfg_probability), teacher, sizes=sizes)
    return table_cost(
        "compute_targets",
        settings,
        rows=rows,
        groups=(
            pool_group("teachers", settings.teachers, passes, network=True),
            pool_group("writers", settings.writers, Work(kind="write", units=targets)),
        ),
        output_bytes=targets * targets_row_bytes(settings, sizes),
        units=ceil_div(rows, unit_rows) * settings.draws,
        sizes=sizes,
        unet=teacher,
        batch_bytes=2 * teaching.batch_size * sizes.unet_bytes(teacher, trained=False),
    )


def pairs_cost(settings: PairsSettings, *, captions: int, png_bytes: float, sizes: NetworkSizes) -> StageCost:
    """Cost of PAIRS of so many captions, whose images take `png_bytes` each."""
    generation, rows, unet = settings.generation, captions * settings.draws, sizes.architecture
    passes = generation.steps * (2 if generation.is_guided else 1)
    works = [unet_passes(rows * passes, unet, sizes=sizes)]
    writes = [Work(kind="write", units=rows)]
    if generation.images:
        works.append(vae_decodes(rows, sizes=sizes))
        writes.append(Work(kind="write_image", units=rows))
    stage = table_cost(
        "generate_pairs",
        settings,
        rows=captions,
        groups=(
            pool_group("teachers", settings.teachers, *works, network=True),
            pool_group("writers", settings.writers, *writes),
        ),
        output_bytes=rows * (latents_row_bytes(sizes) + png_bytes * generation.images),
        units=ceil_div(captions, settings.rows_per_unit) * settings.draws,
        sizes=sizes,
        batch_bytes=generation.batch_size
        * max(2 * sizes.unet_bytes(unet, trained=False), sizes.vae_bytes * generation.images),
    )
    # The list is read as its units are sent.
    held = settings.rows_per_unit * window_items((settings.teachers, settings.writers))
    return with_captions(stage, min(rows, held))


def with_captions(stage: StageCost, captions: int) -> StageCost:
    """A stage whose driver holds so many captions at once and sends them to workers."""
    peak_bytes = stage.driver.peak_bytes + captions * CAPTION_BYTES
    return replace(stage, driver=replace(stage.driver, peak_bytes=peak_bytes))


def table_cost(
    verb: str,
    settings: LatentsSettings | TargetsSettings | PairsSettings | SamplesSettings,
    *,
    rows: int,
    groups: tuple[WorkerGroup, ...],
    output_bytes: float,
    units: int,
    sizes: NetworkSizes,
    batch_bytes: int,
    unet: Architecture | None = None,
    rejects: bool = False,
) -> StageCost:
    """Cost of a stage that writes a table.

    Args:
        verb: the job.
        settings: of the table.
        rows: read.
        groups: worker groups, which run concurrently.
        output_bytes: of the table.
        units: its data files.
        sizes: of the model's networks.
        batch_bytes: activation bytes of one batch, two a number.
        unet: that runs; None for the model's own.
        rejects: whether rows are rejected.
    """
    network = sizes.of(unet or sizes.architecture)
    return StageCost(
        name=verb,
        verb=verb,
        rows=rows,
        groups=groups,
        startup="job",
        output_bytes=output_bytes,
        writes=TableWrites(units=units, commit_seconds=settings.bounds.commit_seconds, rejects=rejects),
        peak_bytes=network_memory(
            parameters=network.parameters + sizes.frozen,
            dtype=settings.device.dtype,
            batch_bytes=batch_bytes,
        ),
        driver=DriverCost(
            works=(Work(kind="commit", units=units, replicated=True),),
            # The model is loaded for its hashes, and let go.
            peak_bytes=max(units * UNIT_BYTES, loading_memory(unet=network.parameters, frozen=sizes.frozen)),
        ),
    )
