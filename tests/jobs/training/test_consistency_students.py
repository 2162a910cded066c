"""LCM and PCM students: trained online and from TARGETS, saved, sampled here and in stock diffusers."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from diffusers import StableDiffusionPipeline
from in_process import in_process
from student_inputs import DISTILL, assembled, encode, save_trained, save_v_model, train_alone

from jobs import command
from jobs.evaluation.images import distillation_mismatch, generate_images
from jobs.training.distillation import _check, assemble
from jobs.training.settings import DistillSettings
from pipelines.datasets.settings import TargetsSettings
from pipelines.datasets.targets import compute_targets
from pipelines.stages.settings import TeacherSettings
from pipelines.tables.table import TableError
from snapfusion.models.load import load
from snapfusion.noise import gaussian_batch, noise_key, step_noise
from snapfusion.sampling import time_grid
from snapfusion.training.settings import CfgRange, LcmSettings, PcmSettings

LCM = LcmSettings(points=8, steps=4, cfg_range=CfgRange(low=2.0, high=6.0))
PCM = PcmSettings(points=8, phases=4, cfg_range=CfgRange(low=2.0, high=6.0))


def settings_of(consistency, **changes) -> DistillSettings:
    return DISTILL.model_copy(update={"consistency": consistency, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_v_model(tiny_bundle(), tmp_path_factory.mktemp("models") / "tiny-v", dtype=torch.float32)


@pytest.fixture(scope="module")
def latents(teacher, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("run"), model=teacher, side=16, rows=24, detail=16, wide=1)


@pytest.fixture(scope="module")
def targets(teacher, latents):
    """TARGETS of 8 points with k = 1, guided in each draw."""
    teaching = TeacherSettings(student_steps=8, k=1, cfg_range=PCM.cfg_range, batch_size=6)
    return compute_targets(
        TargetsSettings(teaching=teaching, draws=1, cfg_probability=1.0),
        teacher=teacher,
        latents=latents,
        url=latents.url.replace("latents", "targets"),
        run=in_process,
    )


@pytest.mark.parametrize("consistency", [LCM, PCM, PCM.model_copy(update={"guided": False})])
def test_student_is_trained_online(consistency, teacher, latents):
    settings = settings_of(consistency)
    training = assembled(assemble, latents, settings, teacher=teacher, student=teacher)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    state, steps, _ = train_alone(training, settings.loop)
    assert len(steps) == 4
    assert not all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())
    evaluation = training.evaluate()
    branch = "guided" if getattr(consistency, "guided", True) else "vanilla"
    assert set(evaluation["after"]) == {branch}
    assert 0.0 < evaluation["after"][branch]["loss"] != evaluation["before"][branch]["loss"] > 0.0


def test_student_is_trained_on_targets_of_its_grid(teacher, targets):
    settings = settings_of(PCM, targets="table")
    models = dict.fromkeys(("teacher", "student"), load(teacher))
    assert _check(settings, targets, models)["method"] == "pcm"
    training = assembled(assemble, targets, settings, teacher=teacher, student=teacher)
    _, steps, _ = train_alone(training, settings.loop)
    assert len(steps) == 4
    other = settings_of(PCM.model_copy(update={"points": 16}), targets="table")
    with pytest.raises(TableError, match="student_steps is 8 there, 16 here"):
        _check(other, targets, models)
    vanilla = settings_of(PCM.model_copy(update={"guided": False, "caption_dropout": 0.1}), targets="table")
    with pytest.raises(TableError, match="has no vanilla rows"):
        _check(vanilla, targets, models)


@pytest.fixture(scope="module")
def lcm(teacher, latents, tmp_path_factory):
    """The folder of an LCM student."""
    settings = settings_of(LCM)
    folder = tmp_path_factory.mktemp("lcm")
    training = assembled(assemble, latents, settings, teacher=teacher, student=teacher)
    state, _, _ = train_alone(training, settings.loop)
    models = dict.fromkeys(("teacher", "student"), load(teacher))
    record = _check(settings, latents, models)
    save_trained(state, student=teacher, size=16, folder=folder, settings=settings, distillation=record)
    return folder / "model"


def test_lcm_student_is_sampled_by_its_own_sampler(lcm, tmp_path, capsys):
    path = tmp_path / "a.png"
    assert command.main(["generate", "red", "--model", str(lcm), "--out", str(path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "4 steps of consistency" in line
    bundle = load(str(lcm))
    assert distillation_mismatch(bundle, steps=2, solver="consistency", guidance=3.0) is None
    note = distillation_mismatch(bundle, steps=4, solver="ddim", guidance=3.0)
    assert note == "distilled for 4 steps of consistency at guidance 2 to 6; this is 4 of ddim at guidance 3"
    arguments = ["--model", str(lcm), "--steps", "9", "--out", str(tmp_path / "b.png")]
    assert command.main(["generate", "red", *arguments]) == 2
    assert "--steps 9: num_steps is 9; a student of 8 points" in capsys.readouterr().err


def test_image_does_not_depend_on_its_batch(lcm):
    bundle = load(str(lcm))
    sampling = {"steps": 4, "guidance": 3.0, "seed": 0, "count": 1, "solver": "consistency"}
    alone = generate_images(bundle, ["red"], **sampling)[0]
    beside = generate_images(bundle, ["re", "red"], **sampling)[1]
    assert np.abs(alone.astype(int) - beside.astype(int)).max() <= 1


def test_lcm_student_generates_the_same_in_stock_diffusers(lcm):
    pipeline = StableDiffusionPipeline.from_pretrained(lcm)
    pipeline.set_progress_bar_config(disable=True)
    bundle, keys = load(str(lcm)), [noise_key("image")]
    noise = step_noise(keys, bundle.latent_shape, device=bundle.device)
    drawn = iter(noise(t) for t in time_grid(4)[1:-1])
    # Their noise of each step is drawn by a generator: here it is ours.
    step = partial(type(pipeline.scheduler).step, pipeline.scheduler)
    pipeline.scheduler.step = step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(drawn))
        image = pipeline(
            "red",
            num_inference_steps=4,
            guidance_scale=3.0,
            latents=gaussian_batch(keys, bundle.latent_shape),
            output_type="np",
        ).images[0]
    assert pipeline.scheduler.timesteps.tolist() == list(time_grid(4)[:-1])
    c = bundle.encode_text(bundle.tokenize(["red"]))
    from snapfusion.sampling import sample

    with torch.inference_mode():
        latents = sample(
            bundle.denoiser(c, w=3.0),
            gaussian_batch(keys, bundle.latent_shape),
            grid=time_grid(4),
            schedule=bundle.schedule,
            solver="consistency",
            noise=noise,
        )
        expected = (bundle.decode(latents)[0] / 2 + 0.5).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-3)


def test_guided_pcm_student_is_sampled_without_guidance(teacher, latents):
    models = dict.fromkeys(("teacher", "student"), load(teacher))
    record = _check(settings_of(PCM), latents, models)
    assert record["cfg_range"] == {"low": 1.0, "high": 1.0}
    assert record["timesteps"] == [999, 749, 499, 249]
    record = _check(settings_of(PCM.model_copy(update={"guided": False})), latents, models)
    assert "cfg_range" not in record


def test_identity_states_the_objective_that_is_used():
    assert DISTILL.identity().keys() == settings_of(PCM).identity().keys() - {"consistency"} | {"steps"}
    changed = settings_of(PCM, steps=DISTILL.steps.model_copy(update={"k": 4}))
    assert changed.identity() == settings_of(PCM).identity()
