"""Images of the report: input samples, teacher images, and both decoders and the programs side by side."""

from collections.abc import Mapping
from contextlib import suppress
from itertools import islice

import numpy as np
import torch

from jobs.cli.inputs import shards_url
from jobs.cli.job import Job
from jobs.reports.run_page import CaptionedImage, ImageComparison
from jobs.reports.run_records import CommittedRun
from pipelines.loading.loader import held_out_rows
from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.webdataset import Sample, list_shards, read_shard
from pipelines.stages.image import decode_image
from pipelines.storage.objects import read_bytes
from pipelines.tables.schemas import array_type, from_png
from pipelines.tables.table import Snapshot, open_table
from snapfusion.export.bundle import IMAGES
from snapfusion.models.bundle import to_uint8
from snapfusion.models.decoder import load_decoder
from snapfusion.models.load import load

_NUM_SCENES, _NUM_TEACHER_IMAGES, _NUM_COMPARISONS = 8, 16, 6
_MAX_SIDE = 256
"""Side in pixels to which shard images are reduced."""


def scene_samples(job: Job) -> tuple[CaptionedImage, ...]:
    """The first images of the first shard, as LATENTS read them; empty if there are no shards."""
    try:
        shard = list_shards(shards_url(job))[0]
    except SourceError:
        return ()
    settings = job.recipe.latents
    size = min(_MAX_SIDE, load(job.recipe.model).image_size)
    samples: list[CaptionedImage] = []
    # Some of the rows may be rejected, so more are read than are shown.
    for row in islice(read_shard(shard, settings.shards), 4 * _NUM_SCENES):
        if isinstance(row, Sample):
            with suppress(Rejected):
                image = decode_image(row.image, size=size, settings=settings.images)
                samples.append(CaptionedImage(image=image, caption=row.caption))
    return tuple(samples[:_NUM_SCENES])


def teacher_images(pairs: Snapshot, notes: Mapping[str, str]) -> tuple[CaptionedImage, ...]:
    """The first images of PAIRS, each with the oracle's note on its row."""
    rows = pairs.read_unit(pairs.units[0], ["id", "caption", "image"]).to_pylist() if pairs.units else []
    with_image = [row for row in rows if row["image"] is not None][:_NUM_TEACHER_IMAGES]
    return tuple(
        CaptionedImage(image=from_png(row["image"]), caption=row["caption"], note=notes.get(row["id"], ""))
        for row in with_image
    )


@torch.inference_mode()
def decoder_comparisons(run: CommittedRun) -> tuple[ImageComparison, ...]:
    """Held-out latents of PAIRS through the teacher's decoder and the half-width decoder."""
    if run.decoder is None:
        return ()
    job = run.job
    # The version that the decoder was trained on: a newer one may hold out other rows.
    pairs = open_table(run.tables["pairs"].url, version=run.decoder["parents"]["pairs"]["version"])
    fraction = job.recipe.decoder.loader.held_out
    teacher, half = load(job.recipe.model), load_decoder(job.url("decoder"))
    comparisons = []
    for rows in held_out_rows(pairs, ["caption", "latent"], fraction=fraction, limit=_NUM_COMPARISONS):
        latents = array_type(rows.schema.field("latent")).unpack(rows.column("latent").to_pylist())
        for caption, values in zip(rows.column("caption").to_pylist(), latents, strict=True):
            latent = torch.from_numpy(values.astype(np.float32))[None]
            reference, images = _pixels(teacher.decode(latent)), {"Half width": _pixels(half.decode(latent))}
            comparisons.append(
                ImageComparison(caption=caption, name="Teacher", reference=reference, images=images)
            )
    return tuple(comparisons)


def mobile_comparisons(run: CommittedRun) -> tuple[ImageComparison, ...]:
    """The images that torch and each variant of the programs sampled when the bundle was made."""
    if run.mobile is None:
        return ()

    def image(name: str, number: int) -> np.ndarray:
        return from_png(read_bytes(run.job.url(f"mobile/{IMAGES}/{name}-{number}.png")))

    return tuple(
        ImageComparison(
            caption=caption,
            name="torch",
            reference=image("torch", number),
            images={name: image(name, number) for name in run.mobile["variants"]},
        )
        for number, caption in enumerate(run.mobile["captions"][:_NUM_COMPARISONS])
    )


def _pixels(image: torch.Tensor) -> np.ndarray:
    """uint8 [H,W,3] of one decoded image, [1,3,H,W]."""
    return to_uint8(image[0]).permute(1, 2, 0).numpy()
