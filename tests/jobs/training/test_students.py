"""Tests of fine-tuning and step distillation from end to end, with a tiny teacher."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist
from conftest import ray_train_locally, tiny_bundle
from in_process import in_process
from PIL import Image
from ray_nodes import processes
from student_inputs import (
    DISTILL,
    LOOP,
    VPRED,
    assembled,
    encode,
    first_batch,
    inputs_of,
    save_trained,
    save_v_model,
    train_alone,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.cli.in_run import base_model_of, resolve_training
from jobs.cli.job import Job
from jobs.recipes.miniature import mini
from jobs.training.distillation import assemble, distill_steps, summary
from jobs.training.spec import TrainingError
from jobs.training.trainer import run_trainings
from jobs.training.validation import Validator, check_validation
from jobs.training.velocity import finetune_vpred
from pipelines.datasets.settings import TargetsSettings
from pipelines.datasets.targets import compute_targets
from pipelines.stages.settings import TeacherSettings
from pipelines.tables.table import TableError
from snapfusion.models.card import CARD, PublishedModel
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.sampling import time_grid
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.settings import CfgRange

bundle_of = partial(tiny_bundle, image_size=32)
"""A model whose images the miniature's metric networks can read."""


@pytest.fixture(scope="module")
def eps_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(bundle_of(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def latents(eps_teacher, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("run"), model=eps_teacher, side=16, rows=24, detail=16, wide=1)


@pytest.fixture(scope="module")
def v_teacher(tmp_path_factory):
    return save_v_model(bundle_of(), tmp_path_factory.mktemp("models") / "tiny-v")


@pytest.fixture(scope="module")
def vpred(latents, eps_teacher):
    out = Path(latents.url).with_name("vpred")
    with ray_train_locally():
        metrics = finetune_vpred(
            VPRED,
            model=eps_teacher,
            latents_url=latents.url,
            out_url=str(out),
            base=PublishedModel(model="owner/name", licence="MIT"),
        )
    return out, metrics


@pytest.fixture(scope="module")
def student(vpred, latents):
    """The folder of a student and its metrics."""
    out, alone = Path(latents.url).with_name("student"), DISTILL.with_values(["trainer.num_workers=1"])
    with ray_train_locally():
        return out, distill(latents, out.parent, alone, teacher=str(vpred[0] / "model"))


@pytest.fixture(scope="module")
def by_two(ray_cluster, vpred, latents):
    """The student of two workers, and its progress reports."""
    out, reports = Path(latents.url).with_name("by_two") / "student", []
    # Relative paths, though workers have another working directory.
    folder, teacher = (Path(os.path.relpath(path)) for path in (out.parent, vpred[0] / "model"))
    return out, distill(latents, folder, teacher=str(teacher), on_report=reports.append), reports


@pytest.fixture(scope="module")
def mark():
    """In the environment of drivers that die and of all that they start; at the end none of that is left."""
    mark = uuid.uuid4().hex
    yield mark
    # Ray's reaper takes a moment, and its agents take a minute and more to notice.
    deadline = time.monotonic() + 150
    while left := [words for _, words in processes(f"KILLED_DRIVER={mark}")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def begin_and_die(name, *, model, latents, out, mark):
    """A job by a driver that kills itself after its first checkpoint."""
    script = Path(__file__).with_name("train_killed.py")
    driver = subprocess.run(
        [sys.executable, str(script), name, model, latents.url, str(out)],
        env={**os.environ, "KILLED_DRIVER": mark},
        stderr=subprocess.PIPE,
        timeout=240,
        check=False,
    )
    assert driver.returncode == -signal.SIGKILL, driver.stderr.decode()
    assert (Path(f"{out}.training") / "unet" / "step-00000002" / "manifest.json").exists()
    assert not out.exists()


def assert_same_result(out, whole, *, metrics):
    made = json.loads((out / "metrics.json").read_text())
    for figure in ("identity", "weights", "evaluation", "watch", "best", "curve"):
        assert made[figure] == metrics[figure]
    for name in ("step-00000002.png", "step-00000004.png"):
        assert (out / "watch" / name).read_bytes() == (whole / "watch" / name).read_bytes()
    assert logged_steps(out) == logged_steps(whole) == [1, 2, 3, 4]


def logged_steps(out):
    events = EventAccumulator(str(out / "logs" / "unet"))
    events.Reload()
    assert [event.step for event in events.Images("watch/pictures")] == [2, 4]
    return [event.step for event in events.Scalars("loss")]


def distill(table, folder, settings=DISTILL, **sources):
    return distill_steps(settings, data_url=table.url, out_url=str(folder / "student"), **sources)


def training_on(table, *, teacher, student=None, settings=DISTILL):
    return assembled(assemble, table, settings, teacher=teacher, student=student or teacher)


def test_an_eps_model_becomes_a_v_model(vpred, latents, eps_teacher):
    out, metrics = vpred
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert [point["step"] for point in metrics["curve"]] == [1, 2, 3, 4]
    assert metrics["evaluation"]["rows"] > 0
    assert metrics["parents"]["latents"] == latents.lineage()
    made, raw, before = load(str(out / "model")), load(str(out / "raw")), load(eps_teacher)
    assert made.prediction_type == raw.prediction_type == "v_prediction"
    mine, theirs = made.fingerprint(), before.fingerprint()
    assert {name for name in mine if mine[name] != theirs[name]} == {"unet"}
    best = load(str(out / "best")).fingerprint()["unet"]
    assert metrics["weights"] == {"model": mine["unet"], "raw": raw.fingerprint()["unet"], "best": best}
    for name in metrics["weights"]:
        card = (out / name / CARD).read_text()
        assert 'base_model: "owner/name"\nlicense: "mit"\n' in card
        assert f"Initial weights: `tiny`, UNet weights SHA-256 `{theirs['unet']}`" in card
        assert f"Data: version {latents.version} of the table whose settings have the SHA-256" in card
    assert not (Path(f"{out}.training")).exists()
    with pytest.raises(TrainingError, match="predicts v already"):
        finetune_vpred(VPRED, model=str(out / "model"), latents_url=latents.url, out_url=str(out / "again"))


@pytest.mark.slow
@pytest.mark.ray
def test_killed_fine_tuning_resumes_to_the_same_result(
    ray_cluster, vpred, latents, eps_teacher, mark, tmp_path
):
    out = tmp_path / "vpred"
    begin_and_die("vpred", model=eps_teacher, latents=latents, out=out, mark=mark)
    finetune_vpred(VPRED, model=eps_teacher, latents_url=latents.url, out_url=str(out))
    assert_same_result(out, vpred[0], metrics=vpred[1])


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_distillation_resumes_to_the_same_result(by_two, vpred, latents, mark, tmp_path):
    out, teacher = tmp_path / "student", str(vpred[0] / "model")
    begin_and_die("student", model=teacher, latents=latents, out=out, mark=mark)
    distill(latents, tmp_path, teacher=teacher)
    assert_same_result(out, by_two[0], metrics=by_two[1])


def sharded_and_resumed(inputs, store_url, device):
    """A training, and another one that resumes from a checkpoint in its middle."""
    yield replace(next(assemble(inputs, device=device)), name="whole")
    if dist.get_rank() == 0:
        shutil.copytree(f"{store_url}/whole/step-00000002", f"{store_url}/continued/step-00000002")
    yield replace(next(assemble(inputs, device=device)), name="continued")


@pytest.mark.slow
@pytest.mark.ray
def test_a_sharded_student_becomes_the_same(by_two, vpred, latents, tmp_path):
    out, metrics, _ = by_two
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    settings = DISTILL.with_values(["trainer.sharding=fsdp"])
    teacher = str(vpred[0] / "model")
    inputs = inputs_of(latents, settings, teacher=teacher, student=teacher)
    url = str(tmp_path / "checkpoints")
    results = run_trainings(
        sharded_and_resumed,
        {"inputs": inputs, "store_url": url},
        store_url=url,
        settings=settings.trainer,
        on_report=lambda figures: None,
    )
    whole, continued = results["whole"], results["continued"]
    assert (whole.curve, whole.evaluation) == (continued.curve, continued.evaluation)
    for group, named in CheckpointStore(f"{url}/whole").load(4).tensors.items():
        other = CheckpointStore(f"{url}/continued").load(4).tensors[group]
        assert all(torch.equal(tensor, other[name]) for name, tensor in named.items())
    for point, expected in zip(whole.curve, metrics["curve"], strict=True):
        assert point == pytest.approx(expected, rel=1e-5)
    guided = metrics["evaluation"]["after"]["guided"]
    assert whole.evaluation["after"]["guided"] == pytest.approx(guided, rel=1e-4)
    assert [seen["step"] for seen in whole.validations] == [2, 4]
    for weights, folder in ((whole.weights, "model"), (whole.raw_weights, "raw")):
        made = load(str(out / folder)).unet.state_dict()
        for name, tensor in weights.items():
            # Adam divides a gradient by its size: where rows cancel in it, so much does a last bit move.
            torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-5)


def test_validation_keeps_the_best_weights(student):
    out, metrics = student
    assert [seen["step"] for seen in metrics["watch"]] == [2, 4]
    for seen in metrics["watch"]:
        assert [point["w"] for point in seen["points"]] == [2.0, 1.0]
        assert all(point["pictures"] == 6 and 0 <= point["attributes"] <= 1 for point in seen["points"])
    lowest = min(metrics["watch"], key=lambda seen: seen["points"][0]["fid"])
    assert metrics["best"] == {"by": "fid", **lowest}
    best = load(str(out / "best"))
    assert best.fingerprint()["unet"] == metrics["weights"]["best"]
    sampling = {"size": 32, "distillation": best.distillation, "device": torch.device("cpu"), "threads": 1}
    validator = Validator(settings=DISTILL.validation, every=2, model=str(out / "raw"), **sampling)
    assert validator(best.unet.state_dict()).record["points"] == metrics["best"]["points"]
    with Image.open(out / "watch" / "step-00000004.png") as grid:
        assert grid.size == (3 * 32, 2 * 32)


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_distil_what_one_process_does(by_two, vpred, latents):
    """Branches, draws and gamma are the same: what differs is the order of float32 sums."""
    out, metrics, reports = by_two
    # With whole batches.
    state, steps, _ = train_alone(training_on(latents, teacher=str(vpred[0] / "model")), LOOP)
    losses = [point["loss"] for point in metrics["curve"]]
    assert losses == pytest.approx([step.loss for step in steps], rel=1e-3)
    figures = {name: metrics["curve"][-1][name] for name in steps[-1].metrics}
    assert figures == pytest.approx(dict(steps[-1].metrics), rel=1e-2)
    assert {name.partition("/")[0] for name in figures} == {"vanilla", "guided"}
    made = load(str(out / "model")).unet.state_dict()
    for name, tensor in state.final_weights().items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-4)
    assert reports[-1]["step"] == 4


def test_a_student_records_its_sampler_and_evaluation(student):
    out, metrics = student
    record = json.loads((out / "model" / "distillation.json").read_text())
    assert record == metrics["distillation"]
    assert (record["steps"], record["teacher_steps"]) == (4, 8)
    assert record["timesteps"] == list(time_grid(4)[:-1])
    assert record["cfg_range"] == {"low": 1.0, "high": 6.0}
    assert load(str(out / "model")).prediction_type == "v_prediction"
    assert len(summary(metrics)) == 2
    assert set(metrics["evaluation"]) == {"before", "after"}
    assert set(metrics["evaluation"]["after"]) == {"vanilla", "guided"}


def test_a_finished_student_is_left_as_it_is(student, vpred, latents):
    out, metrics = student
    teacher, elsewhere = str(vpred[0] / "model"), DISTILL.with_values(["trainer.num_workers=3", "name=other"])
    assert distill(latents, out.parent, elsewhere, teacher=teacher) == metrics
    with pytest.raises(TrainingError, match=r"settings\.steps\.gamma is 0\.2 there, 1\.0 here"):
        distill(latents, out.parent, DISTILL.with_values(["steps.gamma=1.0"]), teacher=teacher)


def test_a_student_learns_from_a_table_that_fits(latents, v_teacher, tmp_path):
    teaching = TeacherSettings(student_steps=4, k=2, cfg_range=CfgRange(low=1.0, high=6.0), batch_size=6)
    targets = compute_targets(
        TargetsSettings(teaching=teaching, draws=2, cfg_probability=0.5),
        teacher=v_teacher,
        latents=latents,
        url=str(tmp_path / "targets"),
        run=in_process,
    )
    settings = DISTILL.with_values(["targets=table", "loop.num_steps=30", "steps.cfg_probability=0.0"])
    _, steps, _ = train_alone(training_on(targets, teacher=v_teacher, settings=settings), settings.loop)
    losses = [step.metrics["vanilla/loss"] for step in steps]
    assert losses[-1] < losses[0]
    with pytest.raises(TableError, match=r"student_steps is 4 there, 8 here"):
        distill(targets, tmp_path, settings.with_values(["steps.student_steps=8"]), teacher=v_teacher)
    with pytest.raises(TableError, match="holds latents; targets"):
        distill(latents, tmp_path, settings, teacher=v_teacher)
    with pytest.raises(TrainingError, match=r"loader\.held_out"):
        distill(targets, tmp_path, settings.with_values(["loader.held_out=1e-6"]), teacher=v_teacher)


def test_checkpointed_activations_give_the_same_gradient(latents, v_teacher):
    norms = []
    for checkpointing in ("false", "true"):
        settings = DISTILL.with_values([f"gradient_checkpointing={checkpointing}"])
        _, steps, _ = train_alone(training_on(latents, teacher=v_teacher, settings=settings), LOOP)
        norms.append([step.grad_norm for step in steps])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_an_eps_student_is_refused(latents, eps_teacher, tmp_path):
    with pytest.raises(TrainingError, match="predicts eps, and step distillation needs v"):
        distill(latents, tmp_path, teacher=eps_teacher)


def test_an_eps_teacher_teaches_a_v_student(latents, eps_teacher, v_teacher):
    training = training_on(latents, teacher=eps_teacher, student=v_teacher)
    assert training.objective(training.model, first_batch(training), step=0).isfinite().all()


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ("text_encoder", TrainingError, r"other cannot teach .*: its text encoder .*App\. D"),
        ("vae", TableError, r"another VAE .*weights\.vae is"),
        ("tokenizer", TableError, "token ids of another tokenizer"),
    ],
)
def test_models_and_tables_of_another_kind_are_refused(part, error, message, latents, v_teacher, tmp_path):
    other = bundle_of(seed=5 if part == "vae" else 0)
    if part == "text_encoder":
        other.text_encoder = bundle_of(seed=9).text_encoder
    elif part == "tokenizer":
        other.tokenizer.pad_token = other.tokenizer.bos_token
    teacher, student = save_v_model(other, tmp_path / "other"), v_teacher if part == "text_encoder" else None
    with pytest.raises(error, match=message):
        distill(latents, tmp_path, teacher=teacher, student=student)


