"""The latency table: parts that add up to UNets; tables of something else refused. SnapFusion Sec. 2.2."""

import time
import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel

from snapfusion.evolution.latency import (
    LatencyError,
    LatencyTable,
    MeasurementSetup,
    PartLatency,
    latency_by_kind,
    latency_by_stage,
    reachable_parts,
)
from snapfusion.evolution.parts import Part, dimensions_of, inputs_of, module_of, parts_of
from snapfusion.evolution.runtimes import make_benchmark
from snapfusion.evolution.stopwatch import Timing, time_in_turns
from snapfusion.mini import models
from snapfusion.models import sd15
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.cost import block_count_table, costs_of
from snapfusion.models.unet import BlockUNet, architecture_of, build_unet

SETUP = MeasurementSetup(device="a test", runtime="torch", precision="float32", threads=1)
TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two that wait for each other beside another busy process can take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def origin():
    return architecture_of(models.unet())


def table_of(architecture, *, ms):
    """A table that says `ms` of each part."""
    times = {
        part: Timing(median_ms=ms(part), low_ms=0, high_ms=9, turns=3)
        for part in reachable_parts(architecture)
    }
    return LatencyTable(
        setup=SETUP,
        date="2026-11-21",
        dimensions=dimensions_of(architecture, batch=2, tokens=TOKENS),
        parts=tuple(PartLatency(part=part, times=taken) for part, taken in times.items()),
    )


def parameters(part, dimensions):
    return sum(parameter.numel() for parameter in module_of(part, dimensions=dimensions).parameters())


def test_the_parts_of_a_unet_are_all_of_it(origin):
    """Each part's module has the parameters that it has in the UNet, so their sum is the UNet's."""
    for architecture in (origin, efficient_architecture(origin), origin.without("up_blocks.1.resnets.0")):
        dimensions = dimensions_of(architecture, batch=2, tokens=TOKENS)
        whole = sum(parameters(part, dimensions) for _, part in parts_of(architecture))
        assert whole == costs_of(architecture).total.parameters


def test_so_they_are_at_full_size():
    with torch.device("meta"):
        architecture = architecture_of(UNet2DConditionModel(**sd15.UNET))
        dimensions = dimensions_of(architecture, batch=2, tokens=77)
        whole = sum(parameters(part, dimensions) for _, part in parts_of(architecture))
    assert whole == sd15.UNET_PARAMETERS
    # 22 ResNet blocks, 16 cross-attentions, 12 joins, 6 samplers, the ends; many are of the same form.
    forms = reachable_parts(architecture)
    assert len(parts_of(architecture)) == 57
    assert len([part for part in forms if part.kind != "shortcut"]) < 43 == len(forms)


