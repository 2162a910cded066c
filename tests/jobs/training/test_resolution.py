"""Tests of other image sizes and of aspect buckets, from encoding to sampling."""

import itertools

import pytest
import torch
from conftest import tiny_bundle, tiny_student
from in_process import in_process
from PIL import Image
from student_inputs import DISTILL, VPRED, assembled, encode, save_trained, save_v_model, train_alone

from jobs import generate
from jobs.training import distillation, velocity
from jobs.training.spec import TrainingError
from jobs.training.validation import Validator, check_validation
from pipelines.datasets.pairs import generate_pairs
from pipelines.datasets.pairs import recomputer as remake_pairs
from pipelines.datasets.samples import generate_samples
from pipelines.datasets.settings import PairsSettings, SamplesSettings, TargetsSettings
from pipelines.datasets.targets import compute_targets
from pipelines.loading.buckets import BucketLoader
from pipelines.loading.loader import BatchLoader
from pipelines.rejections import Rejection
from pipelines.sources.captions import Caption
from pipelines.stages.settings import (
    Buckets,
    Generation,
    Sampler,
    SamplingSettings,
    TeacherSettings,
)
from pipelines.tables.schemas import array_type, from_png
from pipelines.tables.verification import verify_table
from snapfusion.models import random_weights, sd15
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.settings import SettingsError
from snapfusion.training.loop import new_state

CPU = torch.device("cpu")
TARGETS = TargetsSettings(
    teaching=TeacherSettings(
        student_steps=4, k=2, cfg_range=DISTILL.steps.cfg_range, caption_dropout=0.1, batch_size=6
    ),
    draws=2,
    cfg_probability=0.5,
)


def trained(training, *, settings, **more):
    """The state at the end of a training, and the shapes of its latents."""
    state, _, shapes = train_alone(training, settings.loop, micro_batch=4, **more)
    return state, shapes


def finetuning(table, *, model: str, settings):
    return assembled(velocity.assemble, table, settings, model=model)


def distillation_training(table, *, settings, **models: str):
    return assembled(distillation.assemble, table, settings, **models)


@pytest.fixture(scope="module")
def v_teacher(tmp_path_factory):
    return save_v_model(tiny_bundle(), tmp_path_factory.mktemp("models") / "tiny-v", dtype=torch.float32)


@pytest.fixture
def sd_like(monkeypatch):
    """A source whose networks have SD-v1.5's levels, so its granularity, and a few channels."""
    width = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    heads = {"attention_head_dim": 1, "cross_attention_dim": 16}
    few = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    small = random_weights.ModelConfig(
        text_encoder={**sd15.TEXT_ENCODER, "num_hidden_layers": 1, **width},
        unet={**sd15.UNET, **few, **heads},
        vae={**sd15.VAE, "block_out_channels": (2, 2, 2, 2), "norm_num_groups": 1, "layers_per_block": 1},
        padding="!",
        prediction_type="v_prediction",
    )
    monkeypatch.setitem(random_weights.MODEL_CONFIGS, "small", small)
    return "random:small"


