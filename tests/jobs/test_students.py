"""Fine-tuning to v, and step distillation, from end to end on a tiny teacher: made once, left or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from in_process import in_process

from jobs.distill_steps import DistillSettings, assemble, distill_steps, summary
from jobs.finetune_vpred import VpredSettings, finetune_vpred
from jobs.student import save_student
from jobs.trainer import Trained, TrainerSettings, TrainingError
from pipelines.latents import Latents, encode_latents
from pipelines.loader import LoaderSettings, count_trainable
from pipelines.schemas import to_png
from pipelines.sources.shards import Picture, write_shard
from pipelines.sources.webdataset import list_shards
from pipelines.stages.image import ImageSettings
from pipelines.stages.target import Teaching
from pipelines.tables import TableError
from pipelines.targets import Targets, compute_targets
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.told import is_told
from snapfusion.sampling import time_grid
from snapfusion.training.checkpoint import Checkpoint
from snapfusion.training.draws import CfgRange
from snapfusion.training.loop import LoopSettings, new_state, train
from snapfusion.training.steps import StepsSettings

LOOP = LoopSettings(num_steps=4, global_batch=6, learning_rate=1e-3, ema_decay=0.9)
LOADER = LoaderSettings(held_out=0.3)
TRAINER = TrainerSettings(
    num_workers=2, cpus_per_worker=0.5, micro_batch=2, checkpoint_every=2, curve_every=1
)
VPRED = VpredSettings(loop=LOOP, loader=LOADER, trainer=TRAINER.model_copy(update={"num_workers": 1}))
DISTILL = DistillSettings(
    steps=StepsSettings(student_steps=4, cfg_probability=0.5, cfg_range=CfgRange(low=1.0, high=6.0)),
    loop=LOOP,
    loader=LOADER,
    trainer=TRAINER,
)


def picture(number: int) -> Picture:
    pixels = np.random.Generator(np.random.Philox(number)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Picture(image=to_png(pixels), caption="a red thing", url=f"http://origin/{number}")


@pytest.fixture(scope="module")
def latents(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_shard(str(folder / "shards"), map(picture, range(24)), index=0, extension="png", rows_per_shard=100)
    return encode_latents(
        Latents(rows_per_unit=6, images=ImageSettings(min_side=8)),
        model=tiny_teacher,
        shards=list_shards(str(folder / "shards")),
        source="web",
        url=str(folder / "latents"),
        run=in_process,
    )


@pytest.fixture(scope="module")
def v_teacher(tmp_path_factory):
    """The tiny teacher's other half: the same text encoder and VAE, a UNet that is taken to predict v."""
    folder = tmp_path_factory.mktemp("models") / "tiny-v"
    bundle = tiny_bundle()
    bundle.prediction_type = "v_prediction"
    save(bundle, folder)
    return str(folder)


@pytest.fixture(scope="module")
def vpred(ray_cluster, latents, tiny_teacher):
    out = Path(latents.url).with_name("vpred")
    metrics = finetune_vpred(
        VPRED,
        model=os.path.relpath(tiny_teacher),  # a worker stands in another folder
        latents_url=latents.url,
        out_url=os.path.relpath(out),
    )
    return out, metrics


@pytest.fixture(scope="module")
def student(vpred, latents):
    out, reports = Path(latents.url).with_name("student"), []
    metrics = distill_steps(
        DISTILL,
        teacher=str(vpred[0] / "model"),
        data_url=latents.url,
        out_url=str(out),
        on_report=reports.append,
    )
    return out, metrics, reports


def in_one_process(training, *, settings=LOOP):
    """The same training without Ray, all of each batch at once; its state, and what each step said."""
    state, told = new_state(training.model, settings=settings), []
    batches = training.loader.batches(0)
    train(
        state,
        objective=training.objective,
        batches=batches,
        settings=settings,
        micro_batch=6,
        after_step=told.append,
    )
    batches.close()
    return state, told


def assembled(latents, *, teacher, settings=DISTILL):
    return next(
        iter(
            assemble(
                settings=settings,
                teacher=teacher,
                student=teacher,
                data_url=latents.url,
                data_version=latents.version,
                counts=count_trainable(latents, held_out=0.3),
                identity={},
                device=torch.device("cpu"),
            )
        )
    )


