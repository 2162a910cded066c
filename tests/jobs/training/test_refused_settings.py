"""Distillations that settings and tables alone show to be impossible are refused by a dry run, too."""

import json

import pyarrow as pa
import pytest
from set_options import set_options

from jobs import distill_schedule, distill_steps, run_pipeline
from pipelines.tables.table import create_table
from snapfusion.training.settings import StepDistillationSettings

DMD2, LCM, PCM = (f"distill.{one}" for one in ("dmd2", "consistency", "consistency"))
FSDP = "distill.trainer.sharding=fsdp"


def refused(verb, settings, message, capsys, out):
    """Assert that a job and its dry run refuse settings in the same line."""
    lines = []
    for options in (["--dry-run"], []):
        assert verb.main(["--out", str(out), *options, *set_options(settings)]) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        lines.append(line)
    assert message in lines[0]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([f'{DMD2}={{"steps": 3}}'], "3 steps do not divide the schedule's 1000"),
        ([f'{DMD2}={{"steps": 4}}', "distill.loop.num_steps=10"], "ends before the generator's first update"),
        ([f'{DMD2}={{"steps": 4}}', "distill.targets=table"], "dmd2 takes no targets from a table"),
        ([f'{DMD2}={{"regression_weight": 0.25}}'], "the GAN needs real ones"),
        ([f'{DMD2}={{"steps": 4}}', f'{LCM}={{"method": "lcm"}}'], "are two objectives"),
        ([f'{DMD2}={{"steps": 4}}', 'distill.lora={"rank": 4}'], "dmd2 trains all weights"),
        ([f'{LCM}={{"method": "lcm"}}', "distill.loop.ema_decay=null"], "distill: loop.ema_decay is null"),
        ([f'{LCM}={{"method": "lcm", "points": 8, "steps": 9}}'], "9 steps are more than 8 points"),
        ([f'{PCM}={{"method": "pcm", "points": 50}}'], "4 phases do not divide 50 points"),
        (['distill.lora={"rank": 4}', FSDP], "trainer.sharding is fsdp, which an adapter is not trained"),
        (["distill.steps.k=251"], "distill.steps: k 251 times student_steps 4 is more than"),
        (["distill.trainer.num_workers=33"], "33 workers cannot share a global batch of 32 rows"),
        (["distill.trainer.num_workers=5", FSDP], "5 workers cannot share a global batch of 32 rows evenly"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused(settings, message, capsys, tmp_path):
    refused(distill_steps, settings, message, capsys, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([f'{DMD2}={{"steps": 2}}', 'distill.lora={"rank": 4}'], "distill: lora and dmd2"),
        (['distill.lora={"rank": 4}'], "stage dmd2-4: distill: lora and dmd2"),
        (["distill.targets=table"], "stage dmd2-4: distill: dmd2 takes no targets from a table"),
    ],
    ids=str,
)
def test_a_stage_is_checked_as_a_student_is(settings, message, capsys, tmp_path):
    refused(distill_schedule, ["schedule=dmd2", *settings], message, capsys, tmp_path)


def targets_at(url, *, steps):
    """A table with the identity of TARGETS, without rows."""
    identity = {"kind": "targets", "teaching": steps.to_values()}
    return create_table(str(url), schema=pa.schema([("id", pa.string())]), identity=identity)


def test_a_table_of_another_grid_is_refused(capsys, tmp_path):
    targets_at(tmp_path / "targets", steps=StepDistillationSettings(student_steps=16))
    message = "student_steps is 16 there, 40 here"
    method = f"{PCM}={json.dumps({'method': 'pcm'})}"
    refused(distill_steps, [method, "distill.targets=table"], message, capsys, tmp_path)


def test_a_table_of_another_kind_is_refused(capsys, tmp_path):
    """The GAN's real latents are those of LATENTS."""
    targets_at(tmp_path / "other", steps=StepDistillationSettings())
    settings = [f'{DMD2}={{"steps": 4}}', f"distill.table={tmp_path}/other"]
    refused(distill_steps, settings, "other holds targets; latents is needed", capsys, tmp_path)


def test_a_pipeline_computes_no_targets_in_vain(capsys, tmp_path):
    settings = ["distill.targets=table", f'{PCM}={{"method": "pcm"}}']
    refused(run_pipeline, settings, "targets would not fit the training of student: ", capsys, tmp_path)
    fitting = ["targets.teaching.student_steps=40", "targets.teaching.k=1", "targets.cfg_probability=1.0"]
    fitting.append('targets.teaching.cfg_range={"low": 5.0, "high": 6.0}')
    options = set_options([*settings, *fitting])
    assert run_pipeline.main(["--out", str(tmp_path), "--dry-run", *options]) == 0


def test_a_pipeline_makes_pairs_before_their_use(capsys, tmp_path):
    settings = [f'{DMD2}={{"gan": null, "regression_weight": 0.25}}']
    assert run_pipeline.main(["--out", str(tmp_path), "--dry-run", *set_options(settings)]) == 0
    line = "distill.table is run:pairs, which no step before distill_steps makes"
    assert line in capsys.readouterr().out
