"""A URL list in each public layout, with the Arrow types of its publisher and the flaws of real lists."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources.layouts import LAYOUTS, Layout

SHARD_LAYOUTS = tuple(layout for layout in LAYOUTS if layout.name.startswith("img2dataset"))
LIST_LAYOUTS = tuple(layout for layout in LAYOUTS if layout not in SHARD_LAYOUTS)

by_list_layout = pytest.mark.parametrize("layout", LIST_LAYOUTS, ids=lambda layout: layout.name)
by_copy = pytest.mark.parametrize("copy", [False, True], ids=["published", "copy"])

ROWS = 12
# The flawed rows of every fixture, and the reason of their rejection.
BROKEN = {3: "missing_url", 4: "missing_caption", 5: "bad_url", 6: "empty_caption"}
# Rows without any optional value, which are links nevertheless.
BARE = (7, 8)


def schema_of(layout: Layout, *, copy: bool = False) -> pa.Schema:
    """The layout's columns with their documented types, or those of a copy that went through pandas."""
    return pa.schema([(name, types[-1] if copy else types[0]) for name, types in layout.columns.items()])


def table_of(layout: Layout, *, copy: bool = False, rows: int = ROWS) -> pa.Table:
    """Rows of which `BROKEN` are flawed and `BARE` have only URL and caption."""
    schema = schema_of(layout, copy=copy)
    columns = {field.name: [_value(field, row, copy=copy) for row in range(rows)] for field in schema}
    return pa.table(
        {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}, schema=schema
    )


def write_list(folder: Path, layout: Layout, *, copy: bool = False) -> Path:
    """The table as a Parquet file of several row groups, compressed as these data sets are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "part-00000.parquet"
    pq.write_table(table_of(layout, copy=copy), path, row_group_size=5, compression="snappy")
    return path


def _value(field: pa.Field, row: int, *, copy: bool) -> Any:
    name, kind = field.name, field.type
    if name in ("url", "URL"):
        return {3: None, 5: "data:image/png;base64,AAAA"}.get(row, f"https://host{row}.example/{row}.jpg")
    if name in ("caption", "TEXT", "text"):
        return {4: None, 6: " \u200b\n"}.get(row, f"a picture of number {row}")
    if row in BARE:
        # pandas writes NaN for a missing value.
        return math.nan if copy and pa.types.is_floating(kind) else None
    if pa.types.is_list(kind):
        return [f"caption {row}", "another"] if pa.types.is_string(kind.value_type) else [0.5, 0.25]
    if pa.types.is_string(kind):
        return _text(name, row)
    return _number(name, row) if pa.types.is_floating(kind) else int(_number(name, row))


def _text(name: str, row: int) -> str:
    classes = {"NSFW": ("UNLIKELY", "UNSURE", "NSFW"), "LANGUAGE": ("en", "vi", "nolang")}
    if name in classes:
        return classes[name][row % 3]
    return f"{row:016x}" if name == "image_phash" else f"{name} {row}"


def _number(name: str, row: int) -> float:
    """Sizes 100, 200, ...; large ids; aesthetic scores 4.0, 4.25, ...; other scores from 0 to 1."""
    if name.lower() in ("width", "height"):
        return 100.0 * (row + 1)
    if name in ("SAMPLE_ID", "id", "hash"):
        return 1_000_000_007.0 * (row + 1) * (-1 if name == "hash" else 1)
    if name in ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"):
        return 4.0 + row / 4
    return row / ROWS