@pytest.mark.ray
def test_an_eps_model_becomes_a_v_model_that_opens_by_itself(vpred, latents, tiny_teacher):
    out, metrics = vpred
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert [point["step"] for point in metrics["curve"]] == [1, 2, 3, 4]
    assert metrics["evaluation"]["rows"] > 0
    assert metrics["parents"]["latents"] == latents.lineage()
    made, raw, before = load(str(out / "model")), load(str(out / "raw")), load(tiny_teacher)
    assert made.prediction_type == raw.prediction_type == "v_prediction"
    mine, theirs = made.fingerprint(), before.fingerprint()
    assert {name for name in mine if mine[name] != theirs[name]} == {"unet"}
    assert metrics["weights"] == {"model": mine["unet"], "raw": raw.fingerprint()["unet"]}
    assert not (Path(f"{out}.training")).exists()
    with pytest.raises(TrainingError, match="predicts v already"):
        finetune_vpred(VPRED, model=str(out / "model"), latents_url=latents.url, out_url=str(out / "again"))


@pytest.mark.ray
def test_two_workers_distil_what_one_process_does(student, vpred, latents):
    """Branches, draws and gamma are the same: what differs is the order of float32 sums."""
    out, metrics, reports = student
    training = assembled(latents, teacher=str(vpred[0] / "model"))
    state, told = in_one_process(training)
    assert [point["loss"] for point in metrics["curve"]] == pytest.approx(
        [step.loss for step in told], rel=1e-3
    )
    figures = {name: metrics["curve"][-1][name] for name in told[-1].figures}
    assert figures == pytest.approx(dict(told[-1].figures), rel=1e-2)
    assert {name.partition("/")[0] for name in figures} == {"vanilla", "guided"}
    made = load(str(out / "model")).unet.state_dict()
    for name, tensor in state.final_weights().items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-4)
    assert reports[-1]["step"] == 4


@pytest.mark.ray
def test_a_student_says_how_it_is_to_be_sampled_and_how_it_learnt(student):
    out, metrics, _ = student
    told = json.loads((out / "model" / "distillation.json").read_text())
    assert told == metrics["distillation"]
    assert (told["steps"], told["teacher_steps"]) == (4, 8)
    assert told["timesteps"] == list(time_grid(4)[:-1])
    assert told["cfg_range"] == {"low": 1.0, "high": 6.0}
    assert load(str(out / "model")).prediction_type == "v_prediction"
    assert len(summary(metrics)) == 2
    assert set(metrics["evaluation"]) == {"before", "after"}
    assert set(metrics["evaluation"]["after"]) == {"vanilla", "guided"}


@pytest.mark.ray
def test_a_finished_student_is_left_and_another_setting_refused(student, vpred, latents):
    out, metrics, _ = student
    asked = {"teacher": str(vpred[0] / "model"), "data_url": latents.url, "out_url": str(out)}
    assert distill_steps(DISTILL.with_values(["trainer.num_workers=7", "name=other"]), **asked) == metrics
    with pytest.raises(TrainingError, match=r"settings\.steps\.gamma is 0\.2 there, 1\.0 here"):
        distill_steps(DISTILL.with_values(["steps.gamma=1.0"]), **asked)


def test_a_student_learns_from_a_table_that_fits(latents, v_teacher, tmp_path):
    teaching = Teaching(student_steps=4, k=2, cfg_range=CfgRange(low=1.0, high=6.0), batch_size=6)
    targets = compute_targets(
        Targets(teaching=teaching, draws=2, cfg_probability=0.5),
        teacher=v_teacher,
        latents=latents,
        url=str(tmp_path / "targets"),
        run=in_process,
    )
    settings = DISTILL.with_values(["targets=table", "loop.num_steps=30", "steps.cfg_probability=0.0"])
    training = assembled(targets, teacher=v_teacher, settings=settings)
    _, told = in_one_process(training, settings=settings.loop)
    losses = [step.figures["vanilla/loss"] for step in told]
    assert losses[-1] < losses[0]
    asked = {"teacher": v_teacher, "data_url": targets.url, "out_url": str(tmp_path / "student")}
    with pytest.raises(TableError, match=r"student_steps is 4 there, 8 here"):
        distill_steps(settings.with_values(["steps.student_steps=8"]), **asked)
    with pytest.raises(TableError, match="holds latents; targets"):
        distill_steps(settings, **{**asked, "data_url": latents.url})


