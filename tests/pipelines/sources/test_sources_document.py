"""docs/sources.md says what the code does: its tables are made of the code's own."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.rejections import REASONS
from pipelines.sources.layouts import LAYOUTS, SPELLINGS
from pipelines.stages.select import BOUNDS
from pipelines.stages.settings import Blocklists, Selection

DOCUMENT = (Path(__file__).parents[3] / "docs" / "sources.md").read_text()


def layout_rows() -> Iterator[str]:
    for layout in LAYOUTS:
        columns = (_column(name, types, name in layout.optional) for name, types in layout.columns.items())
        yield f"| {layout.name} | {', '.join(columns)} |"


def _column(name: str, types: tuple[pa.DataType, ...], optional: bool) -> str:
    return f"`{name}` {' or '.join(map(_type, types))}{' (not always)' if optional else ''}"


def _type(kind: pa.DataType) -> str:
    arrow = str(kind).replace("item: ", "")
    return re.sub(r"\bdouble\b", "float64", re.sub(r"\bfloat\b", "float32", arrow))


def meaning_rows() -> Iterator[str]:
    for meaning, names in SPELLINGS.items():
        columns = ", ".join(f"`{name}`" for name in names)
        bounds = ", ".join(f"`{bound.setting}`" for bound in BOUNDS if meaning in bound.columns)
        yield f"| {meaning.replace('_', ' ')} | {columns} | {bounds} |"


def bound_rows() -> Iterator[str]:
    # Python 3.13 takes the indentation off `__doc__`, earlier versions keep it.
    attributes = (inspect.getdoc(Selection) or "").partition("Attributes:\n")[2]
    descriptions = dict(re.findall(r"^    (\w+): (.+?)(?=^    \w+: |\Z)", attributes, re.M | re.S))
    for bound in BOUNDS:
        yield f"| `{bound.setting}` | {' '.join(descriptions[bound.setting].split())} | `{bound.reason}` |"


def reason_rows() -> Iterator[str]:
    for reason, meaning in REASONS.items():
        yield f"| `{reason}` | {meaning} |"


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("| layout | columns |", layout_rows),
        ("| meaning | columns, the most trusted first | bounds |", meaning_rows),
        ("| setting of `latents.selection` | condition | reason |", bound_rows),
        ("| reason | meaning |", reason_rows),
    ],
)
def test_tables_agree_with_the_code(header, rows) -> None:
    lines = [header, re.sub(r"[^|]+", "---", header), *rows()]
    missing = [line for line in lines if line not in DOCUMENT.splitlines()]
    assert not missing, "docs/sources.md lacks:\n" + "\n".join(missing)
    assert "\n".join(lines) in DOCUMENT, "docs/sources.md has its lines in another order, or more of them"


def test_named_settings_exist() -> None:
    for name in re.findall(r"latents\.selection\.(\w+)", DOCUMENT):
        assert name in Selection.model_fields
    assert set(re.findall(r"source\.blocklists\.(\w+)", DOCUMENT)) == set(Blocklists.model_fields)
