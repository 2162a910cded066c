"""The latency table: parts that add up to UNets, timing, runtimes. SnapFusion Sec. 2.2."""

import time

import pytest
import torch
from diffusers import UNet2DConditionModel
from latency_inputs import known_table

from snapfusion.evolution.latency import (
    LatencyError,
    LatencyTable,
    latency_by_kind,
    latency_by_stage,
    reachable_parts,
)
from snapfusion.evolution.parts import Part, dimensions_of, inputs_of, module_of, parts_of
from snapfusion.evolution.runtimes import Backend
from snapfusion.evolution.stopwatch import time_in_turns
from snapfusion.mini import models
from snapfusion.models import sd15
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.cost import block_count_table, costs_of
from snapfusion.models.unet import architecture_of, block_unet, build_unet

ORIGIN = architecture_of(models.unet())
EFFICIENT = efficient_architecture(ORIGIN)
DIMENSIONS = dimensions_of(ORIGIN, batch=2, tokens=24)
UNET_INPUTS = (torch.randn(1, 4, 8, 8), torch.tensor([999.0]), torch.randn(1, 24, 64))


pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(architecture):
    dimensions = dimensions_of(architecture, batch=2, tokens=24)
    modules = (module_of(part, dimensions=dimensions) for _, part in parts_of(architecture))
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def module_and_inputs(part):
    return module_of(part, dimensions=DIMENSIONS), inputs_of(part, dimensions=DIMENSIONS)


def benchmark(module, inputs, *, runtime="executorch-xnnpack", precision="float32"):
    backend = Backend(runtime=runtime, precision=precision, device=torch.device("cpu"))
    return backend.benchmark(module, inputs)


def test_parts_have_all_parameters():
    """The parameters of the parts' modules add up to the UNet's."""
    for architecture in (ORIGIN, EFFICIENT, ORIGIN.without("up_blocks.1.resnets.0")):
        assert parameters(architecture) == costs_of(architecture).total.parameters


def test_parts_have_all_parameters_at_full_size():
    with torch.device("meta"):
        architecture = architecture_of(UNet2DConditionModel(**sd15.UNET))
        assert parameters(architecture) == sd15.UNET_PARAMETERS
    # 22 ResNet blocks, 16 cross-attentions, 12 joins, 6 samplers, the ends; many are equal.
    distinct = reachable_parts(architecture)
    assert len(parts_of(architecture)) == 57
    assert len([part for part in distinct if part.kind != "shortcut"]) < 43 == len(distinct)