def test_checkpointed_activations_give_the_same_gradient(latents, v_teacher):
    norms = []
    for checkpointing in ("false", "true"):
        settings = DISTILL.with_values([f"gradient_checkpointing={checkpointing}"])
        _, told = in_one_process(assembled(latents, teacher=v_teacher, settings=settings))
        norms.append([step.grad_norm for step in told])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_an_eps_student_is_refused(latents, tiny_teacher, tmp_path):
    with pytest.raises(TrainingError, match="predicts eps, and step distillation needs v"):
        distill_steps(DISTILL, teacher=tiny_teacher, data_url=latents.url, out_url=str(tmp_path / "student"))


def test_an_eps_teacher_teaches_a_v_student(latents, tiny_teacher, v_teacher):
    training = next(
        iter(
            assemble(
                settings=DISTILL,
                teacher=tiny_teacher,
                student=v_teacher,
                data_url=latents.url,
                data_version=latents.version,
                counts=count_trainable(latents, held_out=0.3),
                identity={},
                device=torch.device("cpu"),
            )
        )
    )
    batches = training.loader.batches(0)
    assert training.objective(training.model, next(batches), step=0).isfinite().all()
    batches.close()


def test_a_teacher_with_another_text_encoder_is_refused_by_name(latents, v_teacher, tmp_path):
    other = tiny_bundle()
    other.prediction_type = "v_prediction"
    other.text_encoder = tiny_bundle(seed=9).text_encoder
    save(other, tmp_path / "other")
    with pytest.raises(TrainingError, match=r"other cannot teach .*: its text encoder is another.*App\. D"):
        distill_steps(
            DISTILL,
            teacher=str(tmp_path / "other"),
            student=v_teacher,
            data_url=latents.url,
            out_url=str(tmp_path / "student"),
        )


def test_latents_of_another_vae_are_refused(latents, tmp_path):
    other = tiny_bundle(seed=5)
    other.prediction_type = "v_prediction"
    save(other, tmp_path / "other")
    with pytest.raises(TableError, match=r"another VAE .*weights\.vae is"):
        distill_steps(
            DISTILL, teacher=str(tmp_path / "other"), data_url=latents.url, out_url=str(tmp_path / "student")
        )


def test_latents_of_another_tokenizer_are_refused(latents, tmp_path):
    other = tiny_bundle()
    other.prediction_type = "v_prediction"
    other.tokenizer.pad_token = other.tokenizer.bos_token
    save(other, tmp_path / "other")
    with pytest.raises(TableError, match="token ids of another tokenizer"):
        distill_steps(
            DISTILL, teacher=str(tmp_path / "other"), data_url=latents.url, out_url=str(tmp_path / "student")
        )


def test_a_grid_that_the_schedule_has_not_is_refused(latents, v_teacher, tmp_path):
    settings = DISTILL.with_values(["steps.student_steps=500", "steps.k=4"])
    with pytest.raises(TrainingError, match=r"steps\.k 4 times steps\.student_steps 500"):
        distill_steps(settings, teacher=v_teacher, data_url=latents.url, out_url=str(tmp_path / "student"))


def test_a_w_conditioned_student_is_trained_and_saved(latents, v_teacher, tmp_path):
    settings = DISTILL.with_values(["steps.w_conditioned=true", "steps.cfg_probability=1.0"])
    state, _ = in_one_process(assembled(latents, teacher=v_teacher, settings=settings))
    checkpoint = Checkpoint(step=4, tensors=state.tensors(), values=state.values())
    hashes = save_student(
        Trained(checkpoint=checkpoint, evaluation={}, environment={}),
        student=v_teacher,
        folder=tmp_path,
        settings=settings,
        distillation=None,
    )
    made = load(str(tmp_path / "model"))
    assert is_told(made.unet)
    assert made.fingerprint()["unet"] == hashes["model"] != hashes["raw"]
    with pytest.raises(TrainingError, match=r"is told w, .*: set steps\.w_conditioned"):
        distill_steps(
            DISTILL,
            teacher=str(tmp_path / "model"),
            data_url=latents.url,
            out_url=str(tmp_path / "student"),
        )
