"""docs/efficient_unet.md: its figures are those of the files beside it, and of the code."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from jobs.timing import architectures_of
from snapfusion.evolution.latency import LatencyTable, by_kind
from snapfusion.models import sd15
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import costs_of, table_of
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "efficient_unet.md").read_text()
FLOWING = " ".join(TEXT.split())
FILES = {"sd15": "latency-sd15-cpu", "mini": "latency-mini-cpu"}


def rows(heading):
    """The cells of each row of the tables in a section, without heads and rules."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return architectures_of(architecture_of(UNet2DConditionModel(**sd15.UNET)))


def latency(name):
    text = (DOCS / "efficiency" / f"{FILES[name]}.json").read_text()
    assert '"/' not in text, "a place on somebody's machine"
    return json.loads(text)


def test_table_3_is_the_architectures(full_size):
    told = [[str(cell) for cell in row] for row in table_of(*full_size.values())]
    assert rows("Architecture")[1:15] == told


def test_counts_are_counted_again(full_size):
    origin, efficient = full_size.values()
    shallow = origin
    outermost = [block.name for block in origin.blocks if block.kind == "attention" and block.depth == 0]
    for name in outermost:
        shallow = shallow.without(name)
    told = {row[0]: row[1:3] for row in rows("Architecture")[16:]}
    named = zip(told, (origin, efficient, shallow), strict=True)
    whole = {name: costs_of(architecture).whole for name, architecture in named}
    assert told == {
        name: [f"{cost.parameters:,}", f"{cost.macs / 1e9:.1f} billion"] for name, cost in whole.items()
    }

    def parameters(architecture, kind):
        costs = costs_of(architecture).blocks
        return sum(costs[block.name].parameters for block in architecture.blocks if block.kind == kind)

    taken = parameters(origin, "resnet") - parameters(efficient, "resnet")
    of_outermost = sum(costs_of(origin).blocks[name].parameters for name in outermost)
    added = parameters(efficient, "attention") - parameters(origin, "attention") + of_outermost
    for count in (taken, added, of_outermost):
        assert f"{count / 1e6:.1f} million" in FLOWING


def test_the_latency_table_is_that_of_the_files(full_size):
    told = rows("Latency table")[1:]
    expected = []
    for name in FILES:
        found = latency(name)
        table = LatencyTable.parse(found["table"])
        for unet in found["unets"].values():
            assert table.predict_ms(Architecture.parse(unet["architecture"])) == pytest.approx(
                unet["predicted_ms"]
            )
            times = [unet["measured"][key] for key in ("median_ms", "low_ms", "high_ms")]
            digits = 0 if name == "sd15" else 1
            median, low, high, predicted = (f"{ms:,.{digits}f}" for ms in (*times, unet["predicted_ms"]))
            expected.append([f"{median} ({low}–{high})", predicted, f"{100 * unet['error']:+.1f} %"])
    assert [row[1:] for row in told] == expected
    kept = {name: Architecture.parse(unet["architecture"]) for name, unet in latency("sd15")["unets"].items()}
    assert kept == full_size
    mini = architectures_of(architecture_of(load("mini").unet))
    assert [unet["architecture"] for unet in latency("mini")["unets"].values()] == [
        architecture.to_values() for architecture in mini.values()
    ]


def test_at_full_size_the_prediction_is_within_ten_percent():
    assert all(abs(unet["error"]) < 0.1 for unet in latency("sd15")["unets"].values())


def test_the_share_of_the_outermost_attention_is_that_of_the_file(full_size):
    table, origin = LatencyTable.parse(latency("sd15")["table"]), full_size["origin"]
    bars = [
        row
        for row in by_kind(table, origin)
        if row["kind"] == "attention" and row["stage"] in ("Down-1", "Up-3")
    ]
    time = sum(row["ms"] for row in bars) / table.predict_ms(origin)
    weights = sum(row["parameters"] for row in bars) / costs_of(origin).whole.parameters
    assert f"{100 * time:.0f} % of SD-v1.5's predicted time with {100 * weights:.1f} % of its par" in FLOWING


def test_the_pictures_are_there():
    for kind in ("ms", "parameters"):
        assert f"(efficiency/latency-sd15-cpu-{kind}.svg)" in TEXT
        assert (DOCS / "efficiency" / f"latency-sd15-cpu-{kind}.svg").read_text().startswith("<svg xmlns")
