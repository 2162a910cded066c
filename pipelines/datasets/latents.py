"""LATENTS: what the VAE makes of every usable image of a set of shards.

shards ─ stream, select, decode ─ units of images ─ encode ─ data file ─ commit
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipelines.datasets.settings import LatentsSettings
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.rejections import Rejected
from pipelines.sources.webdataset import Shard, count_rows
from pipelines.stages.crop import Shape, shapes_of
from pipelines.stages.deletion_filter import DeletionFilter, RecordedDeletionFilter
from pipelines.stages.encode import EncodeLatents
from pipelines.stages.read import ReadShard, ShardWork, shard_digest
from pipelines.stages.row_filter import RowFilter
from pipelines.stages.settings import Device
from pipelines.stages.write import WriteUnit, pack
from pipelines.storage.objects import IO_THREADS
from pipelines.tables.commits import Origin
from pipelines.tables.committer import OnProgress, commit_stream, recover, take_rows
from pipelines.tables.deletion_list import redacted_id
from pipelines.tables.manifest import UnitManifest, covers_source
from pipelines.tables.schemas import latents_schema
from pipelines.tables.table import Snapshot, TableError, create_table
from pipelines.tables.units import MAX_UNIT_BYTES, FinishedRows, ImageRows, committed_ranges
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.settings import SettingsError, differences, digest

_MAX_COUNTED_SHARDS = 256
"""Shards that are asked for the number of their rows."""

_IN_IDENTITY = ("shards", "selection", "images", "encoding", "rows_per_unit")
"""The settings that determine rows; the others say where and how fast."""


def identity_of(
    settings: LatentsSettings, *, model: dict[str, Any], vetoes: Sequence[RowFilter] = ()
) -> dict[str, Any]:
    """Everything that determines the rows of LATENTS, the shards apart (each unit states its own)."""
    told = {name: value for veto in vetoes for name, value in veto.describe().items()}
    values = settings.to_values()
    return {
        "kind": "latents",
        "model": _vae_identity(model),
        "dtype": settings.device.dtype,
        **{name: values[name] for name in _IN_IDENTITY},
        **told,
    }


def _vae_identity(model: dict[str, Any]) -> dict[str, Any]:
    """Of what identifies a model, the part that LATENTS depend on: another UNet makes no other latents."""
    vae = {**model, "weights": {"vae": model["weights"]["vae"]}}
    vae.pop("prediction_type")
    return vae


def without_size(model: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a model, but for the size of its pictures: of the latent's shape, the channels."""
    return {**model, "latent_shape": list(model["latent_shape"][:1])}


def image_size_of(identity: Mapping[str, Any], *, bundle: Bundle) -> int:
    """The side in pixels of the pictures in LATENTS, or TARGETS, by the table's identity.

    In buckets it is that of the square one. `bundle` has the table's VAE.
    """
    latents = identity.get("latents", identity)
    stated = latents["images"].get("size")
    return int(stated or latents["model"]["latent_shape"][1] * bundle.cell)


def check_latents(latents: Snapshot, *, bundle: Bundle) -> None:
    """Refuse LATENTS that a model cannot be trained on or asked about: of another VAE, scale or tokenizer.

    Their size may be another than that of the model's own pictures.

    Raises:
        TableError: naming the first differences; or if there are no rows.
    """
    if latents.identity["kind"] != "latents":
        raise TableError(f"{latents.url} holds {latents.identity['kind']}; latents are needed")
    made, wanted = without_size(latents.identity["model"]), without_size(_vae_identity(bundle.describe()))
    differing = list(differences(made, wanted))
    if differing:
        raise TableError(
            f"{latents.url} was made with another VAE than that of {bundle.source!r}: "
            f"{'; '.join(differing[:3])}; encode new LATENTS, or give a model with their VAE"
        )
    first = next((file for file in latents.units if file.rows), None)
    if first is None:
        raise TableError(f"{latents.url} has no committed rows at version {latents.version}")
    rows = latents.read_unit(first, ["caption", "token_ids"]).slice(0, 8).to_pydict()
    ids = bundle.tokenize(rows["caption"]).numpy().astype("<i4")
    if [row.tobytes() for row in ids] != rows["token_ids"]:
        # SD-v2 pads with another token than SD-v1, for one: its encoder would be given strange sentences.
        raise TableError(
            f"{latents.url} holds token ids of another tokenizer than that of {bundle.source!r}; encode new "
            "LATENTS with it"
        )


