"""Losses without groups of blocks: the groups, denoising, and the comparison of two models."""

import copy
import dataclasses

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
from snapfusion.mini.settings import ROBUSTNESS_BATCH, RobustnessSettings
from snapfusion.models.blocks import blocks_of
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of, build_unet, inherit_weights
from snapfusion.settings import SettingsError

FEW = RobustnessSettings(scenes=2 * ROBUSTNESS_BATCH, seeds=(0,), steps=1)
IDLE = "resnet down"


@pytest.fixture(scope="module")
def plain():
    return load("mini-v")


def changed(bundle, unet) -> Bundle:
    """The bundle with another UNet."""
    return dataclasses.replace(bundle, unet=unet, source="changed")


def pruned(bundle, block) -> Bundle:
    """The bundle without one block."""
    unet = build_unet(architecture_of(bundle.unet).without(block))
    inherit_weights(unet, bundle.unet)
    return changed(bundle, unet)


@pytest.fixture(scope="module")
def idle(plain):
    """The model with one group of blocks that add zero to their input."""
    unet = copy.deepcopy(plain.unet)
    for name in groups_of(plain)[IDLE]:
        block = unet.get_submodule(name)
        last = block.conv2 if isinstance(block, ResnetBlock2D) else block.proj_out
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return changed(plain, unet)


@pytest.fixture(scope="module")
def results(plain, idle):
    parts = measured({"plain": plain, "robust": idle})
    return RobustnessResults(of=parts, groups=tuple(groups_of(plain)), seeds=FEW.seeds)


def measured(models, **options):
    """The metrics of each part by its name."""
    parts = {}

    def on_result(part, metrics):
        parts[str(part)] = metrics

    measure_robustness(FEW, models=models, oracle=load_oracle(), on_result=on_result, **options)
    return parts


def test_every_block_is_in_one_group(plain):
    groups = groups_of(plain)
    sides = ("down", "middle", "up")
    assert list(groups) == [f"{kind} {side}" for kind in ("attention", "resnet") for side in sides]
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(block.name for block in blocks_of(plain.unet))
    assert groups["attention middle"] == ("mid_block.attentions.0",)
    assert all(name.startswith("up_blocks.") and ".resnets." in name for name in groups["resnet up"])


def test_empty_groups_are_left_out(plain):
    groups = groups_of(pruned(plain, "mid_block.attentions.0"))
    assert list(groups) == [group for group in groups_of(plain) if group != "attention middle"]


@pytest.mark.parametrize(
    ("noised_to", "steps", "times"),
    [
        (249, 16, (249, 187, 124, 61, -1)),
        (249, 8, (249, 124, -1)),
        (200, 8, (200, 124, -1)),
        (50, 8, (50, -1)),
    ],
)
def test_denoising_begins_at_t_and_follows_the_grid(noised_to, steps, times):
    assert denoising_times(noised_to, steps=steps, schedule_steps=1000) == times


@pytest.mark.slow
def test_an_idle_group_equals_a_skipped_one(results):
    """To the bit, in generated and in denoised images."""
    for metric in METRIC_NAMES:
        assert results.lost(metric, group=IDLE).robust == (0, 0, 0)
        assert results.of[f"robust 0 {WHOLE}"][metric] == results.of[f"plain 0 {IDLE}"][metric]
    assert results.lost("detail", group=IDLE).plain.value > 3


@pytest.mark.slow
def test_the_miniatures_blocks_matter_for_both_metrics(results):
    """At one step only the middle reads captions; the upper ResNet blocks carry the image."""
    assert results.value("attributes", model="plain", group=WHOLE).value > 0.8
    assert results.value("detail", model="plain", group=WHOLE).value > 30
    assert results.lost("attributes", group="attention middle").plain.low > 0.2
    assert results.lost("detail", group="resnet up").plain.low > 10


@pytest.mark.slow
def test_known_parts_are_not_measured_again(results, plain, idle):
    models, missing = {"plain": plain, "robust": idle}, "robust 0 attention up"
    assert set(results.of) == {str(part) for part in robustness_parts(FEW, models)}
    assert measured(models, known=set(results.of) - {missing}) == {missing: results.of[missing]}


