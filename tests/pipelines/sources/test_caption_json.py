"""Captions in JSON: lists of strings and of objects, COCO's annotations, GenEval's and MJHQ's lists."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shard_files import assert_ranges_agree

from pipelines.rejections import Rejection
from pipelines.sources import SourceError
from pipelines.sources.captions import read_captions
from pipelines.sources.settings import CaptionSettings

# As in COCO, the annotations are in no order of ids or images.
ANNOTATIONS = [
    {"image_id": 179765, "id": 38, "caption": "A black Honda motorcycle."},
    {"image_id": 190236, "id": 42, "caption": "An office cubicle."},
    {"image_id": 179765, "id": 7, "caption": "A Honda motorcycle in a driveway."},
]
COCO = {"info": {}, "images": [{"id": 190236}, {"id": 179765}], "annotations": ANNOTATIONS}
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "list.json"


def outcomes(path: Path, **settings: Any) -> dict[str, str]:
    """Text or reason by id."""
    rows = list(read_captions(str(path), CaptionSettings(**settings)))
    assert [row.ordinal for row in rows] == list(range(len(rows)))
    return {row.id: row.reason if isinstance(row, Rejection) else row.text for row in rows}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_strings_and_objects(path: Path, indent: int | None, encoding: str) -> None:
    for rows in (["ä", "b"], [{"prompt": "ä"}, {"prompt": "b"}], [{"text": "ä"}, "b"]):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding=encoding)
        assert outcomes(path) == {"000000000": "ä", "000000001": "b"}
    for empty in ("[]", '{"annotations": []}'):
        path.write_text(empty)
        assert outcomes(path) == {}


def test_ids_of_coco_are_those_of_annotations_or_images(path: Path) -> None:
    path.write_text(json.dumps(COCO))
    texts = [row["caption"] for row in ANNOTATIONS]
    assert list(outcomes(path).values()) == texts
    assert outcomes(path, id_column="id") == dict(zip(["38", "42", "7"], texts, strict=True))
    assert outcomes(path, id_column="image_id") == {"179765": texts[0], "190236": texts[1]}
    assert_ranges_agree(partial(read_captions, str(path), CaptionSettings(id_column="image_id")))


def test_geneval_is_read_as_published(tmp_path: Path) -> None:
    lines, whole = tmp_path / "evaluation_metadata.jsonl", tmp_path / "evaluation_metadata.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    whole.write_text(json.dumps(GENEVAL))
    expected = {"000000000": "a photo of a bench", "000000001": "a photo of two cows"}
    assert outcomes(lines) == outcomes(whole) == expected
    assert list(outcomes(lines, caption_column="tag").values()) == ["single_object", "counting"]


def test_objects_by_id_are_read_as_mjhq_has_them(path: Path) -> None:
    rows = {"b1": {"category": "people", "prompt": "a"}, "a2": {"category": "food", "prompt": "b"}}
    path.write_text(json.dumps(rows))
    assert outcomes(path) == {"000000000": "a", "000000001": "b"}
    assert outcomes(path, id_column="id") == {"b1": "a", "a2": "b"}
    path.write_text(json.dumps({"b1": {"id": "own", "prompt": "a"}}))
    assert outcomes(path, id_column="id") == {"own": "a"}


def test_a_bad_row_costs_itself(path: Path) -> None:
    rows = [None, 3, {"id": 0}, {"caption": 3}, {"caption": " "}, {"caption": "\ud800"}, {"caption": "ok"}]
    expected = ["bad_row", "bad_row", "missing_caption", "bad_row", "empty_caption", "bad_encoding", "ok"]
    for document in (rows, {"annotations": rows}):
        path.write_text(json.dumps(document))
        assert list(outcomes(path).values()) == expected
    path.write_bytes(b'["caf\xe9", "good"]')
    assert list(outcomes(path).values()) == ["bad_encoding", "good"]


def test_a_bad_id_costs_its_annotation(path: Path) -> None:
    ids = [1, True, None, [1], "1", 1, 2.0, 2]
    path.write_text(
        json.dumps({"annotations": [{"image_id": name, "caption": f"{n}"} for n, name in enumerate(ids)]})
    )
    rows = read_captions(str(path), CaptionSettings(id_column="image_id"))
    found = [row.reason if isinstance(row, Rejection) else row.text for row in rows]
    # The number 1 and the text "1" are one id in a table, so the second is a duplicate.
    assert found == ["0", "bad_row", "bad_row", "bad_row", "duplicate_key", "6", "duplicate_key"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not readable as JSON: Expecting value"),
        ('["a", "b"', "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"prompt": "a"}\n{"prompt": "b"}', r"Extra data.*; a file with one object a line is named \.jsonl"),
        ('{"images": [], "categories": []}', "an object with 'images', 'categories'; a list of strings, "),
        ("{}", "an empty object; "),
        ('{"info": {"year": 2017}}', "no caption column named .*; it has id, year"),
        ('"a"', "the JSON is a str; "),
        # COCO's file of instances.
        (
            '{"annotations": [{"bbox": [], "id": 1}]}',
            "no caption column named caption or .*; it has bbox, id",
        ),
        ('[{"tag": "a"}]', "no caption column named .* or Prompt; it has tag: set caption_column"),
    ],
    ids=range(10),
)
def test_other_json_is_refused(path: Path, content: str, message: str) -> None:
    path.write_text(content)
    with pytest.raises(SourceError, match=f"list.json: .*{message}") as error:
        outcomes(path)
    assert "\n" not in str(error.value)


def test_missing_ids_are_refused(path: Path) -> None:
    path.write_text(json.dumps(COCO))
    with pytest.raises(SourceError, match="no id column named key; it has image_id, id, caption"):
        outcomes(path, id_column="key")
    path.write_text('["a"]')
    with pytest.raises(SourceError, match="a list of strings has no ids"):
        outcomes(path, id_column="id")


def test_a_huge_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources.caption_json._MAX_JSON_BYTES", 1 << 20)
    path.write_text(json.dumps(["x" * 999] * 1000))
    assert len(outcomes(path)) == 1000
    path.write_text(json.dumps(["x" * 999] * 1050))
    with pytest.raises(SourceError, match=r"more than 1 MiB, .*: give a \.jsonl"):
        outcomes(path)


@pytest.mark.parametrize("write", [json.dumps, lambda rows: "\n".join(map(json.dumps, rows))])
def test_the_first_object_with_a_caption_names_the_key(
    tmp_path: Path, write: Callable[[list[Any]], str]
) -> None:
    rows = [{"id": 0}, {"text": "a"}, {"caption": "b"}, {"caption": "c", "text": "d"}]
    path = tmp_path / ("list.json" if write is json.dumps else "list.jsonl")
    path.write_text(write(rows))
    assert list(outcomes(path).values()) == ["missing_caption", "a", "missing_caption", "d"]
