"""Exports LATENTS, PAIRS or TARGETS as WebDataset shards, which a killed export continues shard by shard.

 export.json                      the table, its version and lineage, the settings; written first
 neg_prompt_emb.npy               the encoded empty caption
 00000.tar, 00000_stats.json      samples, and their counts, which come last: the shard is whole
 shard_count.json                 samples of each tar; written when all shards are whole

The version that an export began with stays its version. Once rows of it were deleted on request, it is
refused: the export holds them, and has to be made anew.
"""

import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pipelines.datasets.latents import check_latents
from pipelines.exports.record import begin_export
from pipelines.exports.samples import SampleEncoder
from pipelines.exports.settings import ExportSettings
from pipelines.exports.shards import ShardCounts, ShardPlan, WriteShard, finished_shards, plan_shards
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.sources.stats import stats_url
from pipelines.stages.device import DTYPES, prepare
from pipelines.storage.objects import (
    IO_THREADS,
    StorageError,
    absolute_url,
    is_local,
    local_path,
    replace_object,
    write_once,
)
from pipelines.storage.records import read_record
from pipelines.tables.committer import CommitProgress, OnProgress
from pipelines.tables.deletion_list import DeletionList
from pipelines.tables.leases import read_lease
from pipelines.tables.table import Snapshot, TableError
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.settings import differences

_NULL_EMBEDDING: Final = "neg_prompt_emb.npy"
_COUNTS: Final = "shard_count.json"
_OVERHEAD_BYTES: Final = 8_000
"""Of a sample: headers and padding of the tar, and the archive around each tensor."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A whole export.

    Attributes:
        folder: its URL.
        version: of the table.
        shards: their number.
        written: shards that this run wrote.
        rows: of the table.
        samples: in all shards; fewer than the rows, if some were on the deletion list.
    """

    folder: str
    version: int
    shards: int
    written: int
    rows: int
    samples: int


def export_webdataset(
    table: Snapshot,
    settings: ExportSettings,
    *,
    model: str,
    folder: str,
    deleted: DeletionList,
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> Export:
    """Write the shards that are missing in `folder`.

    Args:
        table: the version to export (`exported_version`).
        settings: of the export.
        model: whose text encoder encodes the captions; a source that `snapfusion.models.load` accepts.
        folder: URL of the export.
        deleted: the deletion list of the run; rows on it are left out.
        run: sends shards through workers.
        on_progress: called after each shard.

    Raises:
        TableError: if the table was not made with this model's text encoder, or the export was begun with
            other settings.
        StorageError: if the folder cannot be written, or its disk is too full.
    """
    folder = absolute_url(folder)
    plans = list(plan_shards(table.units, rows_per_shard=settings.rows_per_shard))
    if not plans:
        raise TableError(f"{table.url} has no committed rows at version {table.version}")
    null_embedding = _begin(table, settings, model=model, folder=folder, shards=len(plans))
    finished = finished_shards(folder)
    missing = [plan for plan in plans if plan.name not in finished]
    rows = sum(plan.rows for plan in missing)
    check_space(folder, _bytes_of(table, null_embedding, rows=rows))
    write_once(f"{folder}/{_NULL_EMBEDDING}", _npy(null_embedding))
    source = {"table": table.url, "version": table.version, "model": model, "deleted": deleted}
    stage = PipelineStage(
        build=WriteShard,
        arguments={**source, "folder": folder, "settings": settings},
        pool=settings.exporters,
    )
    with read_lease(table.url, version=table.version, purpose="an export"):
        for progress in _progress(run(missing, [stage]), total=rows):
            if on_progress:
                on_progress(progress)
    return Export(
        folder=folder,
        version=table.version,
        shards=len(plans),
        written=len(missing),
        rows=table.num_rows,
        samples=_finish(folder, plans),
    )


def _begin(table: Snapshot, settings: ExportSettings, *, model: str, folder: str, shards: int) -> np.ndarray:
    """Write or compare the record; returns the encoded empty caption."""
    # Workers load it again, and need the memory beside this process: it ends with this function.
    bundle = load(model, device=prepare(settings.device), dtype=DTYPES[settings.device.dtype])
    _check_text_encoder(table, bundle=bundle)
    begin_export(
        table,
        settings,
        folder=folder,
        text_encoder=bundle.fingerprint()["text_encoder"],
        scaling_factor=bundle.scaling_factor,
        shards=shards,
    )
    return SampleEncoder(bundle, settings).null_embedding()


def check_space(folder: str, needed: int) -> None:
    """Refuse an export that does not fit on its disk.

    Raises:
        StorageError: if so; nothing is known of remote stores.
    """
    if not is_local(folder):
        return
    path = local_path(folder)
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{folder} needs about {needed / 1e6:.1f} MB more, and its disk has {free / 1e6:.1f} MB free; "
            "give another --folder, or make room"
        )


def _check_text_encoder(table: Snapshot, *, bundle: Bundle) -> None:
    """Refuse a model whose text encoder is not the one that the table's rows were made with.

    LATENTS were made without a text encoder: they need the same VAE and tokenizer.
    """
    if table.identity["kind"] == "latents":
        check_latents(table, bundle=bundle)
        return
    recorded, given = (
        {"text_encoder": model["weights"]["text_encoder"]}
        for model in (table.identity["model"], bundle.describe())
    )
    if differing := list(differences(recorded, given)):
        raise TableError(
            f"{table.url} was made with another model than {bundle.source!r}: {'; '.join(differing)}; give "
            "its teacher by --set model="
        )


def _bytes_of(table: Snapshot, embedding: np.ndarray, *, rows: int) -> int:
    """About what the samples of so many rows take."""
    stored = sum(file.size for file in table.units) / table.num_rows
    first = next(file for file in table.units if file.rows)
    # Noise is float32, and latents are float16.
    noise = 2 * len(table.read_unit(first, ["latent"])["latent"][0].as_py())
    computed = embedding.nbytes + (0 if table.identity["kind"] == "latents" else noise)
    return int(rows * (stored + computed + _OVERHEAD_BYTES))


def _progress(finished: Iterator[ShardCounts], *, total: int) -> Iterator[CommitProgress]:
    progress = CommitProgress(total=total)
    for counts in finished:
        progress = progress.advanced(rows=counts.count, rejected=counts.count - counts.successes)
        yield progress


def _finish(folder: str, plans: Sequence[ShardPlan]) -> int:
    """Write the number of samples of each shard, once all are whole; returns their sum."""

    def count(plan: ShardPlan) -> tuple[str, int]:
        tar = f"{plan.name}.tar"
        stats: Mapping[str, Any] = read_record(stats_url(f"{folder}/{tar}"))
        return tar, int(stats["successes"])

    with ThreadPoolExecutor(IO_THREADS) as readers:
        counts = dict(readers.map(count, plans))
    replace_object(f"{folder}/{_COUNTS}", json.dumps(counts, indent=1, sort_keys=True).encode())
    return sum(counts.values())


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
