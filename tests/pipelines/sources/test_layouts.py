from collections import Counter
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layout_fixtures import BROKEN, ROWS, by_copy, by_list_layout, schema_of, table_of, write_list

from pipelines.rejections import Rejected, Rejection
from pipelines.sources.layouts import (
    LAYOUTS,
    SPELLINGS,
    UNKNOWN,
    Layout,
    Meaning,
    clean_metadata,
    image_column,
    number_of,
    recognise_layout,
    text_of,
)
from pipelines.sources.links import list_links, read_links
from pipelines.sources.settings import LinkSettings
from pipelines.stages.select import check, silent_bounds
from pipelines.stages.settings import Selection

by_name = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@by_name
def test_a_layout_is_recognised_by_its_columns(layout: Layout) -> None:
    assert layout.name in recognise_layout(layout.columns).split(" or ")
    assert layout.name in recognise_layout(set(layout.columns) - layout.optional).split(" or ")
    assert layout.name in recognise_layout([*layout.columns, "SEED", "__index_level_0__"]).split(" or ")
    assert recognise_layout(sorted(layout.columns)) == recognise_layout(sorted(layout.columns, reverse=True))


def test_only_two_layouts_share_their_columns() -> None:
    names = {layout.name: recognise_layout(layout.columns) for layout in LAYOUTS}
    assert names.pop("LAION-400M") == "LAION-400M or LAION-5B"
    assert all(name == recognised for name, recognised in names.items())


@pytest.mark.parametrize("columns", [[], ["URL", "TEXT"], ["a"], ["url", "caption", "width", "height"]])
def test_other_columns_are_unknown(columns: list[str]) -> None:
    assert recognise_layout(columns) == UNKNOWN


def test_each_column_has_one_meaning() -> None:
    assert set(SPELLINGS) == set(get_args(Meaning))
    names = [name for spellings in SPELLINGS.values() for name in spellings]
    assert len(names) == len(set(names))


@by_name
def test_every_layout_has_url_and_size(layout: Layout) -> None:
    for meaning in ("url", "width", "height"):
        assert layout.columns.keys() & set(SPELLINGS[meaning])


@by_copy
@by_list_layout
def test_fixtures_keep_their_types_in_parquet(tmp_path: Path, layout: Layout, copy: bool) -> None:
    schema = schema_of(layout, copy=copy)
    assert pq.read_schema(write_list(tmp_path, layout, copy=copy)).equals(schema)
    for name, types in layout.columns.items():
        assert schema.field(name).type in types


def test_images_are_bytes_in_known_columns() -> None:
    assert image_column(pa.schema([("key", pa.string()), ("webp", pa.binary())])) == "webp"
    assert image_column(pa.schema([("jpg", pa.large_binary())])) == "jpg"
    assert image_column(pa.schema([("jpg", pa.string())])) is None
    assert image_column(pa.schema([("picture", pa.binary())])) is None
    assert image_column(pa.schema([("image", pa.struct([("path", pa.string())]))])) is None


def test_metadata_drops_nulls_and_restores_integers() -> None:
    nan = float("nan")
    row = {"SAMPLE_ID": 12.0, "WIDTH": 640.0, "HEIGHT": nan, "hash": -3.0, "similarity": 1.0, "TEXT": b"\xff"}
    assert clean_metadata({**row, "NSFW": None, "pwatermark": nan}) == {
        "SAMPLE_ID": 12,
        "WIDTH": 640,
        "hash": -3,
        "similarity": 1.0,
    }
    assert isinstance(clean_metadata(row)["SAMPLE_ID"], int)
    assert isinstance(clean_metadata(row)["similarity"], float)
    assert clean_metadata({"WIDTH": 640.5}) == {"WIDTH": 640.5}


def test_the_most_trusted_usable_value_counts() -> None:
    assert number_of({"original_width": 0, "WIDTH": 640, "width": 512}, "width") == 640
    assert number_of({"nsfw_score_opennsfw2": 0.1, "nsfw_score_gantman": 0.9}, "unsafe") == 0.9
    assert number_of({"aesthetic": None, "AESTHETIC_SCORE": "six", "aesthetic_score": "5"}, "aesthetic") == 5
    assert number_of({}, "similarity") is None
    assert text_of({"url": " ", "URL": " http://a "}, "url") == "http://a"


# Selection from each layout: rows in and rows out, by reason.

BOUNDS = {"min_aesthetic": 4.6, "max_watermark": 0.9, "max_unsafe": 0.8, "min_similarity": 0.2}
SELECTION = Selection(min_width=250, min_height=250, refused_tags=("NSFW",), languages=("EN",), **BOUNDS)
# Of 12 rows 4 are broken and 2 say nothing but URL and caption. Rows 0 and 1 are of 100 and 200 px; row 2 has
# scores of 1/6, an aesthetic score of 4.5 and the tag NSFW; 9, 10 and 11 have scores of 3/4, 5/6 and 11/12,
# 11 the tag NSFW, and only 9 is English.
LAION = {"low_resolution": 2, "unsafe": 2}
JOINED = {"low_resolution": 2, "watermarked": 1, "unsafe": 1, "low_similarity": 1, "accepted": 3}
AESTHETIC = {"low_resolution": 2, "low_aesthetic": 1, "watermarked": 1, "unsafe": 1, "accepted": 3}
# Of each layout: the outcomes, and the bounds that have no column.
EXPECTED = {
    "LAION-400M": (LAION | {"accepted": 4}, "min_aesthetic max_watermark max_unsafe languages"),
    "LAION-5B": (LAION | {"other_language": 1, "accepted": 3}, "min_aesthetic max_watermark max_unsafe"),
    "laion2B-en-joined": (JOINED, "min_aesthetic refused_tags languages"),
    "laion2B-en-aesthetic": (AESTHETIC, "refused_tags languages"),
    "LAION-Aesthetics V2": (AESTHETIC, "refused_tags languages"),
    "laion-coco": (JOINED, "min_aesthetic refused_tags languages"),
    "COYO-700M": (AESTHETIC, "refused_tags languages"),
}


@by_copy
@by_list_layout
def test_each_layout_is_selected_by_reason(tmp_path: Path, layout: Layout, copy: bool) -> None:
    (links,) = list_links(str(write_list(tmp_path, layout, copy=copy)))
    outcomes: Counter[str] = Counter()
    for row in read_links(links, LinkSettings()):
        try:
            if isinstance(row, Rejection):
                raise Rejected(row.reason, row.detail)
            check(row.metadata, caption=row.caption, selection=SELECTION)
            outcomes["accepted"] += 1
        except Rejected as rejected:
            outcomes[rejected.reason] += 1
    assert outcomes == Counter(BROKEN.values()) + Counter(EXPECTED[layout.name][0])
    assert sum(outcomes.values()) == ROWS == table_of(layout).num_rows


@by_list_layout
def test_bounds_without_a_column_are_named(layout: Layout) -> None:
    assert silent_bounds(SELECTION, layout.columns) == EXPECTED[layout.name][1].split()
