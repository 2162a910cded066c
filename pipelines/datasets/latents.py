"""LATENTS: the VAE latents of every usable image of a set of img2dataset shards.

shards ─ stream, select, decode ─ units of images ─ VAE encoder ─ data file ─ commit
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import pyarrow as pa

from pipelines.datasets.build import BuildOptions, Identity, build_table, model_stage
from pipelines.datasets.recompute import check_same, device_of, packed
from pipelines.datasets.settings import LatentsSettings
from pipelines.datasets.shard_plan import OnRefused, pending_shards, replayed_shard, rows_left
from pipelines.ray_data.execution import PipelineStage
from pipelines.sources.webdataset import Shard
from pipelines.stages.crop import Shape, shapes_of
from pipelines.stages.encode import EncodeLatents
from pipelines.stages.read import ReadShard
from pipelines.stages.row_filter import RowFilter, describe_filters
from pipelines.tables.commits import read_written_unit
from pipelines.tables.deletion_list import redacted_id
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import latents_schema
from pipelines.tables.table import Snapshot, TableError
from pipelines.tables.units import MAX_UNIT_BYTES, FinishedRows
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.settings import SettingsError, differences

_IDENTITY_SETTINGS = ("shards", "selection", "images", "encoding", "rows_per_unit")
"""The settings that determine rows; the others say where and how fast they are made."""


def identity_of(settings: LatentsSettings, *, model: Identity, filters: Sequence[RowFilter] = ()) -> Identity:
    """Everything that determines the rows of LATENTS but the shards, which each unit records."""
    values = settings.to_values()
    return {
        "kind": "latents",
        "model": _vae_identity(model),
        "dtype": settings.device.dtype,
        **{name: values[name] for name in _IDENTITY_SETTINGS},
        **describe_filters(filters),
    }


def _vae_identity(model: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's identity that LATENTS depend on, which models with one VAE and tokenizer share.

    No LoRA changes these, and a model that is saved no longer says what was merged into it.
    """
    vae = {name: value for name, value in model.items() if name not in ("prediction_type", "merged")}
    return {**vae, "weights": {"vae": model["weights"]["vae"]}}


def without_size(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's identity without its image size: the latent shape is reduced to the channels."""
    return {**model, "latent_shape": list(model["latent_shape"][:1])}


def image_size_of(identity: Mapping[str, Any], *, bundle: Bundle) -> int:
    """Pixels a side of the images of a table, by its identity; of buckets, the square one.

    `bundle` has the table's VAE.
    """
    latents = identity.get("latents", identity)
    size = latents["generation" if latents["kind"] == "pairs" else "images"].get("size")
    return int(size or latents["model"]["latent_shape"][1] * bundle.cell)


def check_latents(latents: Snapshot, *, bundle: Bundle) -> None:
    """Refuse LATENTS of another VAE, scale or tokenizer than the model's; their image size may differ.

    Raises:
        TableError: naming the first differences; or if there are no rows.
    """
    if latents.identity["kind"] != "latents":
        raise TableError(f"{latents.url} holds {latents.identity['kind']}; latents are needed")
    recorded = without_size(latents.identity["model"])
    if differing := list(differences(recorded, without_size(_vae_identity(bundle.describe())))):
        raise TableError(
            f"{latents.url} was made with another VAE than that of {bundle.source!r}: "
            f"{'; '.join(differing[:3])}; encode new LATENTS, or give a model with their VAE"
        )
    first = next((file for file in latents.units if file.rows), None)
    if first is None:
        raise TableError(f"{latents.url} has no committed rows at version {latents.version}")
    # The identity does not name the tokenizer, so some captions are tokenized again and compared.
    rows = latents.read_unit(first, ["caption", "token_ids"]).slice(0, 8).to_pydict()
    ids = bundle.tokenize(rows["caption"]).numpy().astype("<i4")
    if [row.tobytes() for row in ids] != rows["token_ids"]:
        # SD-v2 pads with another token than SD-v1, for example: the text encoder would misread every caption.
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
    filters: Sequence[RowFilter] = (),
    on_refused: OnRefused | None = None,
    **options: Unpack[BuildOptions],
) -> Snapshot:
    """Bring the table at `url` to hold every usable row of `shards`; returns its newest version.

    Args:
        settings: of the table.
        model: a source that `snapfusion.models.load` accepts.
        shards: as `pipelines.sources.webdataset.list_shards` gives them.
        source: a short name of the set of shards; prefix of the names of units and rows.
        url: of the table.
        filters: reject rows beside the selection.
        on_refused: called for each shard that is not the one that its committed units were read from.
        options: see `build_table`.

    Raises:
        TableError: if the table was made with other settings or another VAE, or if more shards are refused
            than `bounds.max_rejected_shards` allows.
        SettingsError: if a unit's pixels would not fit a block.
        TooManyRejected: when the rejected fraction of rows or shards exceeds its bound.
    """
    bundle = load(model)
    shapes = _shapes(settings, bundle=bundle)
    _check_unit_size(settings, shapes=shapes)
    schema = _schema(settings, bundle=bundle)
    identity = identity_of(settings, model=bundle.describe(), filters=filters)
    del bundle  # workers beside this process need the memory
    arguments = {"model": model, "settings": settings.encoding, "device": settings.device}
    return build_table(
        url,
        settings,
        schema=schema,
        identity=identity,
        pending=partial(
            pending_shards,
            shards,
            source=source,
            max_refused=settings.bounds.max_rejected_shards,
            on_refused=on_refused,
        ),
        stages=[
            _read_stage(settings, shapes=shapes, filters=filters),
            model_stage(EncodeLatents, arguments, pool=settings.encoders, schema=schema),
        ],
        count_rows=rows_left,
        **options,
    )


