"""Tests of the efficiency job."""

import json

import pytest
import torch
from set_options import set_options

from jobs import measure_efficiency as job
from jobs.evaluation import memory
from jobs.evaluation.efficiency import PAPER_RATIOS, summary
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.cost import costs_of
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of

pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert job.main(["--out", str(out), "--set", "efficiency.turns=2"]) == 0
    return out


def record_of(out, name="torch-float32-cpu"):
    return json.loads((out / "efficiency" / f"{name}.json").read_text())


def test_both_unets_are_measured_and_counted(made):
    found, origin = record_of(made), architecture_of(load("mini").unet)
    assert (found["recipe"], found["model"], found["tokens"]) == ("mini", "mini", 24)
    assert found["setting"]["runtime"] == "torch"
    assert {"torch", "snapfusion-ray"} <= set(found["versions"])
    for name, architecture in (("origin", origin), ("table-3", efficient_architecture(origin))):
        unet, costs = found["unets"][name], costs_of(architecture, tokens=24).total
        assert (unet["parameters"], unet["macs"]) == (costs.parameters, costs.macs)
        assert unet["step"]["turns"] == 2
        assert unet["loop"]["executed"]
        # The machine may be busy with something else in one of them.
        passes = unet["loop"]["ms"] / unet["step"]["median_ms"]
        assert unet["loop"]["steps"] / 10 < passes < unet["loop"]["steps"] * 10
    assert [unet["loop"]["steps"] for unet in found["unets"].values()] == [50, 8]


def test_memory_is_that_of_the_unet_alone(made):
    for unet in record_of(made)["unets"].values():
        used, weights_mb = unet["memory"], 4 * unet["parameters"] / 1e6
        assert used["at_rest_mb"] - used["before_mb"] > 0.9 * weights_mb
        assert used["highest_mb"] > used["at_rest_mb"]
        assert used["unet_mb"] == pytest.approx(used["highest_mb"] - used["before_mb"])
        # Python and its libraries take more than that, and are no part of it.
        assert weights_mb < used["unet_mb"] < used["before_mb"] / 2


def test_the_half_width_decoder_stands_beside_the_original(made):
    decoders, vae = record_of(made)["decoders"], load("mini").vae
    assert decoders["half-width"]["parameters"] == HalfDecoder.from_vae(vae).num_parameters
    # The encoder's half of the VAE is not counted.
    full = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    assert decoders["original"]["parameters"] == sum(parameter.numel() for parameter in full)
    assert all(decoder["time"]["median_ms"] > 0 for decoder in decoders.values())


def test_ratios_are_of_what_was_measured(made):
    found = record_of(made)
    (origin, efficient), ratios = found["unets"].values(), found["ratios"]
    assert set(ratios) == {*PAPER_RATIOS, "macs"}
    for part, value in (("step", "median_ms"), ("loop", "ms"), ("memory", "unet_mb")):
        assert ratios[part] == pytest.approx(origin[part][value] / efficient[part][value])
    full, half = found["decoders"].values()
    assert ratios["decoder"] == pytest.approx(full["time"]["median_ms"] / half["time"]["median_ms"])
    assert ratios["decoder_parameters"] == pytest.approx(full["parameters"] / half["parameters"])


def test_the_table_has_the_papers_figures_beside(made):
    head, *rows, note = summary(record_of(made))
    assert head.split() == ["original", "efficient", "times", "less", "the", "paper"]
    last = {row.rpartition("  ")[0].strip().split("  ")[0]: row.split()[-1] for row in rows}
    assert {"a step, ms": "1.95", "50 and 8 steps, s": "12.2", "decoder, ms": "3.2"}.items() <= last.items()
    assert last["highest memory, MB"] == "1.87"  # 6,634 to 3,549
    assert "848M" in note


@pytest.mark.slow
def test_in_bfloat16_and_without_the_loops(tmp_path):
    options = set_options(f"efficiency.{one}" for one in ("turns=2", "loop=false", "precision=bfloat16"))
    assert job.main(["--out", str(tmp_path), *options]) == 0
    for unet in record_of(tmp_path, "torch-bfloat16-cpu")["unets"].values():
        assert unet["loop"]["executed"] is False
        assert unet["loop"]["ms"] == pytest.approx(unet["loop"]["steps"] * unet["step"]["median_ms"])


def test_an_existing_measurement_is_kept(made, capsys, monkeypatch):
    monkeypatch.setattr(
        "jobs.evaluation.efficiency.measure_efficiency", lambda *_, **__: pytest.fail("measured again")
    )
    assert job.main(["--out", str(made)]) == 0
    assert "exists already" in capsys.readouterr().out


def test_a_dry_run_says_what_would_be_measured(tmp_path, capsys):
    assert job.main(["--dry-run", "--out", str(tmp_path), "--recipe", "sd15"]) == 0
    printed = capsys.readouterr().out
    assert "20 turns of a step of stable-diffusion-v1-5/stable-diffusion-v1-5's UNet" in printed
    assert "and of Table 3's" in printed
    assert "execute 50 steps of one, 8 of the other" in printed
    assert "efficiency/torch-float32-cuda.json (does not exist yet)" in printed


@pytest.mark.parametrize(
    ("settings", "printed"),
    [
        (
            ("runtime=executorch-xnnpack", "precision=bfloat16"),
            "in float32 on the CPU, not in bfloat16 on cpu",
        ),
        (("batch=3",), "multiple of 2, given 3"),
        (("precision=float8",), "efficiency.precision"),
        pytest.param(
            ("device=cuda",),
            "the device is cuda, of which torch finds none here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here"),
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(settings, printed, tmp_path, capsys):
    options = set_options(f"efficiency.{setting}" for setting in settings)
    assert job.main(["--out", str(tmp_path), *options]) == 2
    errors = capsys.readouterr().err.strip()
    assert printed in errors
    assert "\n" not in errors


def test_a_unet_of_too_few_levels_is_refused(tiny_teacher, tmp_path, capsys):
    assert job.main(["--out", str(tmp_path), "--set", f"model={tiny_teacher}"]) == 2
    assert "Table 3 has at least three levels of channels; this UNet has 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_does_not_finish_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "_TIMEOUT_SECONDS", 0.01)
    assert job.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a process with one UNet did not finish (timed_out: 1 tries of 0.01 s)" in printed
    assert not (tmp_path / "efficiency").exists()
