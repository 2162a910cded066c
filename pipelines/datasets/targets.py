"""TARGETS: what the student is to predict for each latent and draw. SnapFusion Sec. 4.2, Eq. 7-10.

LATENTS ─ units of (LATENTS unit, draw, branch) ─ teacher, k DDIM steps ─ data file ─ commit
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import numpy as np
import pyarrow as pa

from pipelines.datasets.build import BuildOptions, Identity, build_table, model_stage
from pipelines.datasets.latents import check_latents, file_hashes, image_size_of, without_size
from pipelines.datasets.recompute import check_same, device_of, packed
from pipelines.datasets.settings import TargetsSettings, differing_targets, refused_targets
from pipelines.loading.branches import branch_and_draw, count_branch_rows, unit_name
from pipelines.loading.buckets import is_bucketed
from pipelines.ray_data.execution import PipelineStage
from pipelines.stages.read_latents import LatentFile, ReadLatents
from pipelines.stages.settings import TeacherSettings
from pipelines.stages.target import ComputeTargets
from pipelines.tables.deletion_list import REDACTED_PREFIX
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import targets_schema
from pipelines.tables.table import Snapshot, TableError
from pipelines.tables.units import FinishedRows, LatentRows, Unit
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.noise import noise_key, uniform
from snapfusion.settings import differences
from snapfusion.training.settings import BRANCHES, StepDistillationSettings


def identity_of(settings: TargetsSettings, *, model: Identity, latents: Identity) -> Identity:
    """Everything that determines the rows of TARGETS but the LATENTS' files, which each unit records.

    Args:
        settings: of the table.
        model: the teacher's identity (`Bundle.describe`).
        latents: the identity of LATENTS; without their version, so that they may grow.
    """
    return {
        "kind": "targets",
        "model": model,
        "latents": latents,
        "teaching": settings.teaching.to_values(),
        "cfg_probability": settings.cfg_probability,
        "dtype": settings.device.dtype,
    }


def compute_targets(
    settings: TargetsSettings, *, teacher: str, latents: Snapshot, url: str, **options: Unpack[BuildOptions]
) -> Snapshot:
    """Bring the table at `url` to `settings.draws` draws of every latent; returns its newest version.

    Args:
        settings: of the table.
        teacher: a source that `snapfusion.models.load` accepts.
        latents: a pinned snapshot of LATENTS, which may have grown since the last run.
        url: of the table.
        options: see `build_table`.

    Raises:
        TableError: if the table was made with other settings, another teacher or other LATENTS; or the
            LATENTS with another VAE than the teacher's.
        ValueError: if the schedule has fewer steps than the settings need.
        TooManyRejected: when the rejected fraction exceeds its bound.
    """
    bundle = load(teacher)
    settings.teaching.check_schedule(bundle.schedule.num_steps)
    check_latents(latents, bundle=bundle)
    identity = identity_of(settings, model=bundle.describe(), latents=latents.identity)
    schema = _schema(settings.teaching, bundle=bundle, latents=latents.identity)
    del bundle  # workers beside this process need the memory
    arguments = {"model": teacher, "settings": settings.teaching, "device": settings.device}
    stages = [
        PipelineStage(build=ReadLatents, arguments={}, pool=settings.readers),
        model_stage(ComputeTargets, arguments, pool=settings.teachers, schema=schema),
    ]
    pending = partial(pending_units, settings, latents=latents)
    return build_table(
        url, settings, schema=schema, identity=identity, pending=pending, stages=stages, **options
    )


def pending_units(
    settings: TargetsSettings, manifests: Iterable[UnitManifest], *, latents: Snapshot
) -> Iterator[LatentFile]:
    """The units that are not committed, draw by draw; each is made from one unit of LATENTS.

    Raises:
        TableError: if a committed unit was made from another file than the one in `latents`.
    """
    digests = {manifest.unit: manifest.source_digest for manifest in manifests}
    hashes = file_hashes(latents)
    files = [file for file in latents.units if file.rows]
    for draw, file in itertools.product(range(settings.draws), files):
        # One branch a unit: a training step takes one branch, and reads no row of the other.
        guided = is_guided_draw(settings, parent=file.unit, draw=draw)
        name, digest = unit_name(file.unit, draw=draw, guided=guided), hashes[file.unit]
        if name not in digests:
            unit = Unit(
                name=name, source=file.unit, start=0, stop=file.rows, final=True, source_digest=digest
            )
            yield LatentFile(unit=unit, draw=draw, guided=guided, path=file.path)
        elif digests[name] != digest:
            raise TableError(
                f"unit {name} was made from another file than {file.path}; give the LATENTS that it was made "
                "from, or a new table; if jobs.forget was stopped, run it again first"
            )


def is_guided_draw(settings: TargetsSettings, *, parent: str, draw: int) -> bool:
    """Whether draw number `draw` of the LATENTS unit `parent` is guided. SnapFusion Eq. 11.

    Of the first D draws of a unit D p are guided, rounded up or down by the unit's name: so a fraction p of
    the table is, for any number of draws, and further draws change none.
    """
    p = settings.cfg_probability
    offset = float(uniform(noise_key("guided draw", settings.teaching.seed, parent), 1)[0])
    return math.floor((draw + 1) * p + offset) > math.floor(draw * p + offset)


def check_targets(
    table: Snapshot, *, teacher: Identity, student: Identity, steps: StepDistillationSettings
) -> None:
    """Refuse TARGETS that do not fit a training.

    Args:
        table: TARGETS.
        teacher: identity of the training's teacher (`Bundle.describe`).
        student: identity of the student with its initial weights.
        steps: settings of the training; of a branch that it never takes nothing is compared.

    Raises:
        TableError: naming the first differences.
    """
    identity = table.identity
    if identity["kind"] != "targets":
        raise TableError(f"{table.url} holds {identity['kind']}; targets are needed")
    p = steps.cfg_probability
    guided, vanilla = p > 0.0, p < 1.0
    differing = [
        *differing_targets(identity["teaching"], steps),
        *differences(identity["model"], teacher, "teacher"),
        *differences(_shared_with_student(identity["model"]), _shared_with_student(student), "student"),
    ]
    if differing:
        raise TableError(refused_targets(table.url, differing))
    for branch, needed in ((True, guided), (False, vanilla)):
        if needed and not count_branch_rows(table, guided=branch):
            raise TableError(
                f"{table.url} has no {BRANCHES[branch]} rows, and a CFG probability of {p} needs some; "
                "compute more draws, or a new table with targets.cfg_probability "
                + ("above 0" if branch else "below 1")
            )


def recomputer(table: Snapshot, *, teacher: str, latents: Snapshot) -> Recompute:
    """Recomputes units of TARGETS for `verify_table`, from LATENTS.

    Raises:
        TableError: if `teacher` or `latents` are not those that the table was made with.
    """
    teaching = TeacherSettings.parse(table.identity["teaching"])
    bundle = load(teacher)
    check_same(table, {"model": bundle.describe()}, "teacher")
    check_same(table, {"latents": latents.identity}, f"identity of LATENTS than that of {latents.url}")
    paths = {file.unit: file.path for file in latents.units}

    def recompute(manifest: UnitManifest, _rows: pa.Table) -> FinishedRows:
        """Compute the rows of one unit again; see `Recompute`."""
        if "crashed" in manifest.rejected():
            raise CannotRecompute("its rows killed every worker that tried them")
        if manifest.source not in paths:
            raise CannotRecompute(f"its LATENTS unit {manifest.source} is not in {latents.url}")
        guided, draw = branch_and_draw(manifest.unit)
        stage = ComputeTargets(model=teacher, settings=teaching, device=device_of(table, manifest))
        path = paths[manifest.source]
        rows = ReadLatents()(LatentFile(unit=Unit.of(manifest), draw=draw, guided=guided, path=path))
        return stage(_original_rows(rows, manifest, table=table))

    return packed(_schema(teaching, bundle=bundle, latents=latents.identity), recompute)


def _original_rows(rows: LatentRows, manifest: UnitManifest, *, table: Snapshot) -> LatentRows:
    """The rows that a unit was made from, with zeros for rows of LATENTS that were deleted since.

    Bits depend on the size of a batch and a row's position in it, but not on the other rows' values.
    """
    deleted = [row for row in manifest.rejections if row.id.startswith(REDACTED_PREFIX)]
    if not deleted:
        return rows
    if not rows.ids:
        raise CannotRecompute("all of its rows were deleted")
    if is_bucketed(table.identity):
        raise CannotRecompute("rows of it were deleted, and their shapes with them, on which batches depend")
    if len(rows.ids) + len(deleted) != manifest.rows_read:
        raise CannotRecompute("undeleted rows are missing from its LATENTS unit; run jobs.forget again")
    ids, source_ids, latents = list(rows.ids), list(rows.source_ids), list(rows.latents)
    token_ids = rows.token_ids
    for row in sorted(deleted, key=lambda row: row.ordinal):
        id_ = row.id.rpartition("#")[0]
        ids.insert(row.ordinal, id_)
        source_ids.insert(row.ordinal, id_)
        latents.insert(row.ordinal, np.zeros_like(rows.latents[0]))
        token_ids = np.insert(token_ids, row.ordinal, 0, axis=0)
    return replace(rows, ids=ids, source_ids=source_ids, latents=latents, token_ids=token_ids)


def _schema(teaching: TeacherSettings, *, bundle: Bundle, latents: Mapping[str, Any]) -> pa.Schema:
    side = image_size_of(latents, bundle=bundle) // bundle.cell
    shape, cell = (bundle.latent_shape[0], side, side), bundle.cell if is_bucketed(latents) else None
    tokens = bundle.tokenizer.model_max_length
    return targets_schema(latent_shape=shape, num_tokens=tokens, x_dtype=teaching.x_dtype, cell=cell)


def _shared_with_student(model: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's identity that student and teacher share: latents, times, conditions (App. D)."""
    shared = {name: without_size(model)[name] for name in ("scaling_factor", "latent_shape", "schedule")}
    return {**shared, "weights": {name: model["weights"][name] for name in ("text_encoder", "vae")}}
