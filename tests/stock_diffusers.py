"""Generates images of a saved model with diffusers alone: a program for environments without this package.

    python stock_diffusers.py FOLDER INPUTS.npz OUTPUTS.npz [--trust] [--lora FILE --scale S]

INPUTS has `captions`, `noise` [B,C,h,w], `steps` and `w`; OUTPUTS gets `latents` and `images`, in [0, 1].
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("folder", "inputs", "outputs"):
        parser.add_argument(name)
    parser.add_argument("--trust", action="store_true")
    parser.add_argument("--lora")
    parser.add_argument("--scale", type=float)
    args = parser.parse_args()
    # Where this package is installed it must not help.
    sys.modules.update(dict.fromkeys(("snapfusion", "pipelines", "jobs")))
    options = {"trust_remote_code": True} if args.trust else {}
    pipeline = StableDiffusionPipeline.from_pretrained(args.folder, torch_dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    inputs = np.load(args.inputs)
    call = {"prompt": inputs["captions"].tolist(), "latents": torch.from_numpy(inputs["noise"])}
    call |= {"num_inference_steps": int(inputs["steps"]), "guidance_scale": float(inputs["w"])}
    if args.lora:
        # Without a name, diffusers 0.36 asks a hub.
        pipeline.load_lora_weights(str(Path(args.lora).parent), weight_name=Path(args.lora).name)
        call["cross_attention_kwargs"] = {"scale": args.scale}
    latents = pipeline(**call, output_type="latent").images
    images = pipeline(**call, output_type="np").images
    np.savez(args.outputs, latents=latents.numpy(), images=images)


if __name__ == "__main__":
    main()
