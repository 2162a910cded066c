"""TARGETS: what the student should predict, for each latent and draw. SnapFusion Sec. 4.2, Eq. 7-10.

LATENTS ─ units of (LATENTS unit, draw, branch) ─ teacher, k DDIM steps ─ data file ─ commit
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.datasets.latents import check_latents, image_size_of, without_size
from pipelines.datasets.settings import TargetsSettings
from pipelines.loading.branches import branch_and_draw, count_branch_rows, unit_name
from pipelines.loading.buckets import is_bucketed
from pipelines.ray_data.execution import PipelineStage, Runner, run_on_ray
from pipelines.rejections import Rejected
from pipelines.stages.latents import LatentFile, ReadLatents
from pipelines.stages.settings import Device, TeacherSettings
from pipelines.stages.target import ComputeTargets
from pipelines.stages.write import WriteUnit, pack
from pipelines.tables.commits import Origin, read_written_unit
from pipelines.tables.committer import OnProgress, commit_stream, recover, take_rows
from pipelines.tables.deletion_list import REDACTED_PREFIX
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.schemas import targets_schema
from pipelines.tables.table import Snapshot, TableError, create_table
from pipelines.tables.units import FinishedRows, LatentRows, Unit
from pipelines.tables.verification import CannotRecompute, Recompute
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.noise import noise_key, uniform
from snapfusion.sampling import time_grid
from snapfusion.settings import SettingsError, differences, digest
from snapfusion.training.settings import StepDistillationSettings
from snapfusion.training.step_distillation import BRANCHES

_UNIT_FIELDS = ("source", "start", "stop", "final", "source_digest")


def identity_of(
    settings: TargetsSettings, *, model: dict[str, Any], latents: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that determines the rows of TARGETS, the LATENTS' files apart (each unit states its own).

    Args:
        settings: how.
        model: what identifies the teacher (`Bundle.describe`).
        latents: the identity of LATENTS. Their version is no part of it, so that they may grow; it is kept
            with each unit's account.
    """
    return {
        "kind": "targets",
        "model": model,
        "latents": dict(latents),
        "teaching": settings.teaching.to_values(),
        "cfg_probability": settings.cfg_probability,
        "dtype": settings.device.dtype,
    }


