"""JSON records: whatever is wrong with one is reported with its file's name."""

import json
import pickle

import pytest

from snapfusion.records import RecordError, parse_record


def test_a_record_is_its_object():
    values = {"a": 1, "b": {"c": [{"d": 0.5}, None]}}
    assert parse_record(json.dumps(values), name="file") == values


@pytest.mark.parametrize(
    "content",
    [
        *("", "null", "[]", "3", '"text"', '{"a": [1, 2', "[" * 100_000, '{"a":' * 100_000),
        *('{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', b"\xff\xfe", b"PAR1"),
    ],
)
def test_a_damaged_record_is_named(content):
    with pytest.raises(RecordError, match=r"^run/metrics\.json "):
        parse_record(content, name="run/metrics.json")


def test_a_missing_key_is_named_with_its_file():
    record = parse_record('{"a": {"b": 1}}', name="run/metrics.json")
    for one in (record, pickle.loads(pickle.dumps(record))):
        with pytest.raises(RecordError, match=r"^run/metrics\.json has no 'c'"):
            one["a"]["c"]
        assert one["a"].get("c") is None
