"""What a model loses without groups of its blocks: the groups, the way back from noise, the comparison."""

import copy

import pytest
import torch
from conftest import tiny_bundle
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from snapfusion.mini.measure import image_psnr
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.robustness import (
    METRIC_NAMES,
    WHOLE,
    RobustnessError,
    RobustnessPart,
    RobustnessResults,
    check_comparable,
    denoise,
    denoising_times,
    groups_of,
    measure_robustness,
    noised_batches,
    robustness_parts,
)
from snapfusion.mini.scenes import HELD_OUT
from snapfusion.mini.settings import BATCH, RobustnessSettings
from snapfusion.models.blocks import blocks_of
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of, build_unet, inherit_weights
from snapfusion.settings import SettingsError

FEW = RobustnessSettings(scenes=2 * BATCH, seeds=(0,), steps=1)
IDLE = "resnet down"


@pytest.fixture(scope="module")
def plain():
    return load("mini-v")


def changed(bundle, unet) -> Bundle:
    return Bundle(
        tokenizer=bundle.tokenizer,
        text_encoder=bundle.text_encoder,
        unet=unet,
        vae=bundle.vae,
        schedule=bundle.schedule,
        prediction_type=bundle.prediction_type,
        source="changed",
    )


@pytest.fixture(scope="module")
def idle(plain):
    """The model with one group of blocks that add nothing to what they are given."""
    unet = copy.deepcopy(plain.unet)
    for name in groups_of(plain)[IDLE]:
        block = unet.get_submodule(name)
        last = block.conv2 if isinstance(block, ResnetBlock2D) else block.proj_out
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return changed(plain, unet)


@pytest.fixture(scope="module")
def readings(plain, idle):
    found = {}
    measure_robustness(
        FEW,
        models={"plain": plain, "robust": idle},
        oracle=load_oracle(),
        gather=lambda part, reading: found.update({str(part): reading}),
    )
    return RobustnessResults(of=found, groups=tuple(groups_of(plain)), seeds=FEW.seeds)


def test_every_block_is_in_one_group(plain):
    groups = groups_of(plain)
    assert list(groups) == [
        f"{kind} {side}" for kind in ("attention", "resnet") for side in ("down", "middle", "up")
    ]
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(block.name for block in blocks_of(plain.unet))
    assert groups["attention middle"] == ("mid_block.attentions.0",)
    assert all(name.startswith("up_blocks.") and ".resnets." in name for name in groups["resnet up"])


def test_a_group_that_a_unet_has_not_is_left_out(plain):
    unet = build_unet(architecture_of(plain.unet).without("mid_block.attentions.0"))
    inherit_weights(unet, plain.unet)
    assert list(groups_of(changed(plain, unet))) == [
        group for group in groups_of(plain) if group != "attention middle"
    ]


def test_the_way_back_begins_at_t_and_keeps_to_the_grid():
    assert denoising_times(249, steps=16, schedule_steps=1000) == (249, 187, 124, 61, -1)
    assert denoising_times(249, steps=8, schedule_steps=1000) == (249, 124, -1)
    assert denoising_times(200, steps=8, schedule_steps=1000) == (200, 124, -1)
    assert denoising_times(50, steps=8, schedule_steps=1000) == (50, -1)


def test_what_a_group_that_does_nothing_is_worth_is_nothing(readings):
    """And to be without the group is to have it idle: to the bit, drawn and brought back."""
    for figure in METRIC_NAMES:
        lost = readings.lost(figure, group=IDLE)
        assert lost.robust == (0, 0, 0)
        without_it = readings.of[str(RobustnessPart(model="plain", seed=0, group=IDLE))][figure]
        assert readings.of[str(RobustnessPart(model="robust", seed=0, group=WHOLE))][figure] == without_it
    assert readings.lost("detail", group=IDLE).plain.value > 3


def test_blocks_of_the_miniature_carry_both_figures(readings):
    """The middle alone reads captions at one step; what comes up through the ResNet blocks is the picture."""
    assert readings.value("attributes", model="plain", group=WHOLE).value > 0.8
    assert readings.value("detail", model="plain", group=WHOLE).value > 30
    assert readings.lost("attributes", group="attention middle").plain.low > 0.2
    assert readings.lost("detail", group="resnet up").plain.low > 10


def test_nothing_is_measured_twice(readings, plain, idle):
    models = {"plain": plain, "robust": idle}
    assert set(readings.of) == {str(part) for part in robustness_parts(FEW, models)}
    again = []
    missing = str(RobustnessPart(model="robust", seed=0, group="attention up"))
    measure_robustness(
        FEW,
        models=models,
        oracle=load_oracle(),
        gather=lambda part, reading: again.append((str(part), reading)),
        known=set(readings.of) - {missing},
    )
    assert again == [(missing, readings.of[missing])]