@pytest.mark.parametrize(
    "size", [pytest.param(256, marks=pytest.mark.slow), 512, pytest.param(768, marks=pytest.mark.slow)]
)
def test_the_same_recipe_at_256_512_and_768(sd_like, tmp_path, size):
    bundle = load(sd_like)
    assert (bundle.image_size, bundle.granularity, bundle.cell) == (512, 64, 8)
    latents = encode(tmp_path, model=sd_like, side=size // 2, rows=2, size=size)
    settings = TARGETS.with_values(["draws=1", "cfg_probability=0.0"])
    targets = compute_targets(
        settings, teacher=sd_like, latents=latents, url=str(tmp_path / "targets"), run=in_process
    )
    side = size // 8
    for table, column in ((latents, "latent"), (targets, "x_target")):
        rows = table.read()
        values = array_type(rows.schema.field(column)).unpack(rows[column].to_pylist())
        assert values.shape == (2, 4, side, side)
    steps = ["steps.cfg_probability=0.0", "steps.gamma=0.0", "loop.num_steps=1", "loop.global_batch=1"]
    steps += ["targets=table", "trainer.num_workers=1"]
    settings = DISTILL.with_values([*steps, "loader.held_out=0.0", "validation.every=null"])
    training = distillation_training(targets, teacher=sd_like, student=sd_like, settings=settings)
    _, shapes = trained(training, settings=settings)
    assert shapes == {(4, side, side)}


@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_a_published_model_takes_multiples_of_64(name):
    with torch.device("meta"):
        bundle = random_weights.random_bundle(name)
    assert bundle.granularity == 64
    shapes = [bundle.resize(size).latent_shape for size in (256, 512, 768)]
    assert shapes == [(4, 32, 32), (4, 64, 64), (4, 96, 96)]
    with pytest.raises(ValueError, match=r"size is 500; .* multiple of 64"):
        bundle.resize(500)


@pytest.mark.parametrize("size", [8, *(pytest.param(size, marks=pytest.mark.slow) for size in (16, 24))])
def test_a_v_model_of_another_size_can_teach(v_teacher, tmp_path, size):
    latents = encode(tmp_path, model=v_teacher, side=20, size=size)
    settings = VPRED.with_values(["validation.every=null"])
    training = finetuning(latents, model=v_teacher, settings=settings)
    assert isinstance(training.loader, BatchLoader)
    state, shapes = trained(training, settings=settings)
    assert shapes == {(4, size // 2, size // 2)}
    assert training.evaluate()["rows"] > 0
    save_trained(state, student=v_teacher, size=size, folder=tmp_path / "student", settings=settings)
    made = load(str(tmp_path / "student" / "model"))
    assert (made.image_size, made.latent_shape) == (size, (4, size // 2, size // 2))
    # A model of one size teaches one of another, and both read the LATENTS.
    settings = DISTILL.with_values(["validation.every=null"])
    training = distillation_training(latents, teacher=v_teacher, student=made.source, settings=settings)
    assert trained(training, settings=settings)[1] == shapes
    distillation._check_models(teacher=load(v_teacher), student=made)
    distillation.check_table(settings, table=latents, teacher=load(v_teacher), student=made)


@pytest.mark.parametrize("targets", [pytest.param("online", marks=pytest.mark.slow), "table"])
def test_a_student_learns_from_several_shapes(v_teacher, tmp_path, targets):
    table = encode(tmp_path, model=v_teacher, side=20, rows=24, buckets=Buckets(max_aspect=3.0))
    settings = VPRED.with_values(["loop.num_steps=8", "validation.every=null"])
    training = finetuning(table, model=v_teacher, settings=settings)
    assert isinstance(training.loader, BucketLoader)
    shapes = {(4, 8, 8), (4, 6, 10), (4, 10, 6)}
    assert trained(training, settings=settings)[1] <= shapes
    assert training.evaluate()["rows"] > 0
    if targets == "table":
        table = compute_targets(
            TARGETS, teacher=v_teacher, latents=table, url=str(tmp_path / "targets"), run=in_process
        )
    settings = DISTILL.with_values(["loop.num_steps=12", f"targets={targets}", "validation.every=null"])
    distillation.check_table(settings, table=table, teacher=load(v_teacher), student=load(v_teacher))
    training = distillation_training(table, teacher=v_teacher, student=v_teacher, settings=settings)
    state, seen = trained(training, settings=settings)
    assert seen == shapes
    assert set(training.evaluate()["after"]) == {"vanilla", "guided"}
    assert state.step == 12


def test_robust_training_in_buckets_resumes(v_teacher, tmp_path):
    table = encode(tmp_path, model=v_teacher, side=20, rows=24, buckets=Buckets(max_aspect=3.0))
    constant = ["loop.num_steps=6", "loop.decay=constant", "validation.every=null"]
    settings = VPRED.with_values([*constant, 'skip={"attention": 0.5, "resnet": 0.5}'])
    whole, shapes = trained(finetuning(table, model=v_teacher, settings=settings), settings=settings)
    assert len(shapes) > 1
    half = settings.with_values(["loop.num_steps=3"])
    left, _ = trained(finetuning(table, model=v_teacher, settings=half), settings=half)
    again = finetuning(table, model=v_teacher, settings=settings)
    state = new_state(again.model, settings=settings.loop)
    state.restore(left.tensors(), left.values())
    trained(again, settings=settings, state=state)
    for name, tensor in whole.final_weights().items():
        assert torch.equal(tensor, state.final_weights()[name]), name


def test_validation_uses_the_trained_size():
    check_validation(DISTILL.validation, size=32)
    with pytest.raises(TrainingError, match=r"32 px.* 48 px"):
        check_validation(DISTILL.validation, size=48)
    settings = DISTILL.validation.model_copy(update={"drawing": SamplingSettings(size=32)})
    check_validation(settings, size=48)
    common = {"every": 1, "model": "mini-v", "distillation": None, "device": CPU, "threads": 1}
    for given, size in ((DISTILL.validation, 48), (settings, 32)):
        assert Validator(settings=given, size=48, **common)._networks.bundle.image_size == size


def test_a_block_unet_keeps_its_size_when_saved(tmp_path):
    bundle = tiny_student()
    assert isinstance(bundle.unet, BlockUNet)
    before = bundle.fingerprint()
    save(bundle.resize(22), tmp_path / "model", dtype=torch.float32)
    made = load(str(tmp_path / "model"))
    assert (made.latent_shape, made.unet.config["architecture"]["sample_size"]) == ((4, 11, 11), 11)
    assert made.fingerprint() == before


CAPTIONS: list[Caption | Rejection] = [Caption(id=f"c/{n}", ordinal=n, text="a red thing") for n in range(3)]


@pytest.mark.parametrize("size", [8, 24])
def test_pairs_and_samples_of_another_size(v_teacher, tmp_path, size):
    pairs = generate_pairs(
        PairsSettings(generation=Generation(steps=2, guidance=2.0, size=size), rows_per_unit=3),
        teacher=v_teacher,
        captions=CAPTIONS,
        source="captions",
        url=str(tmp_path / "pairs"),
        run=in_process,
    )
    rows = pairs.read()
    assert array_type(rows.schema.field("latent")).shape == (4, size // 2, size // 2)
    assert from_png(rows["image"][0].as_py()).shape == (size, size, 3)
    found = verify_table(pairs, recompute=remake_pairs(pairs, teacher=v_teacher), units=1, seed=0)
    assert (found.exact, found.faults) == (1, ())


def test_sizes_that_a_model_cannot_generate_are_refused(v_teacher, tmp_path):
    common = {"captions": CAPTIONS, "source": "captions", "url": str(tmp_path / "x"), "run": in_process}
    with pytest.raises(SettingsError, match=r"^pairs\.generation\.size is 18; multiples of 4"):
        generate_pairs(PairsSettings(generation=Generation(size=18)), teacher=v_teacher, **common)
    for size, reason in ((18, "multiples of 4"), (24, ".*32 px")):
        samples = SamplesSettings(drawing=SamplingSettings(size=size))
        with pytest.raises(SettingsError, match=rf"^samples\.drawing\.size is {size}; {reason}"):
            generate_samples(samples, model=v_teacher, sampler=Sampler(steps=2), guidance=[1.0], **common)


def test_an_image_of_another_size(tmp_path, capsys):
    path = tmp_path / "image.png"
    words = ["a red circle", "--steps", "1", "--out", str(path)]
    assert generate.main([*words, "--size", "48"]) == 0
    assert "1 of 48 px" in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.size == (240, 240)
    assert generate.main([*words, "--size", "40"]) == 2
    assert "--size is 40; multiples of 16 are accepted" in capsys.readouterr().err


def test_a_bundle_accepts_no_size(tmp_path, capsys):
    assert generate.main(["a", "--bundle", str(tmp_path), "--size", "48"]) == 2
    assert "--size 48: a --bundle has its own" in capsys.readouterr().err


def test_the_miniature_halves_evenly_at_multiples_of_16():
    bundle = load("mini")
    assert (bundle.granularity, bundle.cell, bundle.image_size) == (16, 4, 32)
    for size in itertools.chain(range(1, 16), (24, 40)):
        with pytest.raises(ValueError, match="multiple of 16"):
            bundle.resize(size)