@pytest.mark.filterwarnings("error")
def test_modules_accept_their_inputs_without_warnings():
    for part in reachable_parts(ORIGIN):
        module, inputs = module_and_inputs(part)
        output = module(*inputs)
        output = output if isinstance(output, torch.Tensor) else output[0]
        side = {"downsampler": part.side // 2, "upsampler": part.side * 2}.get(part.kind, part.side)
        channels = 4 if part.kind == "ends" else part.out_channels
        assert output.shape == (2, channels, side, side), str(part)


def test_block_latency_is_that_of_its_parts():
    cost = {"attention": 5.0, "resnet": 3.0, "shortcut": 0.5}
    table = known_table(ORIGIN, ms=lambda part: cost.get(part.kind, 0.25))
    assert table.block_ms(ORIGIN, "down_blocks.0.attentions.1") == pytest.approx(5.0)
    assert table.block_ms(ORIGIN, "mid_block.resnets.0") == pytest.approx(3.0)
    assert table.block_ms(ORIGIN, "up_blocks.0.resnets.0") == pytest.approx(2.5)
    copied = ORIGIN.with_copy("mid_block.attentions.0")
    assert table.predict_ms(copied) - table.predict_ms(ORIGIN) == pytest.approx(5.0)
    removed = dict.fromkeys(cost, 0)
    for (stage, kind), count in ORIGIN.counts().items():
        removed[kind] += count - EFFICIENT.counts()[stage, kind]
    joins = [[part.kind for _, part in parts_of(one)].count("join") for one in (ORIGIN, EFFICIENT)]
    expected = sum(cost[kind] * count for kind, count in removed.items()) + 0.25 * (joins[0] - joins[1])
    assert table.predict_ms(ORIGIN) - table.predict_ms(EFFICIENT) == pytest.approx(expected)


def test_table_predicts_all_smaller_unets():
    table = known_table(ORIGIN, ms=lambda part: 1.0)
    rest = ORIGIN
    for block in reversed(ORIGIN.blocks):
        assert table.block_ms(rest, block.name) >= 0.0
        rest = rest.without(block.name)
        assert table.predict_ms(rest) == len(parts_of(rest))


def test_stages_add_up_to_the_total():
    table = known_table(ORIGIN, ms=lambda part: float(part.in_channels))
    stages = latency_by_stage(table, ORIGIN)
    assert [row["stage"] for row in stages] == ["ends", *ORIGIN.stages]
    assert sum(row["ms"] for row in stages) == pytest.approx(table.predict_ms(ORIGIN))
    assert sum(row["share"] for row in stages) == pytest.approx(1.0)


def test_latency_by_kind_gives_fig_2():
    cost = {"attention": 5.0, "resnet": 3.0}
    rows = latency_by_kind(known_table(ORIGIN, ms=lambda part: cost.get(part.kind, 100.0)), EFFICIENT)
    assert [row["stage"] for row in rows[::2]] == ["Down-1", "Down-2", "Mid", "Up-1", "Up-2"]
    assert [row["blocks"] for row in rows] == [row[-1] for row in block_count_table(EFFICIENT)]
    for row in rows:
        assert row["ms"] == pytest.approx(cost[row["kind"]] * row["blocks"])
    costs = costs_of(EFFICIENT)
    assert sum(row["parameters"] for row in rows) == sum(cost.parameters for cost in costs.blocks.values())


def test_table_round_trip():
    table = known_table(ORIGIN, ms=lambda part: 1.5)
    again = LatencyTable.parse(table.to_values())
    assert again == table
    assert again.predict_ms(ORIGIN) == table.predict_ms(ORIGIN)


def test_other_dimensions_parts_and_setups_fail():
    table = known_table(ORIGIN, ms=lambda part: 1.0)
    with pytest.raises(LatencyError, match="context is 64 there, 48 here"):
        table.predict_ms(ORIGIN.changed(context=48))
    with pytest.raises(LatencyError, match=r"of a test has no resnet of 24 to 24 channels at 16x16"):
        table.part_ms(Part(kind="resnet", side=16, in_channels=24, out_channels=24))
    with pytest.raises(LatencyError, match=r'precision is "float32" there, "float16" here'):
        table.check_setup(table.setup.model_copy(update={"precision": "float16"}))
    table.check_setup(table.setup)


def test_candidates_are_timed_in_turns():
    turns, order = [], []

    def run(name, seconds):
        def once():
            order.append(name)
            time.sleep(seconds)

        return once

    times = time_in_turns({"a": run("a", 0.004), "b": run("b", 0.012)}, turns=4, on_turn=turns.append)
    assert turns == [1, 2, 3, 4]
    assert order == ["a", "a", "b", "b", *("a", "b") * 4]  # two for warm-up and repeats, then in turns
    assert times["a"].low_ms <= times["a"].median_ms <= times["a"].high_ms
    assert 4.0 <= times["a"].median_ms < times["b"].median_ms
    with pytest.raises(ValueError, match="turns is 1"):
        time_in_turns({}, turns=1)


def test_fast_candidate_is_run_several_times():
    count = []
    time_in_turns({"quick": lambda: count.append(1)}, turns=2)
    assert len(count) > 100


@pytest.mark.parametrize(
    "runtime", ["torch", pytest.param("torch-compiled", marks=pytest.mark.slow), "executorch-xnnpack"]
)
def test_runtimes_run_every_kind_of_part(runtime):
    kinds = {part.kind: part for part in reachable_parts(ORIGIN)}
    assert len(kinds) == 7
    if runtime != "torch":  # compilation takes seconds for each
        kinds = {kind: kinds[kind] for kind in ("resnet", "ends")}
    runs = {kind: benchmark(*module_and_inputs(part), runtime=runtime) for kind, part in kinds.items()}
    assert all(timing.median_ms > 0 for timing in time_in_turns(runs, turns=2).values())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("architecture", [ORIGIN, EFFICIENT])
def test_unets_do_not_warn(architecture):
    build_unet(architecture)(*UNET_INPUTS)


@pytest.mark.slow
def test_executorch_runs_a_unet():
    """One of few blocks, since compiling all takes a minute."""
    kept = ("down_blocks.0.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    small = ORIGIN
    for block in ORIGIN.blocks:
        small = small if block.name in kept else small.without(block.name)
    benchmark(block_unet(small).eval(), UNET_INPUTS)()


def test_unsupported_precision_fails():
    with pytest.raises(LatencyError, match="not in bfloat16 on cpu"):
        benchmark(*module_and_inputs(reachable_parts(ORIGIN)[0]), precision="bfloat16")
