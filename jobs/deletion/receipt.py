"""The receipt of a request to forget: what was asked for, by hash; what was done; what still holds it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from jobs.deletion.lineage import Lineage
from pipelines.deletion.rewrite import Removal
from pipelines.tables.deletion_list import ENTRY_KINDS, Entry, EntryKind

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class RequestFile:
    """One file of things to forget.

    Attributes:
        kind: of its entries.
        name: of the file, without its folder.
        entries: keys, each with the first line that has it.
    """

    kind: EntryKind
    name: str
    entries: Mapping[bytes, int]


@dataclass(frozen=True, kw_only=True)
class RequestOutcome:
    """What became of the entries of one file.

    Attributes:
        kind: of the entries.
        name: of the file.
        known: keys of those that were on the list before this request.
        matched: of the others, those that named a row of a table or a shard.
        unmatched: those that named nothing.
        lines: of the unmatched ones, as in "3, 7-9".
    """

    kind: EntryKind
    name: str
    known: list[str]
    matched: list[str]
    unmatched: list[str]
    lines: str


def outcome_of(asked: RequestFile, *, matched: set[Entry], known: frozenset[bytes]) -> RequestOutcome:
    """What became of a file's entries, by what was found and what was on the list before."""
    before = {key for key in asked.entries if key in known}
    hit = {key for key in asked.entries if key not in before and (asked.kind, key) in matched}
    rest = asked.entries.keys() - hit - before
    return RequestOutcome(
        kind=asked.kind,
        name=asked.name,
        known=_hex_keys(before),
        matched=_hex_keys(hit),
        unmatched=_hex_keys(rest),
        lines=format_ranges(sorted(asked.entries[key] for key in rest)),
    )


def _hex_keys(keys: set[bytes]) -> list[str]:
    return sorted(key.hex() for key in keys)


def format_ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in few words: "1, 4-6"."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


@dataclass(frozen=True, kw_only=True)
class DeletionReceipt:
    """Everything that is said of one request.

    Attributes:
        settings: digest of the recipe.
        asked: the files of the request.
        added: entries that the list did not have, the ids of rows that were found included.
        looked_up: how addresses and hashes were looked up in shards.
        tables: what was taken out, by place.
        forgotten: rows that each table has lost so far, by this request and earlier ones.
        kept: rows that the list names in tables that rows are not taken out of, by place.
        shards: that rows which are forgotten were read from.
        descendants: what was made of older versions.
        old_files: that still hold what is forgotten.
        erased: that did.
    """

    settings: str
    asked: Sequence[RequestOutcome]
    added: int
    looked_up: Mapping[str, int]
    tables: Mapping[str, Removal]
    forgotten: Mapping[str, int]
    kept: Mapping[str, int]
    shards: Sequence[str]
    descendants: Lineage
    old_files: Sequence[str]
    erased: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """JSON values, with the time."""
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": self.settings,
            "asked": [asdict(fate) for fate in self.asked],
            "added_to_list": self.added,
            "looked_up_in_shards": dict(self.looked_up),
            "tables": {
                place: _table_record(removal, self.forgotten) for place, removal in self.tables.items()
            },
            "kept": {"rows_named_in": dict(self.kept), "shards": list(self.shards)},
            "descendants": asdict(self.descendants),
            "old_files": list(self.old_files),
            "erased": list(self.erased),
        }

    def lines(self) -> Iterator[str]:
        """The same in words, short."""
        for kind in ENTRY_KINDS:
            fates = [fate for fate in self.asked if fate.kind == kind]
            if fates:
                yield _request_line(kind, fates)
        yield from _table_lines(self.tables)
        for removal in self.tables.values():
            yield from removal.notes
        for place, rows in self.kept.items():
            yield f"{place}: {rows} rows are named, and stay: figures are measured with them"
        yield from self._trainings()
        if self.shards:
            yield f"the pictures are still in the shards: {_shortened(self.shards)}"
        if self.descendants.pages:
            yield f"pages that may show captions or pictures: {_shortened(self.descendants.pages)}"
        if self.erased:
            yield f"{len(self.erased)} old files erased: older versions can no longer be read"
        if self.old_files:
            yield f"{len(self.old_files)} old files still hold it, for older versions; --erase deletes them"

    def _trainings(self) -> Iterator[str]:
        pinned: dict[tuple[str, int, bool], list[str]] = defaultdict(list)
        for pin in self.descendants.trainings:
            pinned[pin.table, pin.version, pin.finished].append(pin.place)
        for (table, version, finished), places in pinned.items():
            state = "finished" if finished else "not finished"
            yield f"pinned to {table} version {version}, {state}: {_shortened(places)}"
        for said, places in (
            ("weights that learned from it, and keep what they learned", self.descendants.models),
            ("bundles for phones made of those", self.descendants.bundles),
            ("pictures drawn by those", self.descendants.drawn),
        ):
            if places:
                yield f"{said}: {_shortened(places)}"


def _table_record(removal: Removal, forgotten: Mapping[str, int]) -> dict[str, Any]:
    return {
        "kind": removal.kind,
        "before": removal.before,
        "after": removal.after,
        "rows": removal.rows,
        "rejections": dict(sorted(removal.rejections.items())),
        "units": sorted(removal.units),
        "rows_forgotten_so_far": forgotten[removal.url],
        "notes": removal.notes,
    }


def _request_line(kind: str, fates: Sequence[RequestOutcome]) -> str:
    matched, known, unmatched = (
        sum(len(getattr(fate, name)) for fate in fates) for name in ("matched", "known", "unmatched")
    )
    said = f"--{kind}: {matched} of {matched + known + unmatched} entries name something"
    if known:
        said += f", {known} were on the list already"
    if unmatched:
        lines = "; ".join(f"{fate.name} line {fate.lines}" for fate in fates if fate.lines)
        said += f", {unmatched} name nothing ({lines if len(lines) < 200 else f'{lines[:200]} ...'})"
    return said


def _table_lines(tables: Mapping[str, Removal]) -> Iterator[str]:
    width = max((len(place) for place in tables), default=0)
    for place, removal in tables.items():
        version = f"{removal.before} -> {removal.after}" if removal.units else str(removal.before)
        yield (
            f"{place:<{width}}  version {version:<10} {removal.rows:>7} rows and "
            f"{removal.rejections.total():>4} rejections out of {len(removal.units)} units"
        )


def _shortened(places: Sequence[str]) -> str:
    more = len(places) - _SHOWN
    return ", ".join(places[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def receipt_name(text: str) -> str:
    """`<time>-<hash>.json`: receipts sort by time, and two of a second do not meet."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"{now}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def receipt_text(receipt: Mapping[str, Any]) -> str:
    """A receipt as its file has it."""
    return json.dumps(receipt, indent=2, sort_keys=True) + "\n"
