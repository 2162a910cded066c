"""Latency on another device: programs with a job list, and times that come back."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from set_options import set_options

from jobs import measure_latency as job
from jobs.cli.job import Job
from jobs.evaluation import device_latency
from jobs.evaluation.device_latency import export_programs, import_times, read_times
from jobs.evaluation.settings import LatencySettings
from jobs.evaluation.timing import architectures_of, backend_of
from jobs.evolve_unet import latency_table
from jobs.recipes.registry import recipe_named
from snapfusion.evolution.device_times import DeviceTimes, TimedUNets
from snapfusion.evolution.latency import LatencyError, LatencyTable
from snapfusion.evolution.parts import dimensions_of, inputs_of, module_of, parts_of
from snapfusion.evolution.stopwatch import time_in_turns
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of

pytestmark = pytest.mark.usefixtures("keep_threads")

SCRIPT = Path(__file__).parents[3] / "infra/latency/time_programs.py"
PHONE = "Phone 9 (OS 3.1)"
FILE = "executorch-xnnpack-float32-Phone-9-OS-3.1.json"
TURNS = 15


@pytest.fixture(scope="module")
def unets():
    bundle = load("mini-v")
    origin = architecture_of(bundle.unet)
    dimensions = dimensions_of(origin, batch=2, tokens=bundle.tokenizer.model_max_length)
    return TimedUNets(dimensions=dimensions, unets=architectures_of(origin))


@pytest.fixture
def returned(unets):
    """The JSON of a phone's file: the first part takes 1 to 2 ms, each further one 1 ms more."""
    times = {name: [place, place + 0.5, place + 1.0] for place, name in enumerate(unets.parts(), start=1)}
    return {
        "version": 1,
        "of": unets.to_values(),
        "device": PHONE,
        "runtime": "executorch-xnnpack",
        "threads": 1,
        "date": "2026-12-01",
        "times_ms": times,
    }


def importing(out, returned, *options):
    file = out.parent / "times.json"
    file.write_text(json.dumps(returned))
    return job.main(["--out", str(out), "--import", str(file), *options])


def test_a_phones_times_become_its_table(returned, unets, tmp_path, capsys):
    assert importing(tmp_path / "run", returned) == 0
    assert f"evolution.table=run:latency/{FILE}" in capsys.readouterr().out
    record = json.loads((tmp_path / "run/latency" / FILE).read_text())
    table = LatencyTable.parse(record["table"])
    assert (table.setup.device, table.setup.precision) == (PHONE, "float32")
    # The middle one of a part's three times.
    assert [entry.times.median_ms for entry in table.parts] == pytest.approx(
        [place + 0.5 for place in range(1, len(unets.parts()) + 1)]
    )
    assert record["unets"] == {}
    assert not record["disturbed"]


def test_evolution_runs_by_a_phones_table(returned, unets, tmp_path):
    assert importing(tmp_path / "run", returned) == 0
    recipe = recipe_named("mini").with_values(
        [f"evolution.table=run:latency/{FILE}", f"evolution.device={PHONE}"]
    )
    table = latency_table(Job(verb="evolve_unet", recipe=recipe, out=str(tmp_path / "run")))
    assert table.setup.device == PHONE
    origin = unets.unets["origin"]
    assert table.predict_ms(origin) > table.predict_ms(efficient_architecture(origin)) > 0.0


@pytest.mark.slow
def test_whole_unets_tell_the_tables_error(returned, unets, tmp_path):
    table = import_times(DeviceTimes.parse(returned), expected=unets)["table"]
    predicted = LatencyTable.parse(table).predict_ms(unets.unets["origin"])
    returned["times_ms"]["unet-origin"] = [predicted / 1.1] * 3
    record = import_times(DeviceTimes.parse(returned), expected=unets)
    assert record["unets"].keys() == {"origin"}
    assert record["unets"]["origin"]["error"] == pytest.approx(0.1)
    assert not record["disturbed"]
    assert importing(tmp_path / "run", returned) == 0
    assert (tmp_path / f"run/latency/{FILE.removesuffix('.json')}-ms.svg").exists()
    returned["times_ms"]["unet-origin"] = [predicted / 1.3] * 3
    assert import_times(DeviceTimes.parse(returned), expected=unets)["disturbed"]


def change(returned, **changes):
    return {**returned, **changes}


def without_a_part(returned):
    name, *_ = returned["times_ms"]
    return change(returned, times_ms={key: ms for key, ms in returned["times_ms"].items() if key != name})