def test_a_seed_has_scenes_and_noise_of_its_own(plain):
    first, second = (next(noised_batches(plain, FEW, seed=seed)) for seed in (0, 1))
    assert first.indexes == range(HELD_OUT, HELD_OUT + BATCH)
    assert second.indexes.start == HELD_OUT + FEW.scenes
    same = next(noised_batches(plain, FEW, seed=0))
    assert torch.equal(same.z_t, first.z_t)
    eps, other = (
        (scenes.z_t - alpha * plain.encode_images(scenes.decoded))
        for scenes in (first, second)
        for alpha in [plain.schedule.alpha(torch.tensor(FEW.noised_to))]
    )
    assert not torch.allclose(eps, other, atol=0.1)


def test_less_noise_hides_less(plain):
    means = []
    for t in (61, 249, 749):
        settings = FEW.model_copy(update={"noised_to": t, "steps": 8})
        scenes = next(noised_batches(plain, settings, seed=0))
        means.append(float(image_psnr(denoise(plain, scenes, settings=settings), scenes.decoded).mean()))
    assert means[0] > means[1] + 3 > means[2] + 6


def synthetic() -> RobustnessResults:
    """Two batches: plain loses 2 and 4 without `a`, 0 and 2 without `b`; robust half of that."""
    of = {}
    for model, a, b in (
        ("plain", (8.0, 16.0), (10.0, 18.0)),
        ("robust", (9.0, 18.0), (10.0, 19.0)),
    ):
        for group, means in ((WHOLE, (10.0, 20.0)), ("a", a), ("b", b)):
            reading = {"attributes": means, "detail": means}
            of[str(RobustnessPart(model=model, seed=0, group=group))] = reading
            of[str(RobustnessPart(model=model, seed=5, group=group))] = reading
    return RobustnessResults(of=of, groups=("a", "b"), seeds=(0, 5))


def test_losses_are_means_over_groups_and_their_ratio_is_paired():
    lost = synthetic().lost_on_average("detail")
    assert lost.plain.value == 2.0
    assert lost.robust.value == 1.0
    # Robust loses half of plain's loss in every batch, so nothing is uncertain about the ratio.
    assert lost.ratio == pytest.approx((0.5, 0.5, 0.5))
    assert lost.plain.low < 2.0 < lost.plain.high
    by_group = synthetic().lost("attributes", group="a")
    assert (by_group.plain.value, by_group.robust.value) == (3.0, 1.5)


def test_what_robust_training_takes_from_the_whole_can_be_counted_in():
    readings = synthetic()
    for seed in (0, 5):
        for group in (WHOLE, "a", "b"):
            part = str(RobustnessPart(model="robust", seed=seed, group=group))
            lower = tuple(mean - 1.0 for mean in readings.of[part]["detail"])
            readings.of[part] = {**readings.of[part], "detail": lower}
    assert readings.lost_on_average("detail").robust.value == 1.0
    assert readings.below_plain("detail").plain.value == 2.0
    assert readings.below_plain("detail").robust.value == 2.0
    assert readings.below_plain("attributes").ratio == pytest.approx((0.5, 0.5, 0.5))


def test_a_loss_that_may_be_none_has_no_ratio():
    assert synthetic().lost("attributes", group="b").ratio is None


def test_models_of_other_blocks_are_named(plain):
    unet = build_unet(architecture_of(plain.unet).without("up_blocks.1.attentions.2"))
    inherit_weights(unet, plain.unet)
    other = changed(plain, unet)
    with pytest.raises(
        RobustnessError, match=r"plain has the block up_blocks\.1\.attentions\.2, robust has not"
    ):
        check_comparable({"plain": plain, "robust": other})
    with pytest.raises(
        RobustnessError, match=r"robust has the block up_blocks\.1\.attentions\.2, plain has not"
    ):
        check_comparable({"plain": other, "robust": plain})


def test_models_of_other_decoders_are_named(plain):
    other = changed(plain, plain.unet)
    other.vae = copy.deepcopy(plain.vae)
    nn.init.zeros_(other.vae.decoder.conv_out.bias)
    with pytest.raises(RobustnessError, match="different weights in vae"):
        check_comparable({"plain": plain, "robust": other})


def test_what_is_no_miniature_is_named():
    tiny = tiny_bundle()
    with pytest.raises(RobustnessError, match=r"plain: .* draws pictures of 16 px"):
        check_comparable({"plain": tiny, "robust": tiny})


def test_weights_that_give_no_numbers_are_named(plain):
    unet = copy.deepcopy(plain.unet)
    nn.init.constant_(unet.conv_out.bias, torch.nan)
    broken = changed(plain, unet)
    with pytest.raises(RobustnessError, match="changed gives latents that are no numbers"):
        measure_robustness(
            FEW, models={"plain": broken, "robust": plain}, oracle=load_oracle(), gather=lambda *_: None
        )


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("scenes=60", "multiple of 25"),
        ("scenes=25", "greater than or equal to 50"),
        ("seeds=[0,1,0]", "twice"),
        ("seeds=[-1]", "greater than or equal to 0"),
        ("noised_to=1000", "less than or equal to 999"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(assignment, words):
    with pytest.raises(SettingsError, match=words):
        RobustnessSettings().with_values([assignment])
