"""Text to image with the ONNX models of a bundle. README.md explains it.

python text_to_image.py BUNDLE "a caption" image.png [SEED]

Needs numpy, onnxruntime, tokenizers and pillow.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

Module = Mapping[str, Any]
"""A module's entry in the manifest."""

Noise = Callable[[], np.ndarray]
"""Gives unit Gaussian noise [1,4,h,w] float32, other numbers at each call."""


def run(folder: Path, module: Module, calls: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """Open a model, run it once for each set of inputs, and close it; returns the first outputs."""
    session = onnxruntime.InferenceSession(folder / module["files"][0], providers=["CPUExecutionProvider"])
    return [session.run(None, dict(inputs))[0] for inputs in calls]


def fit_tokens(ids: Sequence[int], *, empty: Sequence[int]) -> list[int]:
    """Token ids padded or truncated for the text encoder.

    Args:
        ids: of the tokenizer, whether it truncates and pads or not.
        empty: of the empty caption in vectors.json: start, end, then padding.
    """
    _, end, *_, padding = empty
    if len(ids) > len(empty):
        return [*ids[: len(empty) - 1], end]
    return [*ids, *[padding] * (len(empty) - len(ids))]


def encode(folder: Path, module: Module, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The condition c of each row of token ids."""
    inputs = [{"token_ids": np.array([row], np.int32)} for row in rows]
    return np.concatenate(run(folder, module, inputs))


def advance(z: np.ndarray, *, outputs: np.ndarray, w: float, step: Mapping[str, float]) -> np.ndarray:
    """The latent after a step. SnapFusion Eq. 2, 3."""
    uncond, cond = outputs[:1], outputs[1:]
    output = np.float32(w) * cond - np.float32(w - 1) * uncond
    return np.float32(step["from_z"]) * z + np.float32(step["from_output"]) * output


def renoise(z: np.ndarray, *, fresh: np.ndarray, step: Mapping[str, float]) -> np.ndarray:
    """The latent with the fresh noise that a step of the consistency sampler adds."""
    return z + np.float32(step["from_noise"]) * fresh


def denoise(
    folder: Path, manifest: Mapping[str, Any], module: Module, *, c: np.ndarray, noise: Noise
) -> np.ndarray:
    """The latent [1,4,h,w] after all steps."""
    sampler = json.loads((folder / "sampler.json").read_text())
    path = folder / module["files"][0]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    z = noise()
    for step in sampler["steps"]:
        t = np.array([step["t"]], np.float32)
        # One call with both conditions, or one call for each.
        parts = np.split(c, 2 // manifest["conditions"])
        outputs = np.concatenate([session.run(None, {"z_t": z, "t": t, "c": part})[0] for part in parts])
        z = advance(z, outputs=outputs, w=sampler["guidance"], step=step)
        if step.get("from_noise"):
            z = renoise(z, fresh=noise(), step=step)
    return z


def pixels(image: np.ndarray) -> np.ndarray:
    """An image [1,3,H,W] in 0 .. 1 as uint8 [H,W,3]."""
    return np.rint(255 * image[0].transpose(1, 2, 0)).clip(0, 255).astype(np.uint8)


def generate(folder: Path, rows: Sequence[Sequence[int]], *, noise: Noise, variant: str) -> np.ndarray:
    """The image [1,3,H,W] of token ids: the empty caption's, then the caption's."""
    manifest = json.loads((folder / "manifest.json").read_text())
    modules = manifest["variants"][variant]["modules"]
    c = encode(folder, modules["text_encoder"], rows)
    latent = denoise(folder, manifest, modules["unet"], c=c, noise=noise)
    (image,) = run(folder, modules["decoder"], [{"latent": latent}])
    return image


def main(bundle: str, caption: str, out: str, seed: str = "0") -> None:
    """Write the image of a caption."""
    folder = Path(bundle)
    manifest = json.loads((folder / "manifest.json").read_text())
    empty = json.loads((folder / "vectors" / "vectors.json").read_text())["token_ids"][""]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    rows = [empty, fit_tokens(tokenizer.encode(caption).ids, empty=empty)]
    random, shape = np.random.default_rng(int(seed)), (1, *manifest["latent_shape"])
    noise = partial(random.standard_normal, shape, np.float32)
    image = generate(folder, rows, noise=noise, variant="onnx")
    Image.fromarray(pixels(image)).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