def file_hashes(latents: Snapshot) -> dict[str, str]:
    """The SHA-256 of each unit's file; one whose manifest is missing, because its job was killed, is read."""
    hashes = {record.unit: record.sha256 for record in latents.unit_records()}
    return {file.unit: hashes.get(file.unit) or read_written_unit(file.path).sha256 for file in latents.units}


def recomputer(
    table: Snapshot, *, model: str, shards: Sequence[Shard], source: str, filters: Sequence[RowFilter] = ()
) -> Recompute:
    """Recomputes units of LATENTS for `verify_table`: reads their shards again and encodes the images.

    Raises:
        TableError: if `model` is not the one that the table was made with.
    """
    settings = LatentsSettings.parse({name: table.identity[name] for name in _IDENTITY_SETTINGS})
    bundle = load(model)
    check_same(table, {"model": _vae_identity(bundle.describe())}, "VAE")
    shapes = _shapes(settings, bundle=bundle)
    sources = {f"{source}/{shard.name}": shard for shard in shards}
    manifests = table.manifests()

    def recompute(manifest: UnitManifest, _rows: pa.Table) -> FinishedRows:
        """Compute the rows of one unit again; see `Recompute`."""
        work, recorded, isolate = replayed_shard(
            manifest, shards=sources, manifests=manifests, filters=filters
        )
        read = _read_stage(settings, shapes=shapes, filters=recorded).create()
        device = device_of(table, manifest)
        encode = EncodeLatents(model=model, settings=settings.encoding, device=device)
        finished = encode(next(read(work, isolate=isolate)))
        deleted = {row.id for row in manifest.rejections if row.reason == "forgotten"}
        # Deleted rows are still in the shard unless it was rewritten; a shorter unit has other batches.
        if not deleted <= set(map(redacted_id, finished.columns["id"])):
            raise CannotRecompute("its shard has lost rows that were deleted, and batches depend on them")
        return finished

    return packed(_schema(settings, bundle=bundle), recompute)


def _shapes(settings: LatentsSettings, *, bundle: Bundle) -> tuple[Shape, ...]:
    """The (height, width) that images are cropped to."""
    size = settings.images.size or bundle.image_size
    return shapes_of(settings.images.buckets, size=size, step=bundle.granularity)


def _schema(settings: LatentsSettings, *, bundle: Bundle) -> pa.Schema:
    side = (settings.images.size or bundle.image_size) // bundle.cell
    shape, cell = (bundle.latent_shape[0], side, side), bundle.cell if settings.images.buckets else None
    return latents_schema(latent_shape=shape, num_tokens=bundle.tokenizer.model_max_length, cell=cell)


def _read_stage(
    settings: LatentsSettings, *, shapes: tuple[Shape, ...], filters: Sequence[RowFilter]
) -> PipelineStage:
    names = ("rows_per_unit", "shards", "images", "selection", "decode_seconds")
    arguments = {name: getattr(settings, name) for name in names}
    arguments |= {"shapes": shapes, "filters": tuple(filters)}
    return PipelineStage(build=ReadShard, arguments=arguments, pool=settings.readers)


def _check_unit_size(settings: LatentsSettings, *, shapes: Sequence[Shape]) -> None:
    height, width = max(shapes, key=math.prod)
    max_rows = MAX_UNIT_BYTES // (height * width * 3)
    if settings.rows_per_unit > max_rows:
        sides = f"{height}" if height == width else f"{height} x {width}"
        raise SettingsError(
            f"latents.rows_per_unit is {settings.rows_per_unit}; images of {sides} px allow at most "
            f"{max_rows}, so that a unit's pixels stay below 128 MiB"
        )
