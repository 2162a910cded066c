"""docs/efficient_unet.md: its figures are those of the files beside it, and of the code."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from jobs.evaluation.efficiency import PAPER_RATIOS
from jobs.evaluation.timing import architectures_of
from snapfusion.evolution.latency import LatencyTable, latency_by_kind
from snapfusion.evolution.search import BlockScore
from snapfusion.models import sd15
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import block_count_table, costs_of
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of

DOCS = Path(__file__).parents[3] / "docs"
TEXT = (DOCS / "efficient_unet.md").read_text()
FLOWING = " ".join(TEXT.split())


def section_text(heading: str) -> str:
    return TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def section(heading: str) -> str:
    """A section's text in one line."""
    return " ".join(section_text(heading).split())


FILES = {"sd15": "latency-sd15-cpu", "mini": "latency-mini-cpu"}


def rows(heading):
    """The cells of each row of the tables in a section, without heads and rules."""
    lines = [line for line in section_text(heading).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return architectures_of(architecture_of(UNet2DConditionModel(**sd15.UNET)))


def read(name):
    text = (DOCS / "efficiency" / f"{name}.json").read_text()
    assert '"/' not in text, "a local path"
    return json.loads(text)


def latency(name):
    return read(FILES[name])


def test_table_3_is_the_architectures(full_size):
    shown = [[str(cell) for cell in row] for row in block_count_table(*full_size.values())]
    assert rows("Architecture")[1:15] == shown


@pytest.mark.slow
def test_counts_are_counted_again(full_size):
    origin, efficient = full_size.values()
    shallow = origin
    outermost = [block.name for block in origin.blocks if block.kind == "attention" and block.depth == 0]
    for name in outermost:
        shallow = shallow.without(name)
    shown = {row[0]: row[1:3] for row in rows("Architecture")[16:]}
    wholes = [costs_of(architecture).total for architecture in (origin, efficient, shallow)]
    assert list(shown.values()) == [
        [f"{one.parameters:,}", f"{one.macs / 1e9:.1f} billion"] for one in wholes
    ]

    def parameters(architecture, kind):
        costs = costs_of(architecture).blocks
        return sum(costs[block.name].parameters for block in architecture.blocks if block.kind == kind)

    removed = parameters(origin, "resnet") - parameters(efficient, "resnet")
    of_outermost = sum(costs_of(origin).blocks[name].parameters for name in outermost)
    added = parameters(efficient, "attention") - parameters(origin, "attention") + of_outermost
    for count in (removed, added, of_outermost):
        assert f"{count / 1e6:.1f} million" in FLOWING


def test_the_latency_table_is_that_of_the_files(full_size):
    shown = rows("Latency table")[1:]
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
    assert [row[1:] for row in shown] == expected
    kept = {name: Architecture.parse(unet["architecture"]) for name, unet in latency("sd15")["unets"].items()}
    assert kept == full_size
    mini = architectures_of(architecture_of(load("mini").unet))
    assert [unet["architecture"] for unet in latency("mini")["unets"].values()] == [
        architecture.to_values() for architecture in mini.values()
    ]


def test_full_size_predictions_are_within_ten_percent():
    assert all(abs(unet["error"]) < 0.1 for unet in latency("sd15")["unets"].values())


def test_the_share_of_outermost_attention_is_measured(full_size):
    table, origin = LatencyTable.parse(latency("sd15")["table"]), full_size["origin"]
    attention = [row for row in latency_by_kind(table, origin) if row["kind"] == "attention"]
    bars = [row for row in attention if row["stage"] in ("Down-1", "Up-3")]
    time = sum(row["ms"] for row in bars) / table.predict_ms(origin)
    weights = sum(row["parameters"] for row in bars) / costs_of(origin).total.parameters
    assert f"{100 * time:.0f} %" in section("Latency table")
    assert f"{100 * weights:.1f} %" in section("Latency table")


def test_the_images_exist():
    for kind in ("ms", "parameters"):
        assert f"(efficiency/latency-sd15-cpu-{kind}.svg)" in TEXT
        assert (DOCS / "efficiency" / f"latency-sd15-cpu-{kind}.svg").read_text().startswith("<svg xmlns")


def formatted(interval):
    value, low, high = interval
    return f"{value:.2f} ({low:.2f}–{high:.2f})"


def cells_of(lost, digits, *, spread):
    """Plain's loss, robust's, and the ratio, as the table has them."""
    ratio = lost["ratio"]
    shown = "–" if ratio is None else formatted(ratio) if spread else f"{ratio[0]:.2f}"
    return [f"{lost[name][0]:z.{digits}f}" for name in ("plain", "robust")] + [shown]


def test_the_robustness_table_is_that_of_the_file():
    found = read("robustness")["summary"]
    attributes, detail = found["attributes"], found["detail"]
    expected = []
    for group, lost in attributes["lost"].items():
        cells = cells_of(detail["lost"][group], 2, spread=False)
        expected.append([group, *cells_of(lost, 3, spread=False), *cells])
    averages = {"mean of the groups": [one["lost_on_average"] for one in (attributes, detail)]} | {
        f"the same, seed {seed}": [one["lost_on_average_by_seed"][seed] for one in (attributes, detail)]
        for seed in ("0", "1", "2")
    }
    for name, (semantics, details) in averages.items():
        expected.append([name, *cells_of(semantics, 3, spread=True), *cells_of(details, 2, spread=True)])
    assert rows("Robust training")[1:] == expected
    whole = {name: detail["value"][name]["whole"][0] for name in ("robust", "plain")}
    assert all(f"{value:.1f} dB" in section("Robust training") for value in whole.values())
    strict = [formatted(one["below_plain_on_average"]["ratio"]) for one in (detail, attributes)]
    assert all(ratio in section("Robust training") for ratio in strict)


def test_robust_training_halves_the_loss_for_every_seed():
    for what in read("robustness")["summary"].values():
        for seed in what["lost_on_average_by_seed"].values():
            assert seed["ratio"][2] < 0.5


def test_evolution_rounds_are_those_of_the_file():
    found = read("evolution")
    expected = []
    for finished in found["rounds"]:
        decision, clip, seconds = finished["decision"], finished["clip"], finished["action_seconds"]
        expected.append(
            [
                str(finished["number"]),
                "–" if clip is None else "{:.4f} ({:.4f}–{:.4f})".format(*clip),
                decision["action"],
                ", ".join(f"`{block}`" for block in decision["blocks"]) or "–",
                f"{decision['before_ms']:.1f}",
                f"{decision['after_ms']:.1f}",
                "–" if seconds is None else f"{seconds:.1f}",
            ]
        )
    assert rows("Evolution")[1 : 1 + len(expected)] == expected
    first, last = found["rounds"][0]["decision"], found["rounds"][-1]["decision"]
    # The table that it evolved by is the one on this page.
    table = LatencyTable.parse(latency("mini")["table"])
    # From Python 3.12 on, sum() of floats is compensated, and the last digit differs from the file's.
    predicted = table.predict_ms(Architecture.parse(found["origin"]))
    assert predicted == pytest.approx(first["before_ms"], rel=1e-12)
    assert f"{first['before_ms']:.2f} ms" in section("Evolution")
    assert last["after_ms"] <= found["objective_ms"] < 0.6 * first["before_ms"]
    scores = [BlockScore.parse(score) for score in found["rounds"][0]["scores"]]
    best = max(scores, key=lambda score: score.value)
    value, low, high = best.delta_clip
    for quoted in (f"`{best.block}`", f"{value:.3f}", f"({low:.3f} to {high:.3f})"):
        assert quoted in section("Evolution")


def test_each_round_follows_algorithm_1():
    found = read("evolution")
    architecture = Architecture.parse(found["origin"])
    for finished in found["rounds"]:
        decision = finished["decision"]
        scores = {score["block"]: BlockScore.parse(score) for score in finished["scores"]}
        order = sorted(scores, key=lambda name: scores[name].value, reverse=decision["action"] == "copy")
        able = [name for name in order if decision["action"] == "remove" or architecture.can_copy(name)]
        assert decision["blocks"] == able[: len(decision["blocks"])]
        for name in decision["blocks"]:
            change = architecture.with_copy if decision["action"] == "copy" else architecture.without
            architecture = change(name)
        assert architecture.to_values() == decision["architecture"]


FIGURES = {"clip": 4, "fid": 2, "all_attributes": 3}


def test_the_evolved_architecture_beats_the_random_median():
    found = read("chance")
    others = [one for name, one in found["architectures"].items() if name != "evolved"]
    evolved = found["architectures"]["evolved"]
    assert len(others) == 10
    expected = []
    for number, reading in enumerate(found["readings"]):
        for figure, digits in FIGURES.items():
            values = [one["points"][number][figure][0] for one in others]
            mine, sign = evolved["points"][number][figure][0], -1 if figure == "fid" else 1
            assert sign * mine > sign * statistics.median(values)
            best = max(values, key=lambda value, sign=sign: sign * value)
            cells = [f"{value:.{digits}f}" for value in (mine, statistics.median(values), best)]
            worse = sum(sign * value < sign * mine for value in values)
            expected.append([f"{reading['w']:g}", *cells, str(worse)])
    assert [row[1:] for row in rows("Evolution")[-len(expected) :]] == expected
    architecture = Architecture.parse(read("evolution")["rounds"][-1]["decision"]["architecture"])
    assert evolved["architecture"] == architecture.to_values()
    for one in others:
        assert one["predicted_ms"] == pytest.approx(evolved["predicted_ms"], rel=0.03)
    times, own = [one["measured"]["median_ms"] for one in others], evolved["measured"]["median_ms"]
    assert f"{min(times):.1f} to {max(times):.1f} ms, the evolved one {own:.1f}" in FLOWING
    losses = (evolved["loss"], statistics.median(one["loss"] for one in others))
    assert "rows is {:.4f}, and {:.4f} the median of the ten".format(*losses) in FLOWING


def test_the_students_table_is_that_of_the_file():
    curves = read("twin")["curves"]
    cells_of = rows("The efficient miniature: fewer steps and the half-width decoder")[1:]
    shown = {row[0].split("`")[1]: row[1:] for row in cells_of}
    assert set(shown) == set(curves)
    for name, cells in shown.items():
        points = curves[name]["points"]
        fid, clip = ([point[key][0] for point in points] for key in ("fid", "clip"))
        steps = str(curves[name]["sampler"]["steps"])
        assert cells == [steps, *(f"{value:.2f}" for value in fid), *(f"{value:.3f}" for value in clip)]
    order = ("twin-8", "vanilla-8", "self-8", "plain-8", "staged-8")
    for number, point in enumerate(curves["twin-8"]["points"]):
        if point["w"] >= 2.0:
            fid = [curves[name]["points"][number]["fid"][0] for name in order]
            assert fid == sorted(fid, reverse=True)


def test_quoted_differences_are_in_the_file():
    found = read("twin")

    def at(differences, name, w):
        return next(point for point in differences[name] if point["w"] == w)

    against = found["against"]["staged-8"]["differences"]
    for name in ("plain-8", "self-8", "vanilla-8"):
        value, low, high = at(against, name, 3.0)["fid"]
        assert low > 0.0
        assert f"{value:.2f} ({low:.2f} to {high:.2f})" in FLOWING
    assert at(against, "staged-8-half", 2.0)["fid"][1] > 0.0
    assert all(at(against, "staged-8-half", w)["fid"][1] < 0.0 for w in (3.0, 4.0, 6.0))
    gain = at(found["differences"], "staged-8", 6.0)["clip"][0]
    assert f"`staged-8` has {gain:.4f} more" in FLOWING
    costs = [-at(against, "staged-8-half", w)["clip"][0] for w in (3.0, 6.0)]
    assert "costs {:.4f} of CLIP at w = 3 and {:.4f} at w = 6".format(*costs) in FLOWING


def test_step_times_and_memory_are_measured(full_size):
    found = read("efficiency-sd15-cpu")
    unets, decoders = found["unets"].values(), found["decoders"].values()
    assert (found["model"], found["settings"]["loop"]) == ("random:sd15", True)
    assert [unet["parameters"] for unet in unets] == [
        costs_of(architecture).total.parameters for architecture in full_size.values()
    ]
    expected = {
        "step": [f"{unet['step']['median_ms']:,.0f} ms" for unet in unets],
        "loop": [f"{unet['loop']['ms'] / 1000:,.1f} s" for unet in unets],
        "memory": [f"{unet['memory']['unet_mb']:,.0f} MB" for unet in unets],
        "parameters": [f"{unet['parameters']:,}" for unet in unets],
        "macs": [f"{unet['macs'] / 1e9:.1f} billion" for unet in unets],
        "decoder": [f"{decoder['time']['median_ms']:,.0f} ms" for decoder in decoders],
        "decoder_parameters": [f"{decoder['parameters']:,}" for decoder in decoders],
    }
    papers = {name: f"{PAPER_RATIOS[name]:.3g}" if name in PAPER_RATIOS else "" for name in expected}
    assert [row[1:] for row in rows("Step time and memory")[1:]] == [
        [*cells, f"{found['ratios'][name]:.2f}", papers[name]] for name, cells in expected.items()
    ]


def test_the_half_width_decoder_is_three_times_faster():
    found = read("efficiency-sd15-cpu-one-thread")
    assert (found["model"], found["setting"]["threads"]) == ("random:sd15", 1)
    step, decoder = (found["ratios"][name] for name in ("step", "decoder"))
    assert decoder >= 3.0
    assert f"a step takes {step:.2f} times less and the decoder {decoder:.2f} times" in FLOWING
