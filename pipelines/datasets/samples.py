"""SAMPLES: a model's images for each caption at each guidance, and their scores. SnapFusion Sec. 5.

captions ─ units of (caption range, guidance) ─ model and solver ─ metric networks ─ data file ─ commit
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Unpack, get_args

import numpy as np
import pyarrow as pa

from pipelines.datasets.build import BuildOptions, Identity, build_table, check_list
from pipelines.datasets.pairs import caption_units, captions_in
from pipelines.datasets.recompute import check_same, device_of, packed
from pipelines.datasets.settings import SamplesSettings
from pipelines.ray_data.execution import PipelineStage
from pipelines.sources.captions import CaptionRow, captions_digest
from pipelines.stages.crop import check_size
from pipelines.stages.metric_networks import describe_features, describe_preferences, describe_scorer
from pipelines.stages.sample import SampleAndScore
from pipelines.stages.settings import Device, Sampler
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import from_png, read_array, samples_schema
from pipelines.tables.table import Snapshot, TableError
from pipelines.tables.unit_files import UnitFile
from pipelines.tables.units import FinishedRows, PromptRows, Unit
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.metrics.settings import Preference
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.decoder import load_decoder
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.models.load import load
from snapfusion.settings import SettingsError

Cuts = Mapping[str, tuple[str, ...]]
"""Blocks that the UNet skips, by a short name for the set of them."""

_SIZE_SETTING = "samples.drawing.size"
_WITHOUT = ".without."


def identity_of(
    settings: SamplesSettings,
    *,
    sampler: Sampler,
    bundle: Bundle,
    cuts: Cuts | None = None,
    decoder: str | None = None,
) -> Identity:
    """Everything that determines the rows of SAMPLES but captions and guidance, which each unit records."""
    optional: dict[str, Any] = {}
    # Absent unless given, so that tables made before these options existed keep their identity.
    if cuts:
        optional["cuts"] = {name: list(blocks) for name, blocks in cuts.items()}
    if decoder is not None:
        optional["decoder"] = weight_hash(load_decoder(decoder))
    if settings.judging.preferences:
        optional["preferences"] = describe_preferences(settings.judging.preferences)
    return {
        **optional,
        "kind": "samples",
        "model": bundle.describe(),
        "told_w": has_guidance_embedding(bundle.unet),
        "sampler": sampler.identity(),
        "drawing": settings.drawing.to_values(),
        "features": describe_features(settings.judging.features),
        "scorer": describe_scorer(settings.judging.scorer),
        "rows_per_unit": settings.rows_per_unit,
        "dtype": settings.device.dtype,
    }


def generate_samples(
    settings: SamplesSettings,
    *,
    model: str,
    sampler: Sampler,
    guidance: Sequence[float],
    captions: Sequence[CaptionRow],
    source: str,
    url: str,
    cuts: Cuts | None = None,
    decoder: str | None = None,
    **options: Unpack[BuildOptions],
) -> Snapshot:
    """Bring the table at `url` to all captions at every guidance; returns its newest version.

    A guidance or caption that is added later adds units and changes none.

    Args:
        settings: of the table.
        model: a source that `snapfusion.models.load` accepts.
        sampler: solver and steps.
        guidance: scales w, each at least 1.
        captions: in order; the list may have grown at its end.
        source: a short name of the list; units are named after it and the guidance.
        url: of the table.
        cuts: sets of blocks that the UNet skips, one after the other, after the whole UNet.
        decoder: the folder of a half-width decoder; None takes the model's own.
        options: see `build_table`.

    Raises:
        TableError: if the table was made with other settings, another model or other captions.
        SettingsError: if the model cannot generate images of that size, or the oracle not read them.
        TooManyRejected: when the rejected fraction exceeds its bound.
    """
    bundle = load(model)
    _check_size(settings, bundle=bundle)
    identity = identity_of(settings, sampler=sampler, bundle=bundle, cuts=cuts, decoder=decoder)
    del bundle  # workers beside this process need the memory
    pending = partial(pending_units, settings, guidance=guidance, captions=captions, source=source, cuts=cuts)
    stage = _stage(settings, model=model, sampler=sampler, device=settings.device, decoder=decoder)
    return build_table(
        url, settings, schema=_schema(settings), identity=identity, pending=pending, stages=[stage], **options
    )


def pending_units(
    settings: SamplesSettings,
    manifests: Sequence[UnitManifest],
    *,
    guidance: Sequence[float],
    captions: Sequence[CaptionRow],
    source: str,
    cuts: Cuts | None = None,
) -> Iterator[PromptRows]:
    """The units that are not committed, cut by cut and guidance by guidance.

    Raises:
        TableError: if a committed unit was made from other captions than those given.
    """
    choices = list(product({"": (), **(cuts or {})}.items(), guidance))
    names = [source_name(source, w, cut=cut) for (cut, _), w in choices]
    check_list(captions, manifests, sources=names, digest=captions_digest)
    for ((cut, blocks), w), name in zip(choices, names, strict=True):
        for unit, accepted, rejections in caption_units(
            captions, manifests, source=name, rows_per_unit=settings.rows_per_unit
        ):
            rows = PromptRows(unit=unit, w=w, captions=accepted, cut=cut, without=tuple(blocks))
            renamed = [replace(row, id=rows.row_id(row.id), source=name) for row in rejections]
            yield replace(rows, rejections=renamed)


def recomputer(
    table: Snapshot, *, settings: SamplesSettings, model: str, decoder: str | None = None
) -> Recompute:
    """Recomputes units of SAMPLES for `verify_table`, from the captions and guidance in their rows.

    Raises:
        TableError: if the table was made with another model, decoder, metric or other settings.
    """
    sampler = Sampler.parse(table.identity["sampler"])
    cuts = table.identity.get("cuts", {})
    identity = identity_of(settings, sampler=sampler, bundle=load(model), cuts=cuts, decoder=decoder)
    check_same(table, {"decoder": None, "preferences": None, **identity}, "model or other settings")

    def recompute(manifest: UnitManifest, rows: pa.Table) -> FinishedRows:
        """Compute the rows of one unit again; see `Recompute`."""
        if "not_finite" in manifest.rejected():
            raise CannotRecompute("rows that the model failed on are not in it, and batches depend on them")
        captions = captions_in(rows, [0] * rows.num_rows)
        device = device_of(table, manifest)
        stage = _stage(settings, model=model, sampler=sampler, device=device, decoder=decoder)
        w, cut = _parse_source_name(manifest.source)
        blocks = tuple(cuts.get(cut, ()))
        rows = PromptRows(unit=Unit.of(manifest), w=w, captions=captions, cut=cut, without=blocks)
        return stage.create()(rows)

    return packed(_schema(settings), recompute)


def _stage(
    settings: SamplesSettings, *, model: str, sampler: Sampler, device: Device, decoder: str | None
) -> PipelineStage:
    arguments = {"model": model, "sampler": sampler, "device": device, "decoder": decoder}
    scoring = {"sampling": settings.drawing, "metrics": settings.judging}
    return PipelineStage(build=SampleAndScore, arguments=arguments | scoring, pool=settings.models)


def _schema(settings: SamplesSettings) -> pa.Schema:
    metrics = settings.judging
    return samples_schema(
        features=metrics.feature_count,
        attributes=metrics.attribute_count,
        preferences=[one.name for one in metrics.preferences],
    )


def source_name(source: str, w: float, *, cut: str = "") -> str:
    """The name of a caption list at guidance `w`; names sort by guidance.

    Args:
        source: name of the list.
        w: guidance.
        cut: name of the blocks that the UNet skips; empty for the whole UNet.

    Raises:
        ValueError: unless 1 <= w < 1000, in steps of 0.001.
    """
    if not 1.0 <= w < 1000.0 or round(w, 3) != w:
        raise ValueError(f"guidance is {w}; 1 to 999.999, in steps of 0.001, is accepted")
    # Zero-padded, because units are read in order of their names.
    return f"{source}{_WITHOUT}{cut}-w{w:07.3f}" if cut else f"{source}-w{w:07.3f}"


def _parse_source_name(name: str) -> tuple[float, str]:
    """The guidance and the cut in a source's name."""
    rest, _, w = name.rpartition("-w")
    return float(w), rest.partition(_WITHOUT)[2]


