"""Tests of the latency job."""

import json
import time

import pytest
import torch
from diffusers import UNet2DConditionModel
from set_options import set_options
from torch.nn.modules.module import register_module_forward_pre_hook

from jobs import measure_latency as job
from jobs.evaluation import latency
from jobs.evaluation.latency import is_disturbed, latency_lines, measure_latency, measure_undisturbed
from jobs.evaluation.settings import LatencySettings
from jobs.evaluation.timing import architectures_of, setting_of
from jobs.reports.latency_breakdown import breakdown_of
from snapfusion.evolution.latency import LatencyTable
from snapfusion.models.architecture import Architecture, efficient_architecture
from snapfusion.models.cost import block_count_table
from snapfusion.models.load import load
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.models.unet import architecture_of

pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(scope="module")
def origin():
    return architecture_of(load("mini-v").unet)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert job.main(["--out", str(out), "--set", "latency.turns=3"]) == 0
    return out


def record_of(out):
    return json.loads((out / "latency" / "torch-float32-cpu.json").read_text())


def test_a_table_opens_by_itself_and_predicts(made, origin):
    table = LatencyTable.parse(record_of(made)["table"])
    table.check_setup(setting_of(LatencySettings()))
    for name, architecture in architectures_of(origin).items():
        unet = record_of(made)["unets"][name]
        assert unet["predicted_ms"] == pytest.approx(table.predict_ms(architecture))
        assert unet["error"] == pytest.approx(unet["predicted_ms"] / unet["measured"]["median_ms"] - 1.0)
        # At this size what stands between the parts counts too, and the machine may be busy.
        assert 0.3 < unet["predicted_ms"] / unet["measured"]["median_ms"] < 3.0
        assert sum(row["macs"] for row in unet["stages"]) == unet["macs"]
        assert [row["name"] for row in unet["blocks"]] == [block.name for block in architecture.blocks]
        assert Architecture.parse(unet["architecture"]) == architecture
    assert set(architectures_of(origin)) == {"origin", "table-3"}


def test_the_table_predicts_every_smaller_unet(made, origin):
    table = LatencyTable.parse(record_of(made)["table"])
    rest = efficient_architecture(origin)
    for block in rest.blocks:
        rest = rest.without(block.name)
    assert 0.0 < table.predict_ms(rest) < table.predict_ms(efficient_architecture(origin))


def test_an_existing_table_is_kept(made, capsys, monkeypatch):
    monkeypatch.setattr(latency, "measure_latency", lambda *_, **__: pytest.fail("measured again"))
    assert job.main(["--out", str(made)]) == 0
    assert "exists already" in capsys.readouterr().out


def test_a_dry_run_says_what_would_be_measured(tmp_path, capsys):
    assert job.main(["--dry-run", "--out", str(tmp_path), "--recipe", "sd15"]) == 0
    printed = capsys.readouterr().out
    assert "20 turns of each part of stable-diffusion-v1-5/stable-diffusion-v1-5's UNet" in printed
    assert "latency/torch-float16-cuda.json (does not exist yet)" in printed


def test_a_dry_run_finds_what_was_measured(made, capsys):
    assert job.main(["--dry-run", "--out", str(made)]) == 0
    assert "latency/torch-float32-cpu.json (exists already)" in capsys.readouterr().out


def test_an_unsupported_precision_is_one_line(tmp_path, capsys):
    options = set_options(["latency.runtime=executorch-xnnpack", "latency.precision=float16"])
    assert job.main(["--out", str(tmp_path), *options]) == 2
    assert "runs here in float32 on the CPU, not in float16 on cpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_missing_device_is_one_line(tmp_path, capsys):
    assert job.main(["--out", str(tmp_path), "--set", "latency.device=cuda"]) == 2
    assert "the device is cuda, of which torch finds none here; cpu is accepted" in capsys.readouterr().err


