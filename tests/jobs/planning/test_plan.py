"""Output and errors of `jobs.plan`, and the examples of docs/plan.md."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from set_options import set_options

from jobs import distill_schedule, finetune_vpred, plan
from jobs.planning.rates_and_prices import Rates
from pipelines.sources.shards import ShardRow, write_shard

DOCUMENT = Path(__file__).parents[3] / "docs" / "plan.md"
HIGH = Rates.read("a100-published-high")
STUDENTS = ["finetune_vpred", "train_efficient", "teacher-16", "small-16", "staged-8"]
GIVEN = ("--set", "plan.rates=a100-published-high", "--set", "plan.node=a100-40gb-x8")


def examples() -> list[tuple[str, str]]:
    """Commands of the document with given rates, and their documented output."""
    blocks = re.findall(r"```\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return [
        (command, output)
        for command, output in itertools.pairwise(blocks)
        if "--set plan.rates=" in command and not output.startswith("python")
    ]


@pytest.mark.parametrize("number", range(4))
def test_documented_examples_are_printed(number, capsys, tmp_path):
    assert len(examples()) == 4
    command, output = examples()[number]
    arguments = shlex.split(command.replace("\\\n", " "))
    assert arguments[:3] == ["python", "-m", "jobs.plan"]
    arguments[arguments.index("--out") + 1] = str(tmp_path)
    assert plan.main(arguments[3:]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-2] == output.splitlines()
    assert max(map(len, printed[:-1])) <= 100


def test_plan_json(tmp_path, capsys):
    settings = set_options(["plan.nodes=[1,2]", 'plan.steps=["encode_latents","generate_pairs"]'])
    assert plan.main(["--recipe", "mini", "--out", str(tmp_path), *GIVEN, *settings]) == 0
    values = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["name"] for stage in values["stages"]] == ["encode_latents", "generate_pairs"]
    assert values["counts"] == {"source": 512, "latents": 512, "captions": 512}
    assert [row["nodes"] for row in values["by_nodes"]] == [1, 2]
    assert values["prices"]["name"] == "example"
    assert sum(stage["cost"] for stage in values["stages"]) == values["by_nodes"][-1]["cost"]
    assert Rates.parse(values["rates"]) == HIGH
    stage = values["stages"][0]
    assert stage["driver_seconds"] == stage["after_seconds"] > 0 < stage["driver_bytes"]
    assert any("ASSUMPTIONS" in line for line in values["assumptions"])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["plan.node=24gb-x1", "plan.rates=none"], "--set plan.rates=none: .* 24gb-assumed, "),
        (["plan.rates=24gb-assumed"], "--set plan.node: "),
        ([*GIVEN[1::2], "plan.node=moon"], "--set plan.node=moon: the price list example "),
        ([*GIVEN[1::2], "plan.prices=none"], "--set plan.prices=none: .* example "),
        ([*GIVEN[1::2], "plan.steps=[1]"], "--set plan.steps.0: .* string"),
        ([*GIVEN[1::2], 'plan.steps=["evaluate","x"]'], "--set plan.steps: 'x' "),
        (["plan.rows=0"], "--set plan.rows: .* greater than 0"),
        (["plan.colour=1"], "--set plan.colour: .* 'colour'; it has "),
        (["pears.draws=4"], "--set pears.draws: .* 'pears'; it has "),
        ([*GIVEN[1::2], "captions.url=list.txt"], "--set plan.captions: "),
        ([*GIVEN[1::2], "source.url=/nowhere"], "--set plan.rows: "),
    ],
    ids=str,
)
def test_a_mistake_names_the_option(settings, message, tmp_path, capsys):
    assert plan.main(["--out", str(tmp_path), *set_options(settings)]) == 2
    error = capsys.readouterr().err
    assert re.match(f"plan: {message}", error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()


def test_unknown_recipe(capsys):
    assert plan.main(["--recipe", "cake"]) == 2
    assert capsys.readouterr().err.startswith("plan: --recipe cake: ")


def test_rows_are_counted_from_sidecars(tmp_path, capsys):
    write_shard(str(tmp_path / "shards"), [ShardRow(image=b"x", caption="c") for _ in range(7)], index=0)
    settings = [f"source.url={tmp_path / 'shards'}", 'plan.steps=["encode_latents"]', "plan.kept=0.5"]
    arguments = ["--out", str(tmp_path), *GIVEN, *set_options(settings)]
    assert plan.main(arguments) == 0
    assert "7 rows read, 4 encoded" in capsys.readouterr().out
    (tmp_path / "shards" / "00000.parquet").unlink()
    assert plan.main(arguments) == 2
    assert "1 of 1 shards" in capsys.readouterr().err


def test_a_dry_run_prints_settings_and_writes_nothing(tmp_path, capsys):
    assert plan.main(["--out", str(tmp_path), "--dry-run", "--set", "plan.months=3"]) == 0
    assert json.loads(capsys.readouterr().out)["months"] == 3
    assert list(tmp_path.iterdir()) == []


def test_a_jobs_dry_run_shows_its_plan(tmp_path, capsys):
    arguments = ["--recipe", "sd15", "--out", str(tmp_path)]
    planned = [*GIVEN, *set_options(["plan.rows=1000", "plan.captions=1000"])]
    assert plan.main([*arguments, *planned]) == 0
    capsys.readouterr()
    for main, names in ((finetune_vpred.main, ["finetune_vpred"]), (distill_schedule.main, STUDENTS)):
        assert main([*arguments, "--dry-run"]) == 0
        found = re.findall(r"^(\S+): .* by \S+plan.json, .* by the driver alone, .*$", shown(capsys), re.M)
        assert found == names
    # Other settings have no plan.
    assert finetune_vpred.main([*arguments, "--dry-run", "--set", "vpred.loop.num_steps=3"]) == 0
    assert "plan.json" not in shown(capsys)


def shown(capsys) -> str:
    return capsys.readouterr().out


@pytest.fixture
def probed(tmp_path: Path) -> Path:
    """A run with the rates of an earlier probe."""
    (tmp_path / "rates.json").write_text(HIGH.to_json())
    return tmp_path


def test_measured_rates_are_reused(probed, capsys):
    assert plan.main(["--out", str(probed), "--set", 'plan.steps=["encode_latents"]']) == 0
    output = capsys.readouterr().out
    assert "on 1 node of this machine" in output
    assert "measuring" not in output


def test_unreadable_rates_are_named(probed, capsys):
    (probed / "rates.json").write_text("{}")
    assert plan.main(["--out", str(probed)]) == 2
    assert re.match(r"plan: --out .*: rates.json ", capsys.readouterr().err)


def test_missing_rate_is_named(probed, capsys):
    left = {kind: rate for kind, rate in HIGH.rates.items() if kind != "decode"}
    (probed / "rates.json").write_text(HIGH.model_copy(update={"rates": left}).to_json())
    assert plan.main(["--out", str(probed), "--set", 'plan.steps=["generate_pairs"]']) == 2
    assert re.match(r"plan: --set plan\.rates: a100-published-high .* 'decode'", capsys.readouterr().err)


def test_stages_are_compared_with_the_run(probed, capsys):
    """Steps by their longest record; trainings without one by their metrics."""
    (probed / "steps").mkdir()
    records = [("encode_latents", 12.0), ("encode_latents", 0.2), ("distill_steps", 80.0)]
    for number, (verb, seconds) in enumerate(records):
        driver = {"driver_seconds": seconds / 4, "driver_peak_mib": 700.0 + seconds}
        record = {"verb": verb, "seconds": seconds, "peak_memory_mib": 1.0, **driver}
        (probed / "steps" / f"{number}-{verb}.json").write_text(json.dumps(record))
    (probed / "efficient").mkdir()
    (probed / "efficient" / "metrics.json").write_text(json.dumps({"seconds": 70.0}))
    steps = 'plan.steps=["encode_latents","train_efficient","distill_steps","generate_pairs"]'
    assert plan.main(["--out", str(probed), "--set", steps]) == 0
    output = capsys.readouterr().out
    compared = {row["name"]: row for row in json.loads((probed / "plan.json").read_text())["compared"]}
    assert {name: row["measured"] for name, row in compared.items()} == {
        "encode_latents": 12.0,
        "train_efficient": 70.0,
        "student": 80.0,
        "generate_pairs": None,
    }
    assert compared["student"]["ratio"] == pytest.approx(compared["student"]["forecast"] / 80.0)
    student = compared["student"]
    assert (student["driver_measured"], student["driver_mib_measured"]) == (20.0, 780.0)
    assert re.search(r"student +\S+ s +20.0 s +\S+ MiB +780 MiB", output)
    assert re.search(r"all that is measured .* 162.0 s .* 3 of 4 stages", output)
