"""Images of the report: input samples, teacher images, and both decoders and the programs side by side.

What imports torch is imported in the functions, because a report of kept parts does without.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from jobs.cli.inputs import deletion_list_of, shards_url
from jobs.reports.input_states import files_state, model_state, table_state
from jobs.reports.run_page import CaptionedImage, ImageComparison
from jobs.reports.run_records import CommittedRun
from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.webdataset import Sample, Shard, list_shards, read_shard
from pipelines.storage.objects import StorageError, read_bytes
from pipelines.tables.schemas import array_type, from_png
from pipelines.tables.table import Snapshot, open_table
from snapfusion.export.layout import IMAGES

_NUM_SCENES, _NUM_TEACHER_IMAGES, _NUM_COMPARISONS = 8, 16, 6
_MAX_SIDE = 256
"""Side in pixels to which shard images are reduced."""


_IMAGES = TypeAdapter(tuple[CaptionedImage, ...])
_COMPARISONS = TypeAdapter(tuple[ImageComparison, ...])


def scene_samples(run: CommittedRun) -> tuple[CaptionedImage, ...]:
    """The first images that LATENTS hold, read from their shard; empty without LATENTS or without the shard.

    Rows that were rejected or deleted are in no table, and so in no report.
    """
    recipe, latents = run.job.recipe, run.tables.get("latents")
    unit = next((unit for unit in latents.units if unit.rows), None) if latents is not None else None
    if latents is None or unit is None:
        return ()
    ids = latents.read_unit(unit, ["id"])["id"].to_pylist()[:_NUM_SCENES]
    try:
        shards = list_shards(shards_url(run.job))
    except SourceError:
        return ()
    shard = next((each for each in shards if ids[0].startswith(f"{recipe.source.name}/{each.name}/")), None)
    if shard is None:
        return ()
    return run.cache.part(
        "scenes",
        _IMAGES,
        follows_from={
            "ids": ids,
            "latents": table_state(latents),
            "shard": files_state(shard.url),
            "reading": recipe.latents.shards.to_values(),
            "images": recipe.latents.images.to_values(),
            "model": model_state(recipe.model),
        },
        compute=lambda: _scene_samples(run, shard, ids=ids),
    )


def _scene_samples(run: CommittedRun, shard: Shard, *, ids: Sequence[str]) -> tuple[CaptionedImage, ...]:
    from pipelines.stages.image import decode_image
    from snapfusion.models.load import load_sizes

    settings, source = run.job.recipe.latents, run.job.recipe.source.name
    size = min(_MAX_SIDE, load_sizes(run.job.recipe.model).side)
    samples = dict[str, CaptionedImage]()
    for row in read_shard(shard, settings.shards):
        if isinstance(row, Sample) and (id_ := f"{source}/{row.id}") in ids:
            with suppress(Rejected):
                image = decode_image(row.image, size=size, settings=settings.images)
                samples[id_] = CaptionedImage(image=image, caption=row.caption)
        if len(samples) == len(ids):
            break
    return tuple(samples.values())


def teacher_images(pairs: Snapshot, notes: Mapping[str, str]) -> tuple[CaptionedImage, ...]:
    """The first images of PAIRS, each with the oracle's note on its row."""
    rows = pairs.read_unit(pairs.units[0], ["id", "caption", "image"]).to_pylist() if pairs.units else []
    with_image = [row for row in rows if row["image"] is not None][:_NUM_TEACHER_IMAGES]
    return tuple(
        CaptionedImage(image=from_png(row["image"]), caption=row["caption"], note=notes.get(row["id"], ""))
        for row in with_image
    )


def decoder_comparisons(run: CommittedRun) -> tuple[ImageComparison, ...]:
    """Held-out latents of PAIRS through the teacher's decoder and the half-width decoder."""
    if run.decoder is None:
        return ()
    # The version that the decoder was trained on: a newer one may hold out other rows.
    pairs = open_table(run.tables["pairs"].url, version=run.decoder["parents"]["pairs"]["version"])
    fraction = run.job.recipe.decoder.loader.held_out
    return run.cache.part(
        "decoders",
        _COMPARISONS,
        follows_from={
            # The newest version too: what a deletion request took from it does not stay in a kept part.
            "pairs": [table_state(pairs), table_state(run.tables["pairs"])],
            "held_out": fraction,
            "rows": _NUM_COMPARISONS,
            "teacher": model_state(run.job.recipe.model),
            "half": run.decoder,
        },
        compute=lambda: _decode(run, pairs, held_out=fraction),
    )


def _decode(run: CommittedRun, pairs: Snapshot, *, held_out: float) -> tuple[ImageComparison, ...]:
    import torch

    from pipelines.loading.loader import held_out_rows
    from snapfusion.models.bundle import to_uint8
    from snapfusion.models.decoder import load_decoder
    from snapfusion.models.load import load

    decoders = {
        "Teacher": load(run.job.recipe.model).decode,
        "Half width": load_decoder(run.job.url("decoder")).decode,
    }
    comparisons = []
    deleted = deletion_list_of(run.job).read()
    columns = ["id", "source_id", "caption", "latent"]
    for found in held_out_rows(pairs, columns, fraction=held_out, limit=_NUM_COMPARISONS):
        # The version that the decoder was trained on may hold rows that were deleted since.
        names = zip(found["id"].to_pylist(), found["source_id"].to_pylist(), strict=True)
        rows = found.filter(pa.array([not any(map(deleted.has_id, pair)) for pair in names]))
        latents = array_type(rows.schema.field("latent")).unpack(rows.column("latent").to_pylist())
        for caption, values in zip(rows.column("caption").to_pylist(), latents, strict=True):
            latent = torch.from_numpy(values.astype(np.float32))[None]
            with torch.inference_mode():
                images = {
                    name: to_uint8(decode(latent)[0]).permute(1, 2, 0).numpy()
                    for name, decode in decoders.items()
                }
            comparisons.append(
                ImageComparison(
                    caption=caption, name="Teacher", reference=images.pop("Teacher"), images=images
                )
            )
    return tuple(comparisons)


def mobile_comparisons(run: CommittedRun) -> tuple[ImageComparison, ...]:
    """The images that torch and each variant of the programs sampled when the bundle was made."""
    if run.mobile is None:
        return ()

    def image(name: str, number: int) -> np.ndarray:
        url = run.job.url(f"mobile/{IMAGES}/{name}-{number}.png")
        try:
            return from_png(read_bytes(url))
        except (OSError, SyntaxError) as error:  # as Pillow raises them
            raise StorageError(f"{url} is no image: {error}") from None

    return tuple(
        ImageComparison(
            caption=caption,
            name="torch",
            reference=image("torch", number),
            images={name: image(name, number) for name in run.mobile["variants"]},
        )
        for number, caption in enumerate(run.mobile["captions"][:_NUM_COMPARISONS])
    )
