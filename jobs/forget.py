"""Forget rows on request: take them, and what was derived from them, out of a run's tables.

FILE has one entry a line; lines that begin with # are passed over. Addresses are compared whatever their
scheme, default port, case of host and escapes; hashes are SHA-256 or MD5 of the picture, or LAION's number of
the row, looked up in the run's shards and FINGERPRINTS. Only hashes of the entries are kept, and what is on
that list does not come back. Older versions can be read until their files are erased.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from jobs.cli.inputs import deletion_list_of, shards_url
from jobs.cli.job import Job, run
from jobs.deletion.lineage import Lineage, RunFiles, lineage_of
from jobs.deletion.receipt import DeletionReceipt, RequestFile, outcome_of, receipt_name, receipt_text
from jobs.runtime.exit_codes import exit_process
from pipelines.deletion.erasure import erase_files, old_files, old_sibling_files
from pipelines.deletion.lookup import LookupResult, look_up_shards
from pipelines.deletion.rewrite import Removal, delete_rows
from pipelines.deletion.table_matches import DELETION_ORDER, count_matches, find_matches, supports_deletion
from pipelines.sources import SourceError
from pipelines.sources.webdataset import list_shards
from pipelines.storage.objects import StorageError, write_once
from pipelines.tables.deletion_list import (
    ENTRY_KINDS,
    DeletionKeys,
    DeletionRequestError,
    Entry,
    EntryKind,
    read_entries,
    sha256_key,
)
from pipelines.tables.table import Snapshot, TableError, open_table


class FilesInUse(RuntimeError):
    """Old files that a training which is not finished reads."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.forget`."""
    return run(
        "forget", forget_rows, preview=preview, about=__doc__, argv=argv, writes=False, options=add_options
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is to be forgotten, and whether at once for good."""
    for kind, what in (("url", "addresses"), ("hash", "hashes of pictures"), ("id", "ids of rows")):
        parser.add_argument(
            f"--{kind}", action="append", default=[], metavar="FILE", help=f"{what} to forget"
        )
    parser.add_argument(
        "--erase", action="store_true", help="delete the files that only older versions read, too"
    )
    parser.add_argument(
        "--erase-pinned",
        action="store_true",
        help="the same though a training that is not finished needs them; it cannot go on then",
    )


@dataclass(kw_only=True)
class RequestMatches:
    """What a request names in a run.

    Attributes:
        tables: those that rows are taken out of, by place.
        others: all others of ours.
        rows: by place, how many rows are named, and how many rejections.
        ids: of rows of LATENTS and captions.
        entries: of the list, those that name something.
        shards: what was looked up there.
    """

    tables: Mapping[str, Snapshot]
    others: Mapping[str, Snapshot]
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    entries: set[Entry] = field(default_factory=set)
    shards: LookupResult = field(default_factory=LookupResult)


def forget_rows(job: Job) -> None:
    """Put the request on the list, take what it names out of all tables, and leave a receipt."""
    asked = _asked(job)
    files = _files_of(job)
    wanted = deletion_list_of(job)
    known = wanted.read()
    found = look_up(job, files, _request(asked))
    # From here on nothing of it is read in, and whoever is killed can go on from the list alone.
    added = wanted.add(_request(asked) | _naming(found.ids))
    forgotten = wanted.read()
    removals = delete_rows([table.url for table in found.tables.values()], forgotten)
    tables = _opened(found.tables)
    descendants = lineage_of(files, {**tables, **found.others})
    old = _old_files(tables, forgotten)
    stops = _stops(job, descendants)
    if _erases(job) and not stops:
        for place, paths in old.items():
            if any(file.revision for file in tables[place].units):
                erase_files(tables[place].url, paths)
    paths = [path for some in old.values() for path in some]
    erased = paths if _erases(job) and not stops else []
    receipt = DeletionReceipt(
        settings=job.recipe.digest(),
        asked=[outcome_of(one, matched=found.entries, known=_keys(known, one.kind)) for one in asked],
        added=len(added),
        looked_up={name: getattr(found.shards, name) for name in ("columns", "read", "skipped")},
        tables=dict(zip(found.tables, removals, strict=True)),
        forgotten={removal.url: _count_forgotten(removal) for removal in removals},
        kept=_kept(found.others, forgotten),
        shards=_shards(removals),
        descendants=descendants,
        old_files=[] if erased else _placed(files, paths),
        erased=_placed(files, erased),
    )
    _leave(job, receipt)
    if stops:
        raise FilesInUse(stops)


def _leave(job: Job, receipt: DeletionReceipt) -> None:
    """Write the receipt and the settings that it names, and print it."""
    write_once(job.url(f"settings/{receipt.settings[:16]}.json"), job.recipe.to_json().encode())
    text = receipt_text(receipt.to_json())
    place = job.url(f"forgotten/receipts/{receipt_name(text)}")
    write_once(place, text.encode())
    for line in receipt.lines():
        print(f"  {line}")
    print(f"  receipt: {place}")


def look_up(job: Job, files: RunFiles, request: DeletionKeys) -> RequestMatches:
    """What a request names: in shards, where they are at hand, and in all tables."""
    tables, others = _tables(files)
    found = RequestMatches(tables=tables, others=others, shards=_in_shards(job, request))
    found.ids |= found.shards.ids
    found.entries |= found.shards.entries
    # First what knows addresses, then what knows a row by its id alone.
    before = -1
    while len(found.ids) > before:
        before = len(found.ids)
        named = request | _naming(found.ids)
        for place, table in tables.items():
            matches = find_matches(table, named)
            found.rows[place] = (
                sum(len(match.rows) for match in matches),
                sum(len(match.rejections) for match in matches),
            )
            for match in matches:
                found.ids |= match.ids
                found.entries |= match.entries
    return found


def _in_shards(job: Job, request: DeletionKeys) -> LookupResult:
    if not request.urls and not request.hashes:
        return LookupResult()
    try:
        return look_up_shards(list_shards(shards_url(job)), request, source=job.recipe.source.name)
    except (SourceError, OSError):
        return LookupResult()  # tables know addresses; the receipt says that no shard was looked at


def _asked(job: Job) -> list[RequestFile]:
    """The files of the request, read; a mistake in one is told with its option."""
    asked = []
    for kind in ENTRY_KINDS:
        for path in job.options[kind]:
            try:
                entries = read_entries(path, kind=kind)
            except DeletionRequestError as error:
                raise DeletionRequestError(f"--{kind} {error}") from None
            asked.append(RequestFile(kind=kind, name=PurePath(path).name, entries=entries))
    if not asked:
        raise DeletionRequestError(
            "--url, --hash, --id: at least one of them is needed, with a file of entries"
        )
    return asked


def _request(asked: Sequence[RequestFile]) -> DeletionKeys:
    keys = {
        kind: frozenset[bytes]().union(*(one.entries for one in asked if one.kind == kind))
        for kind in ENTRY_KINDS
    }
    return DeletionKeys(urls=keys["url"], hashes=keys["hash"], ids=keys["id"])


def _naming(ids: set[str]) -> DeletionKeys:
    return DeletionKeys(ids=frozenset(map(sha256_key, ids)))


def _keys(known: DeletionKeys, kind: EntryKind) -> frozenset[bytes]:
    return {"url": known.urls, "hash": known.hashes, "id": known.ids}[kind]


def _files_of(job: Job) -> RunFiles:
    files = RunFiles(job.out)
    if not files.places:
        raise StorageError(
            f"--out {job.out}: there is no run; a list is kept in the run that is to forget it"
        )
    return files


def _tables(files: RunFiles) -> tuple[dict[str, Snapshot], dict[str, Snapshot]]:
    """The tables that rows are taken out of, derived ones first, and the others of ours."""
    ours: dict[str, Snapshot] = {}
    for place in files.tables:
        try:
            ours[place] = open_table(f"{files.url}/{place}")
        except TableError:
            continue  # a table that another program left there
    handled = [place for place, table in ours.items() if supports_deletion(table)]
    handled.sort(key=lambda place: DELETION_ORDER.index(ours[place].identity["kind"]))
    return {place: ours[place] for place in handled}, {
        place: table for place, table in ours.items() if place not in handled
    }


def _opened(tables: Mapping[str, Snapshot]) -> dict[str, Snapshot]:
    return {place: open_table(table.url) for place, table in tables.items()}


def _old_files(tables: Mapping[str, Snapshot], forgotten: DeletionKeys) -> dict[str, list[str]]:
    """By place, the files that only older versions read and that hold what is forgotten."""
    return {
        place: [*old_files(table, forgotten), *old_sibling_files(table.url)]
        for place, table in tables.items()
    }


def _placed(files: RunFiles, paths: Sequence[str]) -> list[str]:
    return [path.removeprefix(f"{files.url}/") for path in paths]


def _erases(job: Job) -> bool:
    return bool(job.options["erase"] or job.options["erase_pinned"])


def _stops(job: Job, descendants: Lineage) -> str:
    """Why nothing is erased, if it was asked for."""
    needed = [pin for pin in descendants.trainings if not pin.finished]
    if not needed or not job.options["erase"] or job.options["erase_pinned"]:
        return ""
    named = ", ".join(f"{pin.place} (at {pin.table} version {pin.version})" for pin in needed)
    return (
        f"--erase: nothing was erased, because trainings that are not finished read the old files: {named}; "
        "finish or remove them, or say --erase-pinned. The newest versions are without the rows."
    )


def _kept(others: Mapping[str, Snapshot], forgotten: DeletionKeys) -> dict[str, int]:
    counts = {place: count_matches(table, forgotten) for place, table in others.items()}
    return {place: count for place, count in counts.items() if count}


def _count_forgotten(removal: Removal) -> int:
    return sum(
        account.rejected().get("forgotten", 0) for account in open_table(removal.url).manifests().values()
    )


def _shards(removals: Sequence[Removal]) -> list[str]:
    """The shards that rows of LATENTS came from that are forgotten by now."""
    gone = {"forgotten", "withheld"}
    return sorted(
        {
            account.source
            for removal in removals
            if removal.kind == "latents"
            for account in open_table(removal.url).manifests().values()
            if gone & account.rejected().keys()
        }
    )


def preview(job: Job) -> list[str]:
    """What would be taken out, and what was made of it."""
    asked, files = _asked(job), _files_of(job)
    found = look_up(job, files, _request(asked))
    lines = [
        f"would take {rows} rows and {rejections} rejections out of {place}, version "
        f"{found.tables[place].version}"
        for place, (rows, rejections) in found.rows.items()
    ]
    entries = sum(len(one.entries) for one in asked)
    known = deletion_list_of(job).read()
    asked_for = {(one.kind, key) for one in asked for key in one.entries}
    hit = len(asked_for & found.entries)
    return [f"{hit} of {entries} entries name something; {len(known)} are on the list already", *lines]


if __name__ == "__main__":
    exit_process(main())
