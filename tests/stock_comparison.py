"""Images of a saved model: by this package, and by diffusers in a process that cannot import this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.unet import architecture_of, build_unet, inherit_weights
from snapfusion.noise import gaussian_batch
from snapfusion.sampling import sample, time_grid

PROGRAM = Path(__file__).with_name("stock_diffusers.py")
CAPTIONS = ["a large red circle at the top on a white background", "blue"]
SEEDS = [1, 2]
STEPS, GUIDANCE = 4, 4.0
TOLERANCE = 1e-4
"""For float32 sums in another order over all steps."""

Generated = tuple[np.ndarray, np.ndarray]
"""Latents [B,C,h,w], and images [B,H,W,3] in [0, 1]."""


def save_table_3_student(folder: Path) -> None:
    """Save a miniature with Table 3's UNet, in the dtype of trainings."""
    bundle = load("mini-v")
    unet = build_unet(efficient_architecture(architecture_of(bundle.unet)))
    inherit_weights(unet, bundle.unet)
    bundle.unet = unet.eval()
    save(bundle, folder, distillation={"steps": STEPS})


@torch.inference_mode()
def generate_here(source: str | Path) -> Generated:
    """Generate with this package."""
    bundle = load(str(source))
    c = bundle.encode_text(bundle.tokenize(CAPTIONS))
    z_t = gaussian_batch(SEEDS, bundle.latent_shape)
    latents = sample(bundle.denoiser(c, w=GUIDANCE), z_t, grid=time_grid(STEPS), schedule=bundle.schedule)
    return latents.numpy(), (bundle.decode(latents) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def generate_in_diffusers(
    folder: Path, *options: str, scratch: Path, python: str | Path = sys.executable
) -> Generated:
    """Generate the same with `stock_diffusers.py`, which `options` are for."""
    noise = gaussian_batch(SEEDS, load(str(folder)).latent_shape)
    inputs = {"captions": CAPTIONS, "noise": noise.numpy(), "steps": STEPS, "w": GUIDANCE}
    np.savez(scratch / "inputs.npz", **inputs)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(scratch / "modules")
    command = [str(python), "-P", str(PROGRAM), str(folder), "inputs.npz", "outputs.npz", *options]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs = np.load(scratch / "outputs.npz")
    return outputs["latents"], outputs["images"]


def assert_equal(given: Generated, expected: Generated) -> None:
    """Latents and images are equal but for rounding, and the images show something."""
    assert expected[1].std() > 0.05
    for actual, desired in zip(given, expected, strict=True):
        np.testing.assert_allclose(actual, desired, atol=TOLERANCE)
