"""A caption list that is read range by range has the rows of one that is read at once."""

import json
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources import SourceError
from pipelines.sources.captions import list_captions, read_captions
from pipelines.sources.lazy_rows import LazyRows
from pipelines.sources.repeated_ids import RepeatedIds
from pipelines.sources.settings import CaptionSettings

ROWS = 500
WITH_IDS = CaptionSettings(id_column="key")


def write_list(path: Path) -> str:
    """Captions of which some are empty, and whose ids come again or are missing."""
    rows = [{"key": f"k{n % 400}", "caption": "" if n % 7 == 0 else f"caption {n}"} for n in range(ROWS)]
    del rows[5]["key"], rows[405]["key"]
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [f"{row.get('key', '')}{mark}{row['caption']}" for row in rows]
        path.write_text("\n".join([f"key{mark}caption", *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize("settings", [CaptionSettings(), WITH_IDS], ids=["ordinals", "ids"])
@pytest.mark.parametrize("name", ["list.tsv", "list.csv", "list.jsonl"])
def test_ranges_equal_the_list_at_once(tmp_path, name, settings):
    url = write_list(tmp_path / name)
    at_once = list(read_captions(url, settings))
    listed = list_captions(url, settings)
    assert len(listed) == ROWS
    assert list(listed) == at_once
    listed = pickle.loads(pickle.dumps(listed))
    # One after the other, with gaps, and back to the beginning.
    for start, stop in [(0, 64), (64, 128), (300, 310), (2, 5), (480, 600), (500, 500)]:
        assert listed[start:stop] == at_once[start:stop]
    assert (listed[-1], listed[3]) == (at_once[-1], at_once[3])


def test_rows_after_the_limit_are_not_counted(tmp_path):
    url = write_list(tmp_path / "list.tsv")
    listed = list_captions(url, WITH_IDS, limit=100)
    assert (len(listed), listed[90:200]) == (100, list(read_captions(url, WITH_IDS, start=90, stop=100)))


def test_missing_list_is_refused_before_it_is_used(tmp_path):
    with pytest.raises(SourceError, match="no such file"):
        list_captions(str(tmp_path / "none.txt"), CaptionSettings())


def test_repeated_ids_are_those_of_a_set():
    draws = random.Random(0)
    ids = [None if draws.random() < 0.1 else f"id {draws.randrange(3000)}" for _ in range(5000)]
    found, seen, expected = RepeatedIds(), set(), []
    for ordinal, name in enumerate(ids):
        expected.append(name is not None and name in seen)
        if name is not None:
            seen.add(name)
            found.add(ordinal, name)
    bits = np.unpackbits(found.repeats(count=len(ids)), count=len(ids))
    assert bits.astype(bool).tolist() == expected


def test_only_a_range_is_in_memory():
    read = LazyRows(lambda start: (f"row {n}" * 10 for n in range(start, 200_000)), count=200_000)
    tracemalloc.start()
    for start in range(0, 200_000, 100):
        assert len(read[start : start + 100]) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
