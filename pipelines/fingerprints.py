"""FINGERPRINTS: what tells whether two rows are the same, for every usable row of a set of shards.

shards ─ stream, select, decode, hash ─ data file ─ commit
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipelines.account import Account
from pipelines.commits import Origin
from pipelines.execution import Pool, Runner, Stage, on_ray
from pipelines.intake import Bounds, OnProgress, recover, take_in
from pipelines.latents import Latents, plan, rows_left
from pipelines.schemas import FINGERPRINTS
from pipelines.sources.webdataset import Shard
from pipelines.stages.fingerprint import METHOD, FingerprintShard
from pipelines.stages.image import PictureBounds
from pipelines.stages.read import ShardWork
from pipelines.stages.veto import Veto
from pipelines.stages.withhold import Withhold, WithholdAgain
from pipelines.stages.write import WriteUnit, pack
from pipelines.tables import Snapshot, accounts, create_table, open_table
from pipelines.verification import CannotRemake, Remake
from snapfusion.settings import Settings, digest


class Fingerprints(Settings):
    """How FINGERPRINTS are made; which rows are usable is for the settings of LATENTS to say.

    Attributes:
        table: the place of FINGERPRINTS in the run; another where rows are selected otherwise.
        rows_per_unit: rows of one data file.
        readers: the actor pool that streams, decodes and hashes.
        writers: the actor pool that packs and writes.
        bounds: when to commit and when to stop.
    """

    table: str = Field("fingerprints", pattern=r"^[A-Za-z0-9_.-]+$")
    rows_per_unit: int = Field(10_000, ge=1)
    readers: Pool = Pool(actors=2)
    writers: Pool = Pool(cpus=0.25)
    bounds: Bounds = Bounds()


def identity_of(settings: Fingerprints, *, latents: Latents, vetoes: Sequence[Veto] = ()) -> dict[str, Any]:
    """Everything that determines the rows of FINGERPRINTS, the shards apart (each unit states its own)."""
    told = {name: value for veto in vetoes for name, value in veto.describe().items()}
    return {
        "kind": "fingerprints",
        "method": METHOD,
        "shards": latents.shards.to_values(),
        "selection": latents.selection.to_values(),
        "images": picture_bounds(latents).to_values(),
        "rows_per_unit": settings.rows_per_unit,
        **told,
    }


def fingerprint_shards(
    settings: Fingerprints,
    *,
    latents: Latents,
    shards: Sequence[Shard],
    source: str,
    url: str,
    vetoes: Sequence[Veto] = (),
    origin: Origin | None = None,
    run: Runner = on_ray,
    on_progress: OnProgress | None = None,
) -> Snapshot:
    """Bring the table at `url` to a row for every usable row of `shards`; returns its newest version.

    Args:
        settings: how.
        latents: which rows are usable: as LATENTS will be made. Rows that it would reject anyway have no
            fingerprint, or a copy that is never used would stand in the way of one that is.
        shards: as `list_shards` gives them.
        source: a short name of the set of shards; units and rows are named after it.
        url: of the table.
        vetoes: what refuses rows beside the selection; not that of duplicates, which is made of this.
        origin: who makes the new units, and from what; kept beside their accounts.
        run: what sends shards through the stages.
        on_progress: called after each unit.

    Raises:
        TableError: if the table was made with other settings or other shards of these names.
        TooManyRejected: when the rejected fraction is above its bound.
    """
    identity = identity_of(settings, latents=latents, vetoes=vetoes)
    table = create_table(url, schema=FINGERPRINTS, identity=identity)
    recover(url, origin=origin)
    items = list(plan(shards, source=source, accounts=accounts(url).values()))
    stages = [reading(settings, latents=latents, vetoes=vetoes), writing(table, settings)]
    take_in(
        url,
        run(items, stages),
        bounds=settings.bounds,
        total=rows_left(items) if on_progress else None,
        origin=origin,
        on_progress=on_progress,
    )
    return open_table(url)


def remake(table: Snapshot, *, shards: Sequence[Shard], source: str, vetoes: Sequence[Veto] = ()) -> Remake:
    """What `verify_table` needs to make units of FINGERPRINTS again: the shards are read and hashed."""
    settings = Fingerprints(rows_per_unit=table.identity["rows_per_unit"])
    told = {name: table.identity[name] for name in ("shards", "selection", "images")}
    others = [veto for veto in vetoes if not isinstance(veto, Withhold)]
    known = {f"{source}/{shard.name}": shard for shard in shards}

    def make(account: Account, _rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        if account.source not in known:
            raise CannotRemake(f"its shard {account.source} is not among those given")
        work = ShardWork(shard=known[account.source], source=account.source, committed=((0, account.start),))
        withheld = WithholdAgain(row.id for row in account.rejections if row.reason == "withheld")
        reader = FingerprintShard(**_reading(settings, Latents.parse(told), (withheld, *others)))
        # A picture that once took a worker down must not take this process down.
        finished = next(reader(work, careful="crashed" in account.rejected()))
        return pack(finished, FINGERPRINTS), finished.environment

    return make


def writing(table: Snapshot, settings: Fingerprints) -> Stage:
    """The stage that packs and writes units of this table."""
    arguments = {"url": table.url, "schema": FINGERPRINTS, "settings": digest(table.identity)}
    return Stage(build=WriteUnit, arguments=arguments, pool=settings.writers)


def reading(settings: Fingerprints, *, latents: Latents, vetoes: Sequence[Veto] = ()) -> Stage:
    """The stage that reads and hashes shards."""
    return Stage(build=FingerprintShard, arguments=_reading(settings, latents, vetoes), pool=settings.readers)


def picture_bounds(latents: Latents) -> PictureBounds:
    """Of how LATENTS are made, what says which pictures are usable; what becomes of them is no part of it."""
    return PictureBounds(min_side=latents.images.min_side, max_pixels=latents.images.max_pixels)


def _reading(settings: Fingerprints, latents: Latents, vetoes: Sequence[Veto]) -> dict[str, Any]:
    return {
        "rows_per_unit": settings.rows_per_unit,
        "shards": latents.shards,
        "images": picture_bounds(latents),
        "selection": latents.selection,
        "vetoes": tuple(vetoes),
    }