def test_fig_2_is_drawn_beside_the_table(made):
    for kind, label in (("ms", "latency (ms)"), ("parameters", "parameters (millions)")):
        text = (made / "latency" / f"torch-float32-cpu-{kind}.svg").read_text()
        assert text.startswith("<svg xmlns")
        for words in (label, "Down-1", "Mid", "Up-2", "cross-attention, origin", "ResNet, table-3"):
            assert words in text


def test_the_breakdown_is_read_from_the_file(made, origin):
    found = breakdown_of(record_of(made))
    assert found.runtime == "torch, float32, 1 thread"
    assert [unet.name for unet in found.unets] == ["origin", "table-3"]
    assert found.unets[0].parameters == record_of(made)["unets"]["origin"]["parameters"]
    assert found.rows == tuple(block_count_table(origin, efficient_architecture(origin)))
    latency, parameters = found.charts
    assert list(latency.categories) == ["Down-1", "Down-2", "Mid", "Up-1", "Up-2"]
    of = {bars.name: bars for bars in parameters.bars}
    # Table 3 has no cross-attention on the outermost level, and its bars are the fuller ones.
    assert of["cross-attention, table-3"].values[0] == 0.0 < of["cross-attention, origin"].values[0]
    assert of["cross-attention, origin"].faint
    assert not of["cross-attention, table-3"].faint
    assert {bars.color for bars in latency.bars} == {1, 2}
    only = {**record_of(made), "unets": {"origin": record_of(made)["unets"]["origin"]}}
    assert [bars.faint for bars in breakdown_of(only).charts[0].bars] == [False, False]


def disturbed_by(*errors):
    unet = {"measured": {"median_ms": 1.0}, "predicted_ms": 1.0, "parameters": 1}
    return {"unets": {str(number): {**unet, "error": error} for number, error in enumerate(errors)}}


@pytest.mark.parametrize(
    ("errors", "disturbed"),
    [((0.25, -0.25), False), ((0.0, 0.26), True), ((-0.26, 0.1), True), ((), False)],
)
def test_parts_that_do_not_add_up_are_disturbed(errors, disturbed):
    assert is_disturbed(disturbed_by(*errors)) == disturbed


@pytest.mark.parametrize(
    ("errors", "taken", "disturbed"), [((0.1, 9.0), 1, False), ((0.9, 0.1), 2, False), ((0.9, -0.3), 2, True)]
)
def test_a_disturbed_measurement_is_taken_once_more(errors, taken, disturbed, capsys):
    records = iter([disturbed_by(error) for error in errors])
    record = measure_undisturbed(lambda: next(records))
    assert record == {**disturbed_by(errors[taken - 1]), "disturbed": disturbed}
    assert capsys.readouterr().out.count("measured once more") == taken - 1
    assert len(list(records)) == 2 - taken
    assert ("disturbed, and so no result" in "".join(latency_lines(record))) == disturbed


@pytest.mark.slow
def test_a_whole_unet_that_is_slowed_down_is_marked(origin, capsys):
    def wait(module, arguments):
        if isinstance(module, UNet2DConditionModel | BlockUNet):
            time.sleep(0.1)

    turns = []
    hook = register_module_forward_pre_hook(wait)
    try:
        record = measure_latency(
            LatencySettings(turns=2), architectures=architectures_of(origin), tokens=4, on_turn=turns.append
        )
    finally:
        hook.remove()
    assert turns == [1, 2, 1, 2]
    assert record["disturbed"]
    assert capsys.readouterr().out.count("measured once more") == 1
    assert breakdown_of(record).disturbed
    assert not breakdown_of({key: record[key] for key in ("table", "unets")}).disturbed


def test_a_model_of_few_levels_is_timed_alone(origin):
    shallow = origin.changed(
        channels=(24, 64),
        heads=(4, 4),
        down=(origin.down[0], origin.down[2]),
        up=(origin.up[0], origin.up[2]),
    )
    assert set(architectures_of(shallow)) == {"origin"}
    settings = LatencySettings(turns=2, batch=1)
    measured = measure_latency(settings, architectures=architectures_of(shallow), tokens=4)
    assert measured["table"]["frame"]["batch"] == 1
    assert measured["unets"]["origin"]["measured"]["turns"] == 2
