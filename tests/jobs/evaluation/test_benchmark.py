"""Tests of the benchmark verb."""

import json
import shutil

import pytest
from conftest import tiny_bundle

from jobs import benchmark
from jobs.evaluation import bundle_benchmark
from jobs.evaluation.memory import FootprintError
from jobs.evaluation.module_benchmark import (
    ExecuTorchRuntime,
    ModuleBenchmark,
    ModuleRun,
    TorchRuntime,
    benchmark_module,
)
from pipelines.storage.objects import StorageError
from snapfusion.export.bundle import open_bundle

MODULES = ("text_encoder", "unet", "decoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mobile_bundle):
    """The tiny model's bundle with its float32 programs alone."""
    folder = shutil.copytree(mobile_bundle, tmp_path_factory.mktemp("run") / "mobile")

    def reduce(manifest):
        for name in manifest["variants"].keys() - {"executorch"}:
            del manifest["variants"][name]
            shutil.rmtree(folder / name)
        for name in [name for name in manifest["files"] if not (folder / name).exists()]:
            del manifest["files"][name]

    return with_manifest(folder, reduce)


def with_manifest(folder, change):
    """The bundle with a changed manifest, which has no hash of itself."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def copy_variant(manifest, name, **changes):
    manifest["variants"][name] = manifest["variants"]["executorch"] | changes


@pytest.fixture
def no_compiler(monkeypatch):
    """In subprocesses too."""
    monkeypatch.setenv("CXX", "/nowhere/c++")


@pytest.fixture
def altered(folder, tmp_path):
    """A copy of the bundle whose manifest is changed by a function."""
    return lambda change: with_manifest(shutil.copytree(folder, tmp_path / "mobile"), change)


def figures(**changed):
    values = {"load_s": 0.5, "median_ms": 2.0, "p95_ms": 3.0, "repeats": 20}
    return ModuleBenchmark.parse(
        values | {"before_mb": 300.0, "loading_mb": 12.0, "running_mb": 8.0} | changed
    )


@pytest.fixture
def measured(monkeypatch):
    """Nothing is run: each benchmark returns or raises what a function of the runtime and the run gives."""
    calls = []

    def replace(result_of=lambda runtime, run: figures()):
        def fake(runtime, run):
            calls.append((runtime, run))
            result = result_of(runtime, run)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(bundle_benchmark, "benchmark_module", fake)
        return calls

    return replace


def results_of(folder, tmp_path, *options):
    path = tmp_path / "results.json"
    assert benchmark.main([str(folder), "--json", str(path), *options]) == 0
    return json.loads(path.read_text())


def test_a_program_is_measured_in_a_process_of_its_own(folder):
    inputs = open_bundle(folder).vectors.arrays["token_ids"][1:]
    run = ModuleRun(module="text_encoder", inputs=(inputs,), threads=1, repeats=20)
    found = benchmark_module(ExecuTorchRuntime(program=folder / "executorch/text_encoder.pte"), run)
    assert 0 < found.median_ms <= found.p95_ms
    assert (found.repeats, found.running_mb < found.before_mb) == (20, True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiler")
def test_every_runtime_that_is_here_is_measured(folder, tmp_path, capsys):
    results = results_of(folder, tmp_path, "--repeats", "20")
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["torch eager", "torch compiled", "executorch"]
    for name in ("torch eager", "executorch"):
        assert list(rows[name]["modules"]) == list(MODULES)
        for module in rows[name]["modules"].values():
            assert 0 < module["median_ms"] <= module["p95_ms"]
            # Loading ends with a run.
            assert 1000 * module["load_s"] > module["median_ms"] / 10
            assert module["repeats"] == 20
            assert module["running_mb"] < module["before_mb"]
        medians = [rows[name]["modules"][module]["median_ms"] for module in MODULES]
        assert rows[name]["overall_s"] == pytest.approx((2 * medians[0] + 3 * medians[1] + medians[2]) / 1000)
        assert rows[name]["notes"] == []
    compiled = rows["torch compiled"]
    assert (compiled["modules"], compiled["overall_s"]) == ({}, None)
    assert "not compiled here: torch.compile needs a working C++ compiler" in compiled["notes"][0]
    assert (results["threads"], results["steps"]) == (1, 3)
    assert results["calls"] == {"text_encoder": 2, "unet": 3, "decoder": 1}
    assert {"torch", "executorch"} <= set(results["versions"])
    shown = capsys.readouterr().out
    assert compiled["notes"][0] in shown
    assert f"{rows['executorch']['overall_s']:,.4g}" in shown
    assert results["device"] in shown


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_module_counts_its_compilation_as_loading(folder, mobile_model):
    inputs = open_bundle(folder).vectors.arrays["token_ids"][1:]
    run = ModuleRun(module="text_encoder", inputs=(inputs,), threads=1, repeats=20)
    eager, compiled = (
        benchmark_module(TorchRuntime(model=mobile_model, decoder=None, compiled=compiled), run)
        for compiled in (False, True)
    )
    # A C++ compiler takes seconds, of which the second run and all after it take none.
    assert compiled.load_s > 1.0 + eager.load_s
    assert compiled.p95_ms < 1000.0


def test_the_table_is_the_papers(folder, measured, capsys):
    medians = {"text_encoder": 4.0, "unet": 230.0, "decoder": 116.0}
    measured(lambda runtime, run: figures(median_ms=medians[run.module]))
    assert benchmark.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()

    def after(start):
        return lines[next(n for n, line in enumerate(lines) if line.startswith(start)) :]

    head = next(line for line in lines if "Text Encoder" in line)
    assert head.split("  ")[-1].strip() == "Overall"
    assert after("Calls per image, 3 steps")[0].split()[-3:] == ["2", "3", "1"]
    _, eager, _, executorch, *_ = after("Latency, median")
    assert eager.split() == ["torch", "eager", "(float32)", "4", "230", "116", "0.814"]
    assert executorch.split()[-4:] == ["4", "230", "116", "0.814"]
    assert after("Peak memory")[1].endswith("12.0 / 8.0")


def test_two_unet_calls_per_step_are_counted(altered, measured, tmp_path):
    calls = measured()
    results = results_of(altered(lambda manifest: manifest.update(conditions=1)), tmp_path)
    assert results["calls"]["unet"] == 6
    assert results["rows"][0]["overall_s"] == pytest.approx((2 + 6 + 1) * 0.002)
    assert {run.inputs[2].shape[0] for _, run in calls if run.module == "unet"} == {1}


def test_only_given_variants_are_measured(altered, measured, tmp_path):
    calls, copy = measured(), altered(lambda manifest: copy_variant(manifest, "another"))
    assert [row["name"] for row in results_of(copy, tmp_path)["rows"]][2:] == ["executorch", "another"]
    calls.clear()
    results = results_of(copy, tmp_path, "--variant", "another", "--threads", "2", "--repeats", "33")
    assert [row["name"] for row in results["rows"]] == ["torch eager", "torch compiled", "another"]
    assert {(run.threads, run.repeats) for _, run in calls} == {(2, 33)}


def test_core_ml_has_no_figures_elsewhere(altered, measured, monkeypatch, tmp_path, capsys):
    copy = altered(lambda manifest: copy_variant(manifest, "coreml", runtime="Core ML"))
    monkeypatch.setattr(bundle_benchmark.sys, "platform", "linux")
    measured()
    row = results_of(copy, tmp_path)["rows"][-1]
    assert (row["name"], row["modules"]) == ("coreml", {})
    assert "coreml: not executed here: Core ML runs on Apple's systems only" in capsys.readouterr().out


def test_without_its_model_the_programs_are_measured_alone(altered, measured, tmp_path, capsys):
    copy = altered(lambda manifest: manifest["identity"]["parents"]["model"].update(source="run:gone/raw"))
    measured()
    assert [list(row["modules"]) for row in results_of(copy, tmp_path)["rows"]] == [[], [], list(MODULES)]
    assert f"not run: the bundle's model {tmp_path}/gone/raw: there is no model" in capsys.readouterr().out


def test_a_model_of_the_run_is_found(altered, measured, mobile_model, tmp_path):
    shutil.copytree(mobile_model, tmp_path / "student")
    copy = altered(lambda manifest: manifest["identity"]["parents"]["model"].update(source="run:student"))
    calls = measured()
    assert results_of(copy, tmp_path)["rows"][0]["notes"] == []
    assert calls[0][0].model == str(tmp_path / "student")


def test_other_weights_are_noted(folder, measured, tmp_path):
    from snapfusion.models.save import save

    other = tmp_path / "other"
    save(tiny_bundle(seed=1), other)
    measured()
    rows = results_of(folder, tmp_path, "--model", str(other))["rows"]
    assert rows[0]["notes"] == [f"not the bundle's weights: the model {other}"]
    assert rows[2]["notes"] == []


def test_a_killed_process_leaves_a_gap(folder, measured, tmp_path, capsys):
    lost = FootprintError("its process did not finish")
    measured(lambda runtime, run: lost if run.module == "unet" else figures())
    row = results_of(folder, tmp_path)["rows"][0]
    assert (list(row["modules"]), row["overall_s"]) == (["text_encoder", "decoder"], None)
    assert "torch eager: unet: its process did not finish" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "19"], "Invalid value for '--repeats': 19 is not in the range x>=20"),
        (["--repeats", "many"], "Invalid value for '--repeats': 'many'"),
        (["--threads", "0"], "Invalid value for '--threads': 0 is not in the range x>=1"),
        (["--variant", "executorch", "--variant", "int4"], "--variant int4: the bundle has executorch"),
        (["--model", "/nowhere"], "--model /nowhere: there is no model folder or file"),
        (["--model", "mini"], "--model mini: it has tokens"),
        (["--decoder", "/nowhere"], "--decoder /nowhere"),
        (["--json", "."], "--json .: it is a folder"),
        (["--device", "cuda"], "No such option '--device'"),
    ],
)
def test_a_wrong_option_is_one_line(folder, measured, capsys, options, message):
    calls = measured()
    assert benchmark.main([str(folder), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmark: {message}")
    assert calls == []


def test_a_folder_without_manifest_is_refused(tmp_path, capsys):
    assert benchmark.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"benchmark: BUNDLE {tmp_path} has no manifest.json: it is not a mobile bundle\n"
    )
    assert benchmark.main([]) == 2
    assert "BUNDLE" in capsys.readouterr().err


def test_an_altered_program_is_not_run(altered, measured, capsys):
    copy, calls = altered(lambda manifest: None), measured()
    program = copy / "executorch" / "unet.pte"
    data = bytearray(program.read_bytes())
    data[-1] ^= 1
    program.write_bytes(data)
    assert benchmark.main([str(copy)]) == 2
    assert "executorch/unet.pte was altered" in capsys.readouterr().err
    assert calls == []


def test_unwritable_results_are_still_shown(folder, measured, tmp_path, capsys, monkeypatch):
    def full(url, data):
        raise StorageError(f"{url} cannot be written: No space left on device")

    measured()
    monkeypatch.setattr(benchmark, "replace_object", full)
    assert benchmark.main([str(folder), "--json", str(tmp_path / "results.json")]) == 2
    printed = capsys.readouterr()
    assert "Latency, median" in printed.out
    assert printed.err.startswith("benchmark: --json ")
    assert list(tmp_path.iterdir()) == []
