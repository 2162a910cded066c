"""Adapters: trained by every objective, published as LoRAs, merged and unmerged alike, in other models."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from student_inputs import DISTILL, assembled, encode, save_trained, save_v_model, train_alone

from jobs.training.distillation import _check, assemble
from jobs.training.initial_state import initial_state
from jobs.training.settings import DistillSettings
from jobs.training.spec import TrainingError
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load
from snapfusion.models.lora_files import DIFFUSERS_FILE, KOHYA_FILE
from snapfusion.models.save import save
from snapfusion.noise import gaussian_batch
from snapfusion.training import lora
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.loop import train
from snapfusion.training.settings import CfgRange, LcmSettings, LoraSettings, PcmSettings

CFG_RANGE = CfgRange(low=2.0, high=6.0)
OBJECTIVES = {
    "steps": None,
    "lcm": LcmSettings(points=8, steps=4, cfg_range=CFG_RANGE, w_conditioned=False),
    "pcm": PcmSettings(points=8, phases=4, cfg_range=CFG_RANGE),
}
ADAPTER = LoraSettings(rank=4, alpha=8.0)


def settings_of(name, **changes) -> DistillSettings:
    loop = DISTILL.loop.model_copy(update={"learning_rate": 1e-2})
    changes = {"consistency": OBJECTIVES[name], "lora": ADAPTER, "loop": loop, **changes}
    return DISTILL.model_copy(update=changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_v_model(tiny_bundle(), tmp_path_factory.mktemp("models") / "tiny-v", dtype=torch.float32)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another fine-tune of the same model."""
    bundle = tiny_bundle()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in bundle.unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    bundle.__post_init__()
    return save_v_model(bundle, tmp_path_factory.mktemp("models") / "other", dtype=torch.float32)


@pytest.fixture(scope="module")
def latents(teacher, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("run"), model=teacher, side=16, rows=24, detail=16, wide=1)


@pytest.fixture(scope="module", params=OBJECTIVES)
def trained(request, teacher, latents, tmp_path_factory):
    """The settings, the state and the folder of a student whose adapter was trained."""
    settings, folder = settings_of(request.param), tmp_path_factory.mktemp("lora")
    training = assembled(assemble, latents, settings, teacher=teacher, student=teacher)
    state, _, _ = train_alone(training, settings.loop)
    evaluation = training.evaluate()
    assert evaluation["before"] != evaluation["after"]
    record = _check(settings, latents, dict.fromkeys(("teacher", "student"), load(teacher)))
    save_trained(state, student=teacher, size=16, folder=folder, settings=settings, distillation=record)
    return settings, state, folder


def outputs(unet):
    """The UNet's output for some inputs."""
    torch.manual_seed(0)
    z_t, c = torch.randn(3, 4, 8, 8), torch.randn(3, 16, 16)
    with torch.inference_mode():
        return unet(z_t, torch.tensor([999, 500, 1]), encoder_hidden_states=c, return_dict=False)[0]


def test_adapter_alone_is_trained_and_saved(trained):
    _, state, _ = trained
    tensors = state.tensors()
    assert set(tensors) == {"model", "optimizer", "ema"}
    modules = {name.rpartition("/")[2].partition(".")[0] for name in tensors["model"]} - {"alpha"}
    assert {"to_q", "conv1", "proj_in", "time_emb_proj"} <= modules
    for name, tensor in tensors["model"].items():
        role = name.removesuffix(".weight").rpartition(".")[2]
        assert role in {"alpha", "down", "up"}
        assert role == "alpha" or tensor.shape[role == "up"] == 4
        assert tensor.abs().max() > 0


def test_merged_and_unmerged_adapters_draw_alike(trained, teacher):
    _, state, folder = trained
    adapted = state.model
    adapted.load_state_dict(state.final_weights())
    unmerged, plain = outputs(adapted.eval()), outputs(load(teacher).unet)
    assert (unmerged - plain).abs().max() > 1e-3
    for source in (folder / "model", *(f"{teacher}?lora={folder}/lora/{name}" for name in FILES)):
        torch.testing.assert_close(outputs(load(str(source)).unet), unmerged, rtol=0, atol=1e-5)


FILES = (DIFFUSERS_FILE, KOHYA_FILE)