def _check_size(settings: SamplesSettings, *, bundle: Bundle) -> None:
    size, oracle_size = settings.drawing.size or bundle.image_size, settings.judging.side
    check_size(size, step=bundle.granularity, option=_SIZE_SETTING)
    if oracle_size not in (None, size):
        raise SettingsError(
            f"{_SIZE_SETTING} is {size}; the miniature's oracle reads images of {oracle_size} px: give that "
            "size, or set samples.judging"
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one model's images at one guidance, in order of the captions.

    Attributes:
        ids: of the captions.
        clip: float32 [n].
        preferences: PickScore and HPSv2, those that were computed, by name: float32 [n].
        right: whether each attribute is as the caption says, uint8 [n,5]; None without the oracle.
    """

    ids: list[str]
    clip: np.ndarray
    preferences: Mapping[str, np.ndarray]
    right: np.ndarray | None


def read_scores(table: Snapshot, *, source: str, w: float, cut: str = "") -> Scores:
    """The scores of one caption list at one guidance and cut, in order of the list.

    Raises:
        TableError: if the table has none.
    """
    preferences = [name for name in get_args(Preference) if name in table.columns]
    columns = ["source_id", "clip", *preferences, *(["right"] if "right" in table.columns else [])]
    units = _units_with_rows(table, source=source, w=w, cut=cut)
    rows = pa.concat_tables([table.read_unit(file, columns) for file in units])
    return Scores(
        ids=rows.column("source_id").to_pylist(),
        clip=rows.column("clip").to_numpy(),
        preferences={name: rows.column(name).to_numpy() for name in preferences},
        right=read_array(rows, "right") if "right" in rows.column_names else None,
    )


def read_features(
    table: Snapshot, *, source: str, w: float, cut: str = "", ids: Sequence[str] | None = None
) -> np.ndarray:
    """Features of the images of one caption list at one guidance and cut, float32 [n,D].

    Unit by unit, so that nothing but the result has their size.

    Args:
        table: SAMPLES.
        source: name of the list.
        w: guidance.
        cut: name of the blocks that the UNet skips.
        ids: of captions, all of which have an image; None takes all in order of the list.

    Raises:
        TableError: if the table has none.
    """
    units = _units_with_rows(table, source=source, w=w, cut=cut)
    if ids is None:
        ids = sampled_ids(table, source=source, w=w, cut=cut)
    position = {id_: index for index, id_ in enumerate(ids)}
    features = np.empty((len(ids), 0), dtype=np.float32)
    for file in units:
        rows = table.read_unit(file, ["source_id", "features"])
        found = [(position.get(id_), row) for row, id_ in enumerate(rows.column("source_id").to_pylist())]
        kept = [(index, row) for index, row in found if index is not None]
        part = read_array(rows, "features")
        if features.shape[1] == 0:
            features = np.empty((len(ids), part.shape[1]), dtype=np.float32)
        if kept:
            indices, chosen = map(list, zip(*kept, strict=True))
            features[indices] = part[chosen]
    return features


def read_images(table: Snapshot, *, source: str, w: float, ids: Sequence[str]) -> np.ndarray:
    """Images of some captions of a list at one guidance, uint8 [n,H,W,3] in order of `ids`.

    Raises:
        TableError: if the table has none, or was made without images.
    """
    position = {id_: index for index, id_ in enumerate(ids)}
    images: dict[int, np.ndarray] = {}
    for file in _units_with_rows(table, source=source, w=w, cut=""):
        found = table.read_unit(file, ["source_id"]).column("source_id").to_pylist()
        rows = [row for row, id_ in enumerate(found) if id_ in position]
        if rows:
            stored = table.read_unit(file, ["image"]).column("image").take(rows).to_pylist()
            if None in stored:
                raise TableError(f"{table.url} has no images; set evaluation.samples.drawing.images=true")
            images |= {position[found[row]]: from_png(png) for row, png in zip(rows, stored, strict=True)}
    return np.stack([images[index] for index in range(len(ids))])


def seconds_per_image(table: Snapshot, *, source: str, w: float) -> float | None:
    """Seconds of a worker for an image at one guidance, sampled and scored; None where they were not kept."""
    names = {file.unit for file in _units_of(table, source=source, w=w)}
    records = [record for record in table.unit_records() if record.unit in names]
    seconds = [record.seconds for record in records if record.seconds is not None]
    rows = sum(record.rows_written for record in records if record.seconds is not None)
    return sum(seconds) / rows if rows else None


def sampled_ids(table: Snapshot, *, source: str, w: float, cut: str = "") -> list[str]:
    """The ids of the captions that were sampled at one guidance and cut, in order of the list."""
    units = _units_of(table, source=source, w=w, cut=cut)
    columns = [table.read_unit(file, ["source_id"]).column("source_id") for file in units]
    return [id_ for column in columns for id_ in column.to_pylist()]


def _units_with_rows(table: Snapshot, *, source: str, w: float, cut: str) -> list[UnitFile]:
    units = [file for file in _units_of(table, source=source, w=w, cut=cut) if file.rows]
    if not units:
        raise TableError(f"{table.url} has no rows of {source} at guidance {w:g}{cut and ' without '}{cut}")
    return units


def _units_of(table: Snapshot, *, source: str, w: float, cut: str = "") -> list[UnitFile]:
    # Unit names sort as the captions do, and so do a snapshot's units.
    prefix = f"{source_name(source, w, cut=cut)}-"
    return [file for file in table.units if file.unit.startswith(prefix)]