def of_another_architecture(returned):
    returned["of"]["unets"]["origin"]["down"][0][0]["attentions"] = []
    return returned


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_another_architecture, r"the times are of other UNets than this run's: unets\.origin\.down is "),
        (without_a_part, "the times lack ends-"),
        (
            lambda returned: change(returned, times_ms={**returned["times_ms"], "unet-x": [1.0, 2.0]}),
            "the times have an unknown unet-x",
        ),
        (
            lambda returned: change(returned, times_ms={"ends": [1.0]}),
            r"times_ms\.ends: .*at least 2 items",
        ),
        (
            lambda returned: change(returned, times_ms={"ends": [1.0, 0.0]}),
            r"times_ms\.ends\.1: .*greater than 0",
        ),
        (lambda returned: change(returned, version=2), "version: .*given 2"),
        (lambda returned: change(returned, runtime="torch"), "runtime: .*'coreml'"),
        (lambda returned: [], "holds list; a JSON object is accepted"),
    ],
)
def test_times_that_do_not_fit_are_one_line(damage, message, returned, tmp_path, capsys):
    assert importing(tmp_path / "run", damage(returned)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "run/latency").exists()


def test_other_times_of_a_device_are_refused(returned, tmp_path, capsys):
    assert importing(tmp_path / "run", returned) == importing(tmp_path / "run", returned) == 0
    name = next(iter(returned["times_ms"]))
    returned["times_ms"][name] = [9.0, 9.0]
    assert importing(tmp_path / "run", returned) == 2
    assert "has other times of this device; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--whole"], "--whole: it has an effect with --export only"),
        (["--export", "--import", "x.json"], "--import x.json: it is accepted without --export and --whole"),
        (["--import", "/nowhere.json"], "--import /nowhere.json: it holds no times of programs: "),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, message, tmp_path, capsys):
    assert job.main(["--out", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_names_files(tmp_path, capsys):
    out = ["--dry-run", "--out", str(tmp_path / "run")]
    assert job.main([*out, "--export"]) == job.main([*out, "--import", "x.json"]) == 0
    printed = capsys.readouterr().out
    assert f"would compile each part of mini's UNet into {tmp_path}/run/latency/programs" in printed
    assert "from the times in x.json" in printed


def test_the_job_list_names_every_program(unets, tmp_path, monkeypatch):
    written = []

    def write_programs(network, inputs, *, name, **_):
        written.append((name, network(*inputs) is not None))
        return {"executorch-xnnpack": f"{name}.pte", "coreml": f"{name}.mlpackage"}

    monkeypatch.setattr(device_latency, "write_programs", write_programs)
    url = str(tmp_path / "programs")

    def export(*, whole, of=unets):
        settings = LatencySettings(turns=7)
        return export_programs(of, settings=settings, layout="channels-first", whole=whole, url=url)

    assert export(whole=False)
    listed = json.loads((tmp_path / "programs/jobs.json").read_text())
    assert [program["name"] for program in listed["programs"]] == [name for name, _ in written]
    assert [name for name, _ in written] == list(unets.parts())
    assert (listed["turns"], listed["of"]) == (7, unets.to_values())
    assert not export(whole=False)
    with pytest.raises(LatencyError, match="there is no program unet-origin"):
        export(whole=True)
    with pytest.raises(LatencyError, match=r"lists programs of something else: dimensions\.batch is 2 there"):
        export(
            whole=False,
            of=unets.model_copy(update={"dimensions": unets.dimensions.model_copy(update={"batch": 1})}),
        )


@pytest.mark.slow
def test_another_process_gives_the_direct_table(unets, tmp_path):
    out = tmp_path / "run"
    assert job.main(["--out", str(out), "--export", *set_options([f"latency.turns={TURNS}"])]) == 0
    compare_with_another_process(unets, programs=out / "latency/programs", scratch=tmp_path)


def compare_with_another_process(unets, *, programs, scratch):
    """Time the parts here and in another process, in turns, as the machine may become slower meanwhile."""
    parts, origin = unets.parts(), unets.unets["origin"]
    backend = backend_of(LatencySettings(runtime="executorch-xnnpack"))
    torch.set_num_threads(1)
    runs = {
        name: backend.benchmark(
            module_of(part, dimensions=unets.dimensions), inputs_of(part, dimensions=unets.dimensions)
        )
        for name, part in parts.items()
    }
    here, there = [], []
    for number in range(2):
        times = time_in_turns(runs, turns=TURNS)
        here.append({parts[name]: timing.median_ms for name, timing in times.items()})
        file = scratch / f"{number}.json"
        arguments = [str(programs), "executorch-xnnpack", PHONE, str(file)]
        subprocess.run([sys.executable, str(SCRIPT), *arguments], check=True)
        table = LatencyTable.parse(import_times(read_times(str(file)), expected=unets)["table"])
        there.append({part: table.part_ms(part) for part in parts.values()})
    direct, device = (
        {part: sum(one[part] for one in each) / 2 for part in each[0]} for each in (here, there)
    )
    ratios = sorted(device[part] / direct[part] for part in direct)
    direct_ms, device_ms = (sum(each[part] for _, part in parts_of(origin)) for each in (direct, device))
    print(
        f"a pass of the miniature: {direct_ms:.3f} ms here, {device_ms:.3f} ms by another process; "
        f"{len(ratios)} parts: {statistics.median(ratios):.3f} of the direct time, "
        f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
    )
    assert device_ms == pytest.approx(direct_ms, rel=0.1)