@pytest.mark.parametrize("trained", ["lcm"], indirect=True)
def test_files_say_what_they_are(trained):
    settings, _, folder = trained
    with safe_open(folder / "lora" / DIFFUSERS_FILE, framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (4, 8.0)
    assert {f"unet.{name}.lora_A.weight" for name in adapter["unet.target_modules"]} <= keys
    record = json.loads(metadata["distillation"])
    assert (record["steps"], record["prediction_type"]) == (4, "v_prediction")
    with safe_open(folder / "lora" / KOHYA_FILE, framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert metadata["ss_network_dim"] == "4"
    assert {key.rpartition("to_q")[2] for key in keys if "to_q" in key} == {
        ".lora_down.weight",
        ".lora_up.weight",
        ".alpha",
    }
    assert json.loads(metadata["distillation"]) == record
    assert (folder / "lora-raw" / DIFFUSERS_FILE).is_file()
    assert settings.identity()["lora"]["rank"] == 4


def test_another_model_is_sampled_as_the_adapter_says(trained, other):
    settings, _, folder = trained
    bundle = load(f"{other}?lora={folder}/lora/{DIFFUSERS_FILE}")
    assert bundle.distillation["steps"] == 4
    sampler = "consistency" if isinstance(settings.consistency, LcmSettings) else None
    assert bundle.distillation.get("sampler") == sampler
    guided = bundle.distillation["cfg_range"]
    assert guided == (
        {"low": 1.0, "high": 1.0} if settings.consistency else CfgRange(low=1.0, high=6.0).to_values()
    )
    assert (outputs(bundle.unet) - outputs(load(other).unet)).abs().max() > 1e-3


@pytest.mark.parametrize("trained", ["lcm"], indirect=True)
def test_stock_diffusers_draws_the_same_with_the_adapter(trained, teacher):
    _, _, folder = trained
    drawn = []
    for source, adapter in ((folder / "model", None), (teacher, folder / "lora")):
        pipeline = StableDiffusionPipeline.from_pretrained(source)
        pipeline.set_progress_bar_config(disable=True)
        if adapter is not None:
            pipeline.load_lora_weights(adapter)
        drawing = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
        drawing["latents"] = gaussian_batch([5], (4, 8, 8))
        drawing["generator"] = torch.Generator().manual_seed(0)
        pipeline.scheduler = (
            type(drawn[0][1]).from_config(drawn[0][1].config) if drawn else pipeline.scheduler
        )
        drawn.append((pipeline("red", **drawing).images, pipeline.scheduler))
    np.testing.assert_allclose(drawn[0][0], drawn[1][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("trained", ["lcm"], indirect=True)
def test_killed_and_resumed_training_is_identical(trained, teacher, latents, tmp_path):
    settings, whole, _ = trained
    store = CheckpointStore(str(tmp_path))

    def run(*, kill_after=None, found=None):
        training = assembled(assemble, latents, settings, teacher=teacher, student=teacher)
        state = initial_state(training)
        if found is not None:
            state.restore(found.tensors, found.values)

        def after_step(step):
            if step.step == kill_after:
                store.save(state.step, tensors=state.tensors(), values=state.values())
                raise KeyboardInterrupt

        with closing(training.loader.batches(state.step)) as batches:
            options = {"settings": settings.loop, "micro_batch": 6, "after_step": after_step}
            train(state, objective=training.objective, batches=batches, **options)
        return state

    with pytest.raises(KeyboardInterrupt):
        run(kill_after=2)
    resumed = run(found=store.newest())
    for name, tensor in whole.final_weights().items():
        assert torch.equal(tensor, resumed.final_weights()[name]), name


def test_what_an_adapter_cannot_do_is_refused(teacher, latents, monkeypatch):
    models = dict.fromkeys(("teacher", "student"), load(teacher))

    def refused(error, message, **changes):
        with pytest.raises(error, match=message):
            _check(settings_of(changes.pop("name", "pcm"), **changes), latents, models)

    conditioned = OBJECTIVES["lcm"].model_copy(update={"w_conditioned": True})
    refused(
        TrainingError, r"consistency\.w_conditioned is true, and an adapter cannot", consistency=conditioned
    )
    unknown = ADAPTER.model_copy(update={"modules": ("to_q", "to_x")})
    refused(lora.LoraError, r"lora\.modules names 'to_x', with which no linear", lora=unknown)
    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    refused(lora.LoraError, r"peft is not installed.*\[lora\]")


@pytest.mark.parametrize("trained", ["lcm"], indirect=True)
def test_an_adapter_of_another_prediction_is_refused(trained, teacher, tmp_path):
    _, _, folder = trained
    save(tiny_bundle(), tmp_path / "eps", dtype=torch.float32)
    with pytest.raises(ModelError, match=r"distilled in a model with v_prediction, and .* has epsilon"):
        load(f"{tmp_path / 'eps'}?lora={folder}/lora/{DIFFUSERS_FILE}")


def test_identity_without_an_adapter_is_that_of_before():
    assert "lora" not in DISTILL.identity()