def compute_targets(
    settings: TargetsSettings,
    *,
    teacher: str,
    latents: Snapshot,
    url: str,
    origin: Origin | None = None,
    run: Runner = run_on_ray,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Bring the table at `url` to `settings.draws` draws of every latent; returns its newest version.

    Args:
        settings: how.
        teacher: a source that `snapfusion.models.load` accepts.
        latents: a pinned snapshot of LATENTS; one that grew since the last run is gone on with.
        url: of the table.
        origin: who makes the new units, and from what; kept beside their accounts.
        run: what sends units through the stages.
        on_progress: called after each unit.

    Raises:
        TableError: if the table was made with other settings, another teacher or other LATENTS; or the
            LATENTS with another VAE than the teacher's.
        SettingsError: if the schedule has no grid as fine as the settings ask for.
        TooManyRejected: when the rejected fraction is above its bound.
    """
    bundle = load(teacher)
    _check_grid(settings.teaching, schedule_steps=bundle.schedule.num_steps)
    check_latents(latents, bundle=bundle)
    identity = identity_of(settings, model=bundle.describe(), latents=latents.identity)
    schema = _schema(settings.teaching, bundle=bundle, latents=latents.identity)
    del bundle  # workers beside this process need the memory
    table = create_table(url, schema=schema, identity=identity)
    table = recover(table, origin=origin)
    waiting = pending_units(settings, latents=latents, accounts=table.manifests().values())
    items = take_rows(waiting, bounds=settings.bounds, rows=lambda item: item.unit.rows_read)
    stages = [
        PipelineStage(build=ReadLatents, arguments={}, pool=settings.readers),
        PipelineStage(
            build=ComputeTargets,
            arguments={"teacher": teacher, "settings": settings.teaching, "device": settings.device},
            pool=settings.teachers,
            give_up=set_aside,
        ),
        PipelineStage(
            build=WriteUnit,
            arguments={"url": table.url, "schema": schema, "settings": digest(table.identity)},
            pool=settings.writers,
        ),
    ]
    return commit_stream(
        table,
        run(items, stages),
        bounds=settings.bounds,
        total=sum(item.unit.rows_read for item in items),
        origin=origin,
        on_progress=on_progress,
    )


def pending_units(
    settings: TargetsSettings, *, latents: Snapshot, accounts: Iterable[UnitManifest]
) -> Iterator[LatentFile]:
    """The units that are not committed, draw by draw; each is one unit of LATENTS.

    Raises:
        TableError: if a committed unit was made from another file than the one in `latents`.
    """
    made_from = {account.unit: account.source_digest for account in accounts}
    hashes = {record["unit"]: record["sha256"] for record in latents.unit_records()}
    files = [file for file in latents.units if file.rows]
    for draw in range(settings.draws):
        for file in files:
            # A unit whose account was lost when its job was killed is hashed here.
            sha256 = hashes[file.unit] if file.unit in hashes else read_written_unit(file.path).sha256
            guided = is_guided_draw(settings, parent=file.unit, draw=draw)
            name = unit_name(file.unit, draw=draw, guided=guided)
            if name in made_from:
                if made_from[name] != sha256:
                    raise TableError(
                        f"unit {name} was made from another file than {file.path}; give the LATENTS that it "
                        "was made from, or a new table; if jobs.forget was stopped, run it again first"
                    )
                continue
            unit = Unit(
                name=name,
                source=file.unit,
                start=0,
                stop=file.rows,
                final=True,
                source_digest=sha256,
            )
            yield LatentFile(unit=unit, draw=draw, guided=guided, path=file.path)


def is_guided_draw(settings: TargetsSettings, *, parent: str, draw: int) -> bool:
    """Whether draw number `draw` of the LATENTS unit `parent` is guided.

    Of the first D draws of a unit, D p are guided, rounded up or down as the unit's name decides: so a table
    has p of them, of however many draws, and more draws change none. SnapFusion Eq. 11.
    """
    p = settings.cfg_probability
    offset = float(uniform(noise_key("guided draw", settings.teaching.seed, parent), 1)[0])
    return math.floor((draw + 1) * p + offset) > math.floor(draw * p + offset)


def check_targets(
    table: Snapshot,
    *,
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    steps: StepDistillationSettings,
) -> None:
    """Refuse a table of TARGETS that does not serve a training.

    Args:
        table: TARGETS.
        teacher: what identifies the teacher that the training names (`Bundle.describe`).
        student: what identifies the student at its first weights.
        steps: of the training. `cfg_range` only matters to guided steps, `caption_dropout` to vanilla ones.

    Raises:
        TableError: naming the first differences.
    """
    found = table.identity
    if found["kind"] != "targets":
        raise TableError(f"{table.url} holds {found['kind']}; targets are needed")
    wanted = {
        "teacher": dict(teacher),
        "student_steps": steps.student_steps,
        "k": steps.k,
        "cfg_range": steps.cfg_range.to_values(),
        "caption_dropout": steps.caption_dropout,
    }
    guided, vanilla = steps.cfg_probability > 0.0, steps.cfg_probability < 1.0
    if not guided:
        del wanted["cfg_range"]
    if not vanilla:
        del wanted["caption_dropout"]
    made = {name: {"teacher": found["model"], **found["teaching"]}[name] for name in wanted}
    differing = [
        *differences(made, wanted),
        *differences(_shared_with_student(found["model"]), _shared_with_student(student), "student"),
    ]
    if differing:
        raise TableError(
            f"{table.url} does not fit this training: {'; '.join(differing[:3])}; train as it was made, or "
            "compute new targets"
        )
    for branch, needed in ((True, guided), (False, vanilla)):
        if needed and not count_branch_rows(table, guided=branch):
            raise TableError(
                f"{table.url} has no {BRANCHES[branch]} rows, and a CFG probability of "
                f"{steps.cfg_probability} needs some; compute more draws, or a new table with "
                "targets.cfg_probability " + ("above 0" if branch else "below 1")
            )


def recomputer(table: Snapshot, *, teacher: str, latents: Snapshot) -> Recompute:
    """What `verify_table` needs to make units of TARGETS again, from LATENTS.

    Raises:
        TableError: if `teacher` or `latents` are not those that the table was made with.
    """
    teaching = TeacherSettings.parse(table.identity["teaching"])
    bundle = load(teacher)
    if table.identity["model"] != bundle.describe():
        raise TableError(f"{table.url} was made with another teacher than {teacher!r}; name the one it was")
    differing = list(differences(table.identity["latents"], latents.identity, "latents"))
    if differing:
        raise TableError(
            f"{table.url} was made of other LATENTS than {latents.url}: {'; '.join(differing[:3])}"
        )
    schema = _schema(teaching, bundle=bundle, latents=latents.identity)
    paths = {file.unit: file.path for file in latents.units}

    def make(account: UnitManifest, _rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        if "crashed" in account.rejected():
            raise CannotRecompute("its rows took down every worker that tried them")
        if account.source not in paths:
            raise CannotRecompute(f"its LATENTS unit {account.source} is not in {latents.url}")
        unit = Unit(**{name: getattr(account, name) for name in _UNIT_FIELDS}, name=account.unit)
        guided, draw = branch_and_draw(account.unit)
        device = Device(dtype=table.identity["dtype"], threads=account.environment["threads"])
        stage = ComputeTargets(teacher=teacher, settings=teaching, device=device)
        file = LatentFile(unit=unit, draw=draw, guided=guided, path=paths[account.source])
        finished = stage(_original_rows(ReadLatents()(file), account, table=table))
        return pack(finished, schema), finished.environment

    return make


def _original_rows(rows: LatentRows, account: UnitManifest, *, table: Snapshot) -> LatentRows:
    """The rows that a unit was made of: blank ones stand where rows of LATENTS were forgotten since.

    Bits depend on batches, but not on what another row of the batch holds.
    """
    gone = [row for row in account.rejections if row.id.startswith(REDACTED_PREFIX)]
    if not gone:
        return rows
    if not rows.ids:
        raise CannotRecompute("all of its rows were forgotten")
    if is_bucketed(table.identity):
        raise CannotRecompute(
            "rows of it were forgotten, and their shapes with them, on which batches depend"
        )
    if len(rows.ids) + len(gone) != account.rows_read:
        raise CannotRecompute("its LATENTS unit has not the rows that are left of it; run jobs.forget again")
    ids, source_ids, latents = list(rows.ids), list(rows.source_ids), list(rows.latents)
    token_ids = list(rows.token_ids)
    for row in sorted(gone, key=lambda row: row.ordinal):
        blank = row.id.rpartition("#")[0]
        ids.insert(row.ordinal, blank)
        source_ids.insert(row.ordinal, blank)
        latents.insert(row.ordinal, np.zeros_like(rows.latents[0]))
        token_ids.insert(row.ordinal, np.zeros_like(rows.token_ids[0]))
    return replace(rows, ids=ids, source_ids=source_ids, latents=latents, token_ids=np.stack(token_ids))


def set_aside(rows: LatentRows) -> FinishedRows:
    """A unit that took down every worker that tried it: all its rows rejected, none lost from the account."""
    crashed = [
        Rejected("crashed", "the teacher's worker died at every try").record(
            id=f"{id_}#{rows.draw}", source=rows.unit.source, ordinal=ordinal
        )
        for ordinal, id_ in enumerate(rows.ids)
    ]
    names = targets_schema(latent_shape=(1, 1, 1), num_tokens=1, x_dtype="float16", cell=1).names
    return FinishedRows(unit=rows.unit, columns={name: [] for name in names}, rejections=crashed)


def _schema(teaching: TeacherSettings, *, bundle: Bundle, latents: Mapping[str, Any]) -> pa.Schema:
    side = image_size_of(latents, bundle=bundle) // bundle.cell
    return targets_schema(
        latent_shape=(bundle.latent_shape[0], side, side),
        num_tokens=bundle.tokenizer.model_max_length,
        x_dtype=teaching.x_dtype,
        cell=bundle.cell if is_bucketed(latents) else None,
    )


def _shared_with_student(model: Mapping[str, Any]) -> dict[str, Any]:
    """Of what identifies a model, what student and teacher share: latents, times and conditions (App. D)."""
    shared = {name: without_size(model)[name] for name in ("scaling_factor", "latent_shape", "schedule")}
    return {**shared, "weights": {name: model["weights"][name] for name in ("text_encoder", "vae")}}


def _check_grid(teaching: TeacherSettings, *, schedule_steps: int) -> None:
    try:
        time_grid(teaching.k * teaching.student_steps, schedule_steps=schedule_steps)
    except ValueError:
        raise SettingsError(
            f"targets.teaching: k {teaching.k} times student_steps {teaching.student_steps} is more than the "
            f"schedule's {schedule_steps} steps"
        ) from None
