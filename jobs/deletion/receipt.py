"""Receipt of a deletion request: its entries by hash, what was deleted, and what still holds it."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from jobs.deletion.lineage import Lineage
from jobs.deletion.request import RequestFile
from pipelines.deletion.lookup import LookupResult
from pipelines.deletion.rewrite import Removal
from pipelines.tables.deletion_list import ENTRY_KINDS, EntryKind

_MAX_SHOWN = 10
_MAX_CHARACTERS = 200
_LOOKUP_COUNTS = ("columns", "read", "skipped")
_DISK_NAMES = {"path": "place", "samples": "drawn"}
"""Names of fields in receipts, where they differ: receipts of earlier releases have them."""


@dataclass(frozen=True, kw_only=True)
class RequestOutcome:
    """Outcome of the entries of one request file.

    Attributes:
        kind: of the entries.
        name: of the file.
        known: keys that were on the deletion list before this request.
        matched: other keys that name a row of a table or a shard.
        unmatched: keys that name nothing.
        lines: line numbers of the unmatched ones, as in "3, 7-9".
    """

    kind: EntryKind
    name: str
    known: list[str]
    matched: list[str]
    unmatched: list[str]
    lines: str


def outcome_of(file: RequestFile, matched: set[bytes], known: frozenset[bytes]) -> RequestOutcome:
    """The outcome of a file, from the keys that matched and those on the list before."""
    keys = set(file.entries)
    unmatched = keys - matched - known
    return RequestOutcome(
        kind=file.kind,
        name=file.name,
        known=_hex_keys(keys & known),
        matched=_hex_keys((keys & matched) - known),
        unmatched=_hex_keys(unmatched),
        lines=format_ranges(sorted(file.entries[key] for key in unmatched)),
    )


# Only hashes are written: the receipt may be shown to others than the person who made the request.
def _hex_keys(keys: set[bytes]) -> list[str]:
    return sorted(key.hex() for key in keys)


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: "1, 4-6"."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


@dataclass(frozen=True, kw_only=True)
class DeletionReceipt:
    """The record of one deletion request.

    Attributes:
        settings: digest of the recipe.
        outcomes: of the files of the request.
        added: entries that are new on the list, including the ids of matched rows.
        lookup: of addresses and hashes in shards.
        tables: deleted rows, by path.
        deleted_rows: rows that each table has lost so far, by this request and earlier ones, by URL.
        kept: rows on the list in tables that rows are not deleted from, by path.
        shards: that deleted rows were read from.
        lineage: of older versions.
        old_files: that still hold deleted rows.
        erased: files that contained them and were erased.
    """

    settings: str
    outcomes: Sequence[RequestOutcome]
    added: int
    lookup: LookupResult
    tables: Mapping[str, Removal]
    deleted_rows: Mapping[str, int]
    kept: Mapping[str, int]
    shards: Sequence[str]
    lineage: Lineage
    old_files: Sequence[str]
    erased: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """JSON values, with the time."""
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": self.settings,
            "asked": [asdict(outcome) for outcome in self.outcomes],
            "added_to_list": self.added,
            "looked_up_in_shards": {name: getattr(self.lookup, name) for name in _LOOKUP_COUNTS},
            "tables": {path: self._table_record(removal) for path, removal in self.tables.items()},
            "kept": {"rows_named_in": dict(self.kept), "shards": list(self.shards)},
            "descendants": asdict(self.lineage, dict_factory=_with_disk_names),
            "old_files": list(self.old_files),
            "erased": list(self.erased),
        }

    def _table_record(self, removal: Removal) -> dict[str, Any]:
        record = vars(removal) | {
            "units": sorted(removal.units),
            "rows_forgotten_so_far": self.deleted_rows[removal.url],
        }
        del record["url"]
        return record

    def lines(self) -> Iterator[str]:
        """A summary for the terminal."""
        for kind in ENTRY_KINDS:
            outcomes = [outcome for outcome in self.outcomes if outcome.kind == kind]
            if outcomes:
                yield _request_line(kind, outcomes)
        yield from _table_lines(self.tables)
        for removal in self.tables.values():
            yield from removal.notes
        for path, rows in self.kept.items():
            yield f"{path}: {rows} rows match and stay, because metrics are computed from them"
        yield from self._lineage_lines()
        yield from _named("the images are still in the shards", self.shards)
        yield from _named("pages that may show captions or images", self.lineage.pages)
        if self.erased:
            yield f"{len(self.erased)} old files erased: older versions can no longer be read"
        if self.old_files:
            yield f"{len(self.old_files)} old files still hold deleted rows; --erase deletes them"

    def _lineage_lines(self) -> Iterator[str]:
        pinned: dict[tuple[str, int, bool], list[str]] = defaultdict(list)
        for pin in self.lineage.trainings:
            pinned[pin.table, pin.version, pin.finished].append(pin.path)
        for (table, version, finished), paths in pinned.items():
            state = "finished" if finished else "not finished"
            yield from _named(f"pinned to {table} version {version}, {state}", paths)
        yield from _named("weights trained on deleted rows, which are not changed", self.lineage.models)
        yield from _named("mobile bundles of these weights", self.lineage.bundles)
        yield from _named("images generated with these weights", self.lineage.samples)
        yield from _named("exports of deleted rows, which are not changed", self.lineage.exports)


def _with_disk_names(fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {_DISK_NAMES.get(name, name): value for name, value in fields}


def _request_line(kind: EntryKind, outcomes: Sequence[RequestOutcome]) -> str:
    known, matched, unmatched = (
        sum(len(getattr(outcome, name)) for outcome in outcomes) for name in ("known", "matched", "unmatched")
    )
    line = f"--{kind}: {matched} of {matched + known + unmatched} entries match"
    if known:
        line += f", {known} were on the list already"
    if unmatched:
        lines = "; ".join(f"{outcome.name} line {outcome.lines}" for outcome in outcomes if outcome.lines)
        cut = "" if len(lines) < _MAX_CHARACTERS else " ..."
        line += f", {unmatched} match nothing ({lines[:_MAX_CHARACTERS]}{cut})"
    return line


def _table_lines(tables: Mapping[str, Removal]) -> Iterator[str]:
    width = max((len(path) for path in tables), default=0)
    for path, removal in tables.items():
        version = f"{removal.before} -> {removal.after}" if removal.units else str(removal.before)
        yield (
            f"{path:<{width}}  version {version:<10} {removal.rows:>7} rows and "
            f"{removal.rejections.total():>4} rejections deleted from {len(removal.units)} units"
        )


def _named(what: str, paths: Sequence[str]) -> Iterator[str]:
    """A line with the first of the paths, if there are any."""
    if paths:
        more = len(paths) - _MAX_SHOWN
        yield f"{what}: {', '.join(paths[:_MAX_SHOWN])}{f' and {more} more' if more > 0 else ''}"


def receipt_name(text: str) -> str:
    """`<time>-<hash>.json`: receipts sort by time, and two of the same second differ."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"{now}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def receipt_text(receipt: DeletionReceipt) -> str:
    """The content of a receipt's file."""
    return json.dumps(receipt.to_json(), indent=2, sort_keys=True) + "\n"
