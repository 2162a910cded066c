"""Reads captions from JSON: an object a line (.jsonl); a list, objects by id, COCO's annotations (.json)."""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any, Final

from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.caption_columns import CaptionColumns, CaptionFields, find_keys
from pipelines.sources.settings import CaptionSettings
from pipelines.sources.text_files import read_lines, utf8_chunks

# The keys of captions and ids are looked for in so many lines.
_HEAD_LINES = 1000
# A .json is parsed at once, into several times its size. COCO's largest file of captions has 92 MB.
_MAX_JSON_BYTES = 256 << 20
_MAX_KEYS_NAMED: Final = 8
_IMAGE_ID: Final = "image_id"


def read_jsonl(file: IO[bytes], settings: CaptionSettings) -> Iterator[CaptionFields]:
    """The rows of a file with one JSON object a line.

    Raises:
        SourceError: if no object among the first 1,000 lines has a caption, and there are objects.
    """
    lines = read_lines(file)
    head = list(itertools.islice(lines, _HEAD_LINES))
    columns = find_keys(_objects(head), settings)
    for line in itertools.chain(head, lines):
        try:
            yield _parse_line(line, columns)
        except UnicodeDecodeError as error:
            yield CaptionFields(fault=Rejected("bad_encoding", str(error)))
        except (ValueError, RecursionError) as error:
            yield CaptionFields(fault=Rejected("bad_row", str(error)))


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects."""
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _parse_line(line: bytes, columns: CaptionColumns) -> CaptionFields:
    if not line.strip():
        return CaptionFields(caption="")
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    return _fields(row, columns)


def _fields(row: dict[str, Any], columns: CaptionColumns) -> CaptionFields:
    """The fields of an object.

    Raises:
        ValueError: if its caption is no string.
    """
    caption = row.get(columns.caption)
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{columns.caption!r} is a JSON {type(caption).__name__}, not a string")
    return CaptionFields(caption=caption, id=None if columns.id is None else row.get(columns.id))


def read_json(file: IO[bytes], settings: CaptionSettings) -> Iterator[CaptionFields]:
    """The rows of a list of strings or objects, of objects by id, or of a COCO file's annotations.

    COCO has several annotations of each image: with the ids of images only the first one of each is a row.

    Raises:
        SourceError: if the file is too large, no JSON or of another form, or has no captions.
    """
    document = load_json(file)
    if isinstance(document, list):
        yield from _rows_of_list(document, settings)
    elif isinstance(document, dict) and isinstance(document.get("annotations"), list):
        annotations = document["annotations"]
        columns = find_keys((row for row in annotations if isinstance(row, dict)), settings)
        rows = _first_of_each_image(annotations) if columns.id == _IMAGE_ID else annotations
        yield from (_parse_value(row, columns) for row in rows)
    elif _is_keyed(document):
        yield from _rows_of_list([{"id": name} | row for name, row in document.items()], settings)
    else:
        raise SourceError(
            f"the JSON is {_describe(document)}; a list of strings, a list of objects, an object with an "
            "object for each id, and COCO's object with a list of 'annotations' are accepted"
        )


def _is_keyed(document: object) -> bool:
    """Whether it is an object with an object for each id, as MJHQ-30K has it."""
    return (
        isinstance(document, dict)
        and bool(document)
        and all(isinstance(row, dict) for row in document.values())
    )


def load_json(file: IO[bytes]) -> Any:  # noqa: ANN401 - any JSON value
    """The value in a file of at most 256 MiB.

    Raises:
        SourceError: if the file is larger, or no JSON.
    """
    data = bytearray()
    for chunk in utf8_chunks(file):
        data += chunk
        if len(data) > _MAX_JSON_BYTES:
            raise SourceError(
                f"a .json of more than {_MAX_JSON_BYTES >> 20} MiB, which is read at once: give a .jsonl, "
                "one object a line"
            )
    try:
        # Invalid UTF-8 passes through the parser as surrogates, and then costs only the caption it occurs in.
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        is_lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        advice = "; a file with one object a line is named .jsonl" if is_lines else ""
        raise SourceError(f"not readable as JSON: {error}{advice}") from None


def _rows_of_list(rows: list[Any], settings: CaptionSettings) -> Iterator[CaptionFields]:
    objects = [row for row in rows if isinstance(row, dict)]
    if settings.id_column is not None and rows and not objects:
        raise SourceError("a list of strings has no ids, so leave id_column out")
    columns = find_keys(objects, settings)
    for row in rows:
        yield CaptionFields(caption=row) if isinstance(row, str) else _parse_value(row, columns)


def _parse_value(row: object, columns: CaptionColumns) -> CaptionFields:
    if not isinstance(row, dict):
        return CaptionFields(fault=Rejected("bad_row", f"a JSON {type(row).__name__}, not an object"))
    try:
        return _fields(row, columns)
    except ValueError as error:
        return CaptionFields(fault=Rejected("bad_row", str(error)))


def _first_of_each_image(annotations: Iterable[Any]) -> Iterator[Any]:
    seen: set[str | int] = set()
    for row in annotations:
        image = row.get(_IMAGE_ID) if isinstance(row, dict) else None
        if isinstance(image, str | int) and not isinstance(image, bool):  # others are rejected as rows
            if image in seen:
                continue
            seen.add(image)
        yield row


def _describe(document: object) -> str:
    if not isinstance(document, dict):
        return f"a {type(document).__name__}"
    keys = [repr(key) for key in document]
    named = ", ".join(keys[:_MAX_KEYS_NAMED]) + (", ..." if len(keys) > _MAX_KEYS_NAMED else "")
    return f"an object with {named}" if keys else "an empty object"