def test_each_seed_has_its_own_scenes_and_noise(plain):
    first, second = (next(noised_batches(plain, FEW, seed=seed)) for seed in (0, 1))
    assert first.indexes == list(range(HELD_OUT, HELD_OUT + ROBUSTNESS_BATCH))
    assert second.indexes[0] == HELD_OUT + FEW.scenes
    assert torch.equal(next(noised_batches(plain, FEW, seed=0)).z_t, first.z_t)
    alpha = plain.schedule.alpha(torch.tensor(FEW.noised_to))
    eps, other = (batch.z_t - alpha * plain.encode_images(batch.decoded) for batch in (first, second))
    assert not torch.allclose(eps, other, atol=0.1)


def test_less_noise_hides_less_detail(plain):
    means = []
    for t in (61, 249, 749):
        settings = FEW.model_copy(update={"noised_to": t, "steps": 8})
        batch = next(noised_batches(plain, settings, seed=0))
        means.append(float(image_psnr(denoise(plain, batch, settings=settings), batch.decoded).mean()))
    assert means[0] > means[1] + 3 > means[2] + 6


def synthetic() -> RobustnessResults:
    """Two batches: plain loses 2 and 4 without `a`, 0 and 2 without `b`; robust half of that."""
    plain = {WHOLE: (10.0, 20.0), "a": (8.0, 16.0), "b": (10.0, 18.0)}
    robust = {WHOLE: (10.0, 20.0), "a": (9.0, 18.0), "b": (10.0, 19.0)}
    of = {
        f"{model} {seed} {group}": {"attributes": means, "detail": means}
        for model, groups in (("plain", plain), ("robust", robust))
        for group, means in groups.items()
        for seed in (0, 5)
    }
    return RobustnessResults(of=of, groups=("a", "b"), seeds=(0, 5))


def test_mean_losses_have_a_paired_ratio():
    lost = synthetic().lost_on_average("detail")
    assert (lost.plain.value, lost.robust.value) == (2.0, 1.0)
    # Robust loses half of plain's loss in every batch, so the ratio is certain.
    assert lost.ratio == pytest.approx((0.5, 0.5, 0.5))
    assert lost.plain.low < 2.0 < lost.plain.high
    by_group = synthetic().lost("attributes", group="a")
    assert (by_group.plain.value, by_group.robust.value) == (3.0, 1.5)


def test_the_cost_of_robust_training_can_be_included():
    results = synthetic()
    for part, metrics in results.of.items():
        if part.startswith("robust"):
            results.of[part] = {**metrics, "detail": tuple(mean - 1.0 for mean in metrics["detail"])}
    assert results.lost_on_average("detail").robust.value == 1.0
    below = results.below_plain("detail")
    assert (below.plain.value, below.robust.value) == (2.0, 2.0)
    assert results.below_plain("attributes").ratio == pytest.approx((0.5, 0.5, 0.5))


def test_an_insignificant_loss_has_no_ratio():
    assert synthetic().lost("attributes", group="b").ratio is None


def test_models_with_different_blocks_are_refused(plain):
    block = "up_blocks.1.attentions.2"
    other = pruned(plain, block)
    with pytest.raises(RobustnessError, match=rf"plain has the block {block}, robust has not"):
        check_comparable({"plain": plain, "robust": other})
    with pytest.raises(RobustnessError, match=rf"robust has the block {block}, plain has not"):
        check_comparable({"plain": other, "robust": plain})


def test_models_with_different_vaes_are_refused(plain):
    other = changed(plain, plain.unet)
    other.vae = copy.deepcopy(plain.vae)
    nn.init.zeros_(other.vae.decoder.conv_out.bias)
    with pytest.raises(RobustnessError, match="different weights in vae"):
        check_comparable({"plain": plain, "robust": other})


def test_models_of_another_size_are_refused():
    tiny = tiny_bundle()
    with pytest.raises(RobustnessError, match=r"plain: .* 16 px"):
        check_comparable({"plain": tiny, "robust": tiny})


def test_non_finite_weights_are_refused(plain):
    unet = copy.deepcopy(plain.unet)
    nn.init.constant_(unet.conv_out.bias, torch.nan)
    with pytest.raises(RobustnessError, match="changed gives latents that are not finite"):
        measured({"plain": changed(plain, unet), "robust": plain})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("scenes=60", "multiple of 25"),
        ("scenes=25", "greater than or equal to 50"),
        ("seeds=[0,1,0]", "twice"),
        ("seeds=[-1]", "greater than or equal to 0"),
        ("noised_to=1000", "less than or equal to 999"),
    ],
)
def test_settings_out_of_range_are_refused(assignment, message):
    with pytest.raises(SettingsError, match=message):
        RobustnessSettings().with_values([assignment])