def test_inputs_have_the_shapes_that_the_unet_gives_its_parts(origin):
    """A part runs on them, and hands on what the next one takes."""
    dimensions = dimensions_of(origin, batch=2, tokens=TOKENS)
    for part in reachable_parts(origin):
        module, inputs = module_of(part, dimensions=dimensions), inputs_of(part, dimensions=dimensions)
        output = module(*inputs)
        output = output if isinstance(output, torch.Tensor) else output[0]
        side = {"downsampler": part.side // 2, "upsampler": part.side * 2}.get(part.kind, part.side)
        channels = 4 if part.kind == "ends" else part.out_channels
        assert output.shape == (2, channels, side, side), str(part)


def test_a_block_is_worth_the_parts_that_go_with_it(origin):
    cost = {"attention": 5.0, "resnet": 3.0, "shortcut": 0.5}
    table = table_of(origin, ms=lambda part: cost.get(part.kind, 0.25))
    assert table.block_ms(origin, "down_blocks.0.attentions.1") == pytest.approx(5.0)
    assert table.block_ms(origin, "mid_block.resnets.0") == pytest.approx(3.0)
    assert table.block_ms(origin, "up_blocks.0.resnets.0") == pytest.approx(2.5)
    copied = origin.with_copy("mid_block.attentions.0")
    assert table.predict_ms(copied) - table.predict_ms(origin) == pytest.approx(5.0)
    efficient = table.predict_ms(efficient_architecture(origin))
    removed = dict.fromkeys(cost, 0)
    for (stage, kind), count in origin.counts().items():
        removed[kind] += count - efficient_architecture(origin).counts()[stage, kind]
    joins = len([part for _, part in parts_of(origin) if part.kind == "join"])
    joins -= len([part for _, part in parts_of(efficient_architecture(origin)) if part.kind == "join"])
    expected = sum(cost[kind] * count for kind, count in removed.items()) + 0.25 * joins
    assert table.predict_ms(origin) - efficient == pytest.approx(expected)


def test_a_table_says_what_every_smaller_unet_takes(origin):
    table = table_of(origin, ms=lambda part: 1.0)
    rest = origin
    for block in reversed(origin.blocks):
        assert table.block_ms(rest, block.name) >= 0.0
        rest = rest.without(block.name)
        assert table.predict_ms(rest) == len(parts_of(rest))


def test_stages_add_up_to_the_whole(origin):
    table = table_of(origin, ms=lambda part: float(part.in_channels))
    stages = latency_by_stage(table, origin)
    assert [row["stage"] for row in stages] == ["ends", *origin.stages]
    assert sum(row["ms"] for row in stages) == pytest.approx(table.predict_ms(origin))
    assert sum(row["share"] for row in stages) == pytest.approx(1.0)


def test_the_bars_of_fig_2_are_of_the_blocks_and_named_as_in_table_3(origin):
    cost = {"attention": 5.0, "resnet": 3.0}
    table = table_of(origin, ms=lambda part: cost.get(part.kind, 100.0))
    rows = latency_by_kind(table, efficient_architecture(origin))
    assert [row["stage"] for row in rows[::2]] == ["Down-1", "Down-2", "Mid", "Up-1", "Up-2"]
    assert [row["blocks"] for row in rows] == [
        row[-1] for row in block_count_table(efficient_architecture(origin))
    ]
    for row in rows:
        assert row["ms"] == pytest.approx(cost[row["kind"]] * row["blocks"])
    costs = costs_of(efficient_architecture(origin))
    assert sum(row["parameters"] for row in rows) == sum(cost.parameters for cost in costs.blocks.values())


def test_a_table_comes_back_from_its_file(origin):
    table = table_of(origin, ms=lambda part: 1.5)
    again = LatencyTable.parse(table.to_values())
    assert again == table
    assert again.predict_ms(origin) == table.predict_ms(origin)


def test_a_table_of_something_else_is_refused_with_the_difference(origin):
    table = table_of(origin, ms=lambda part: 1.0)
    with pytest.raises(LatencyError, match="context is 64 there, 48 here"):
        table.predict_ms(origin.changed(context=48))
    with pytest.raises(LatencyError, match=r"of a test has no resnet of 24 to 24 channels at 16x16"):
        table.part_ms(Part(kind="resnet", side=16, in_channels=24, out_channels=24))
    with pytest.raises(LatencyError, match=r'precision is "float32" there, "float16" here'):
        table.check_setup(SETUP.model_copy(update={"precision": "float16"}))
    table.check_setup(SETUP)


def test_turns_are_taken_and_told():
    told, order = [], []

    def run(name, seconds):
        def once():
            order.append(name)
            time.sleep(seconds)

        return once

    times = time_in_turns({"a": run("a", 0.004), "b": run("b", 0.012)}, turns=4, on_turn=told.append)
    assert told == [1, 2, 3, 4]
    assert order == ["a", "a", "b", "b", *("a", "b") * 4]  # two to warm and to gauge, then in turn
    assert times["a"].low_ms <= times["a"].median_ms <= times["a"].high_ms
    assert 4.0 <= times["a"].median_ms < times["b"].median_ms
    with pytest.raises(ValueError, match="1 turns have no spread"):
        time_in_turns({}, turns=1)


def test_what_takes_less_than_the_clock_tells_is_run_several_times():
    count = []
    time_in_turns({"quick": lambda: count.append(1)}, turns=2)
    assert len(count) > 100


@pytest.mark.parametrize("runtime", ["torch", "torch-compiled", "executorch-xnnpack"])
def test_every_runtime_runs_every_kind_of_part(runtime, origin):
    dimensions = dimensions_of(origin, batch=2, tokens=TOKENS)
    kinds = {part.kind: part for part in reachable_parts(origin)}
    assert len(kinds) == 7
    if runtime != "torch":  # what is compiled takes seconds each
        kinds = {kind: kinds[kind] for kind in ("resnet", "ends")}
    runs = {
        kind: make_benchmark(
            module_of(part, dimensions=dimensions),
            inputs_of(part, dimensions=dimensions),
            runtime=runtime,
            precision="float32",
            device=torch.device("cpu"),
        )
        for kind, part in kinds.items()
    }
    times = time_in_turns(runs, turns=2)
    assert all(taken.median_ms > 0 for taken in times.values())


def test_no_part_and_no_unet_warns(origin):
    """A library's warning would stand between the turns that a job tells of."""
    dimensions = dimensions_of(origin, batch=2, tokens=TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in reachable_parts(origin):
            module_of(part, dimensions=dimensions)(*inputs_of(part, dimensions=dimensions))
        for architecture in (origin, efficient_architecture(origin)):
            unet_inputs = (torch.randn(1, 4, 8, 8), torch.tensor([999.0]), torch.randn(1, TOKENS, 64))
            build_unet(architecture)(*unet_inputs)


def test_a_whole_unet_is_run_likewise(origin):
    """One of few blocks, since to compile them all takes a minute."""
    kept = ("down_blocks.0.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    small = origin
    for block in origin.blocks:
        small = small if block.name in kept else small.without(block.name)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([999.0]), torch.randn(1, TOKENS, 64))
    run = make_benchmark(
        BlockUNet.of(small).eval(),
        inputs,
        runtime="executorch-xnnpack",
        precision="float32",
        device=torch.device("cpu"),
    )
    run()


def test_a_precision_that_a_runtime_has_not_is_refused(origin):
    part = reachable_parts(origin)[0]
    dimensions = dimensions_of(origin, batch=1, tokens=TOKENS)
    with pytest.raises(LatencyError, match="in float32 on the CPU, not in bfloat16 on cpu"):
        make_benchmark(
            module_of(part, dimensions=dimensions),
            inputs_of(part, dimensions=dimensions),
            runtime="executorch-xnnpack",
            precision="bfloat16",
            device=torch.device("cpu"),
        )