def test_an_impossible_validation_is_refused(latents, v_teacher, tmp_path):
    with pytest.raises(TrainingError, match=r"32 px.* 16 px.*validation\.judging"):
        check_validation(DISTILL.validation, size=16)
    settings = DISTILL.with_values([f"validation.references={latents.url}"])
    with pytest.raises(TableError, match="holds latents; references"):
        distill(latents, tmp_path, settings, teacher=v_teacher)


def test_validation_is_no_part_of_the_identity(tmp_path):
    assert "validation" not in DISTILL.identity()
    assert "validation" not in VPRED.identity()
    job = Job(verb="distill_steps", recipe=mini(), out=str(tmp_path))
    settings = DISTILL.with_values(["validation.references=run:evaluation/references"])
    assert resolve_training(settings, job).validation.references == f"{tmp_path}/evaluation/references"
    assert resolve_training(DISTILL, job) == DISTILL


def test_a_card_names_the_model_and_licence_of_the_recipe(tmp_path, monkeypatch):
    recipe = mini().with_values(["model=models/mine", "mobile.licence.weights=MIT"])
    monkeypatch.chdir(tmp_path)
    job = Job(verb="distill_steps", recipe=recipe, out=str(tmp_path))
    assert base_model_of(job) == PublishedModel(model="models/mine", licence="MIT")
    # A folder here is no hub id.
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert base_model_of(job).model == str(tmp_path / "models" / "mine")


def test_a_w_conditioned_student_is_trained_and_saved(latents, v_teacher, tmp_path):
    settings = DISTILL.with_values(["steps.w_conditioned=true", "steps.cfg_probability=1.0"])
    state, _, _ = train_alone(training_on(latents, teacher=v_teacher, settings=settings), LOOP)
    hashes = save_trained(state, student=v_teacher, size=32, folder=tmp_path, settings=settings)
    made = load(str(tmp_path / "model"))
    assert has_guidance_embedding(made.unet)
    assert made.fingerprint()["unet"] == hashes["model"] != hashes["raw"]
    with pytest.raises(TrainingError, match=r"set steps\.w_conditioned"):
        distill(latents, tmp_path, teacher=str(tmp_path / "model"))