def encode_latents(
    settings: LatentsSettings,
    *,
    model: str,
    shards: Sequence[Shard],
    source: str,
    url: str,
    vetoes: Sequence[RowFilter] = (),
    origin: Origin | None = None,
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Bring the table at `url` to hold every usable row of `shards`; returns its newest version.

    Args:
        settings: how.
        model: a source that `snapfusion.models.load` accepts.
        shards: as `pipelines.sources.webdataset.list_shards` gives them.
        source: a short name of the set of shards; units and rows are named after it.
        url: of the table.
        vetoes: what refuses rows beside the selection.
        origin: who makes the new units, and from what; kept beside their accounts.
        run: what sends shards through the stages.
        on_progress: called after each unit.

    Raises:
        TableError: if the table was made with other settings, another VAE or other shards of these names.
        SettingsError: if a unit's pixels would not fit a block.
        TooManyRejected: when the rejected fraction is above its bound.
    """
    bundle = load(model)
    shapes = _shapes(settings, bundle=bundle)
    _check_unit_size(settings, shapes=shapes)
    schema = _schema(settings, bundle=bundle)
    table = create_table(
        url, schema=schema, identity=identity_of(settings, model=bundle.describe(), vetoes=vetoes)
    )
    del bundle  # workers beside this process need the memory
    table = recover(table, origin=origin)
    waiting = pending_shards(shards, source=source, accounts=table.manifests().values())
    items = take_rows(waiting, bounds=settings.bounds, rows=rows_left_in)
    stages = [
        PipelineStage(
            build=ReadShard,
            arguments={**_reader_arguments(settings, shapes=shapes), "vetoes": tuple(vetoes)},
            pool=settings.readers,
        ),
        PipelineStage(
            build=EncodeLatents,
            arguments={"model": model, "settings": settings.encoding, "device": settings.device},
            pool=settings.encoders,
            give_up=set_aside,
        ),
        PipelineStage(
            build=WriteUnit,
            arguments={"url": table.url, "schema": schema, "settings": digest(table.identity)},
            pool=settings.writers,
        ),
    ]
    total = rows_left(items) if on_progress else None
    return commit_stream(
        table,
        run(items, stages),
        bounds=settings.bounds,
        total=total,
        origin=origin,
        on_progress=on_progress,
    )


def pending_shards(
    shards: Iterable[Shard], *, source: str, accounts: Iterable[UnitManifest]
) -> Iterator[ShardWork]:
    """The shards that are not wholly committed, with what of them is.

    Raises:
        TableError: if a committed unit was read from a shard of the same name and another size.
    """
    known: dict[str, list[UnitManifest]] = defaultdict(list)
    for account in accounts:
        known[account.source].append(account)
    for shard in shards:
        name = f"{source}/{shard.name}"
        for account in known[name]:
            if account.source_digest != shard_digest(shard):
                raise TableError(
                    f"{shard.url} is not the shard that unit {account.unit} was read from: its size differs; "
                    "give the set of shards another source name"
                )
        if not covers_source(known[name]):
            yield ShardWork(shard=shard, source=name, committed=tuple(committed_ranges(known[name], name)))


def recomputer(
    table: Snapshot, *, model: str, shards: Sequence[Shard], source: str, vetoes: Sequence[RowFilter] = ()
) -> Recompute:
    """What `verify_table` needs to make units of LATENTS again: the shards are read, the images encoded.

    Raises:
        TableError: if `model` is not the one that the table was made with.
    """
    settings = LatentsSettings.parse({name: table.identity[name] for name in _IN_IDENTITY})
    bundle = load(model)
    if table.identity["model"] != identity_of(settings, model=bundle.describe())["model"]:
        raise TableError(f"{table.url} was made with another VAE than {model!r}; name the one it was")
    schema = _schema(settings, bundle=bundle)
    known = {f"{source}/{shard.name}": shard for shard in shards}
    shapes = _shapes(settings, bundle=bundle)
    others = [veto for veto in vetoes if not isinstance(veto, DeletionFilter)]

    def make(account: UnitManifest, _rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        if account.source not in known:
            raise CannotRecompute(f"its shard {account.source} is not among those given")
        work = ShardWork(shard=known[account.source], source=account.source, committed=((0, account.start),))
        withheld = RecordedDeletionFilter(row.id for row in account.rejections if row.reason == "withheld")
        reader = ReadShard(**_reader_arguments(settings, shapes=shapes), vetoes=(withheld, *others))
        # An image that once took a worker down must not take this process down.
        read = reader.isolated if "crashed" in account.rejected() else reader
        device = Device(dtype=table.identity["dtype"], threads=account.environment["threads"])
        encoder = EncodeLatents(model=model, settings=settings.encoding, device=device)
        finished = encoder(next(read(work)))
        gone = {row.id for row in account.rejections if row.reason == "forgotten"}
        if not gone <= set(map(redacted_id, finished.columns["id"])):
            raise CannotRecompute("its shard has lost rows that were forgotten, and batches depend on them")
        return pack(finished, schema), finished.environment

    return make


def set_aside(rows: ImageRows) -> FinishedRows:
    """A unit that took down every worker that tried it: all its rows rejected, none lost from the account."""
    crashed = [
        Rejected("crashed", "the encoder's worker died at every try").record(
            id=id_, source=rows.unit.source, ordinal=rows.unit.start
        )
        for id_ in rows.ids
    ]
    names = latents_schema(latent_shape=(1, 1, 1), num_tokens=1, cell=1).names
    return FinishedRows(
        unit=rows.unit, columns={name: [] for name in names}, rejections=[*rows.rejections, *crashed]
    )


def _shapes(settings: LatentsSettings, *, bundle: Bundle) -> tuple[Shape, ...]:
    """What pictures become: height and width."""
    size = settings.images.size or bundle.image_size
    return shapes_of(settings.images.buckets, size=size, step=bundle.granularity)


def _schema(settings: LatentsSettings, *, bundle: Bundle) -> pa.Schema:
    side = (settings.images.size or bundle.image_size) // bundle.cell
    return latents_schema(
        latent_shape=(bundle.latent_shape[0], side, side),
        num_tokens=bundle.tokenizer.model_max_length,
        cell=None if settings.images.buckets is None else bundle.cell,
    )


def _reader_arguments(settings: LatentsSettings, *, shapes: tuple[Shape, ...]) -> dict[str, Any]:
    return {
        "shapes": shapes,
        "rows_per_unit": settings.rows_per_unit,
        "shards": settings.shards,
        "images": settings.images,
        "selection": settings.selection,
    }


def rows_left(items: Sequence[ShardWork]) -> int | None:
    """Rows that are still to be read, by the sidecars' count; None if a shard has no sidecar.

    Of very many shards some are asked, and the others taken to have as many rows to a byte: each is a round
    trip to the store.
    """
    asked = items[:: len(items) // _MAX_COUNTED_SHARDS + 1]
    with ThreadPoolExecutor(IO_THREADS) as readers:
        counts = list(readers.map(count_rows, [work.shard for work in asked]))
    if None in counts:
        return None
    told = sum(count for count in counts if count is not None)
    share = sum(work.shard.size for work in items) / max(sum(work.shard.size for work in asked), 1)
    return max(round(told * share) - sum(map(_committed_rows, items)), 0)


def rows_left_in(work: ShardWork) -> int | None:
    """The same of one shard."""
    return rows_left([work])


def _committed_rows(work: ShardWork) -> int:
    return sum(stop - start for start, stop in work.committed)


def _check_unit_size(settings: LatentsSettings, *, shapes: Sequence[Shape]) -> None:
    height, width = max(shapes, key=math.prod)
    most = MAX_UNIT_BYTES // (height * width * 3)
    if settings.rows_per_unit > most:
        sides = f"{height}" if height == width else f"{height} x {width}"
        raise SettingsError(
            f"latents.rows_per_unit is {settings.rows_per_unit}; images of {sides} px allow at most {most}, "
            "so that a unit's pixels stay below 128 MiB"
        )
