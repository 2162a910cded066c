"""An adapter of a few steps in another fine-tune of its base: paired differences with and without it.

pytest -m slow --capture=no tests/snapfusion/training/test_lora_transfer.py
"""

import itertools

import pytest
import torch

from snapfusion.metrics.clip import load_scorer
from snapfusion.metrics.intervals import mean
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.scenes import captioned_image, held_out_index, scene_of
from snapfusion.mini.weights import WEIGHTS
from snapfusion.models.bundle import to_uint8
from snapfusion.models.load import load
from snapfusion.models.lora import merge_matrices
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import OnlineTargets
from snapfusion.training.loop import new_state, train
from snapfusion.training.lora import LoraUNet, lora_weights
from snapfusion.training.pcm import PcmObjective
from snapfusion.training.settings import CfgRange, LoopSettings, LoraSettings, PcmSettings, VelocitySettings
from snapfusion.training.velocity import VelocityObjective

ROWS, POOL, CAPTIONS = 32, 512, 128
TUNING = LoopSettings(num_steps=150, global_batch=ROWS, learning_rate=3e-4, warmup_steps=10)
DISTILLING = LoopSettings(
    num_steps=250, global_batch=ROWS, learning_rate=1e-3, warmup_steps=10, ema_decay=0.98
)
PCM = PcmSettings(phases=4, cfg_range=CfgRange(low=2.0, high=4.0))
TINT = torch.tensor([1.0, 0.75, 0.5]).view(3, 1, 1)
"""Of the images of the other fine-tune."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def batches(bundle, *, tint=None):
    """Batches of training scenes, without end; with images of another tint."""
    pairs = [captioned_image(index) for index in range(POOL)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in pairs])
    images = images if tint is None else (images * tint).round().to(torch.uint8)
    latents, ids = bundle.encode_images(images).clone(), bundle.tokenize([text for _, text in pairs])
    for step in itertools.count():
        rows = [(step * ROWS + row) % POOL for row in range(ROWS)]
        columns = {"latent": latents[rows], "token_ids": ids[rows]}
        yield Batch(ids=tuple(map(str, rows)), columns=columns)


def tuned():
    """A fine-tune of the miniature: its scenes in another tint."""
    bundle = load("mini-v")
    bundle.unet.requires_grad_(requires_grad=True)
    objective = VelocityObjective(
        VelocitySettings(), captions=CaptionEncoder(bundle), schedule=bundle.schedule, seed=0
    )
    train(
        new_state(bundle.unet, settings=TUNING),
        objective=objective,
        batches=batches(bundle, tint=TINT),
        settings=TUNING,
        micro_batch=ROWS,
    )
    return bundle


def adapter():
    """A LoRA that was distilled in the miniature itself, by PCM of four phases."""
    teacher, student = load("mini-v"), load("mini-v")
    online = OnlineTargets(teacher, captions=CaptionEncoder(teacher), settings=PCM.targets, seed=0)
    state = new_state(LoraUNet(student.unet, LoraSettings(rank=16), seed=0), settings=DISTILLING)
    train(
        state,
        objective=PcmObjective(PCM, targets=online, schedule=teacher.schedule),
        batches=batches(teacher),
        settings=DISTILLING,
        micro_batch=ROWS,
    )
    return lora_weights(state.final_weights())


def draw(bundle, captions, *, steps, w):
    """An image of each caption, uint8 [B,3,32,32], from the same noise for every model."""
    images = []
    for start in range(0, len(captions), 64):
        texts = captions[start : start + 64]
        noise = gaussian_batch([noise_key("transfer", text) for text in texts], bundle.latent_shape)
        with torch.inference_mode():
            c = bundle.encode_text(bundle.tokenize(texts))
            grid = time_grid(steps)
            latents = sample(bundle.denoiser(c, w=w), noise, grid=grid, schedule=bundle.schedule)
            images.append(to_uint8(bundle.decode(latents)))
    return torch.cat(images)


def test_adapter_helps_another_fine_tune(capsys):
    other, lora = tuned(), adapter()
    scenes = [scene_of(held_out_index(position, split=None)) for position in range(CAPTIONS)]
    captions = [captioned_image(held_out_index(position, split=None))[1] for position in range(CAPTIONS)]
    generated = {"50 steps, w = 3": draw(other, captions, steps=50, w=3.0)}
    for w in (1.0, 3.0):
        generated[f"4 steps, w = {w:g}"] = draw(other, captions, steps=4, w=w)
    merge_matrices(other.unet, lora)
    generated["4 steps with the adapter, w = 1"] = draw(other, captions, steps=4, w=1.0)
    scorer, oracle = load_scorer(WEIGHTS / "scorer"), load_oracle()
    reference = generated["50 steps, w = 3"].float()
    clip = {name: scorer.score(images, captions).double().numpy() for name, images in generated.items()}
    right = {
        name: oracle.score(images, scenes).double().mean(dim=1).numpy() for name, images in generated.items()
    }
    error = {
        name: (images.float() - reference).square().mean(dim=(1, 2, 3)).sqrt().double().numpy()
        for name, images in generated.items()
    }
    *others, name = generated
    lines = []
    for metric, values in (("CLIP", clip), ("attributes", right), ("RMSE to 50 steps", error)):
        lines += [f"{metric}: " + ", ".join(f"{each} {values[each].mean():.3f}" for each in generated)]
        lines += [f"  with the adapter minus {each}: {_text(values[name] - values[each])}" for each in others]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    # As many passes; guided steps take two each.
    plain = "4 steps, w = 1"
    assert mean(error[name] - error[plain]).high < 0.0
    assert mean(clip[name] - clip[plain]).low > 0.0
    assert mean(right[name] - right[plain]).low > 0.0


def _text(differences):
    found = mean(differences)
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
