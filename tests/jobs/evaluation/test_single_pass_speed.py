"""Time of bundles of one pass a step, beside two conditions: ExecuTorch, one thread, in turns.

pytest -m slow --capture=no tests/jobs/evaluation/test_single_pass_speed.py
"""

import time
from statistics import median

import pytest
import torch
from torch import nn

from jobs.training.mobile_bundle import publish_bundle
from snapfusion.export.bundle import open_bundle
from snapfusion.export.executorch import set_num_threads
from snapfusion.export.loop import encode_text, sampling_steps
from snapfusion.export.sampler_coefficients import SamplerCoefficients
from snapfusion.export.settings import Licence, MobileSettings
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.sampling import time_grid
from snapfusion.schedule import Schedule

TURNS, W = 60, 4.0
LIMITS = {"UNet": 0.68, "image": 0.72, "image of 2 steps": 0.45}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def publish(path, *, w_conditioned):
    """A bundle of the miniature with its half-width decoder; its weights do not matter for its time."""
    bundle = load("mini-v")
    decoder = HalfDecoder.from_vae(bundle.vae)
    if w_conditioned:
        bundle.unet = with_guidance_embedding(bundle.unet)
        torch.manual_seed(0)
        nn.init.normal_(bundle.unet.time_embedding.cond_proj.weight, std=0.01)
        bundle.distillation = {"steps": 4, "cfg_range": {"low": 1.0, "high": 6.0}}
    settings = MobileSettings(
        executorch=("float32",),
        coreml=(),
        guidance=W,
        steps=4,
        captions=("a large red circle at the top on a white background",),
        licence=Licence(weights="Apache-2.0", data="CC0-1.0"),
    )
    parents = {"model": {"source": "mini-v", "settings_hash": None}, "decoder": None}
    publish_bundle(settings, bundle=bundle, decoder=decoder, parents=parents, out_url=str(path))
    return open_bundle(path)


class Drawing:
    """The image of a bundle's test vectors, with the CPU seconds of its UNet and of all of it."""

    def __init__(self, bundle, *, sampler=None):
        self.sampler, self.arrays = sampler or bundle.sampler, bundle.vectors.arrays
        self.programs = bundle.programs("executorch")
        self.unet, self.image = [], []

    def __call__(self):
        began, sampler = time.process_time(), self.sampler
        c = encode_text(self.programs, ids=self.arrays["token_ids"])
        before = time.process_time()
        drawing = {"noise": self.arrays["noise"], "sampler": sampler, "w": sampler.guidance}
        *_, last = sampling_steps(self.programs, c=c, **drawing)
        after = time.process_time()
        self.programs.decoder([last.z_next])
        self.unet.append(after - before)
        self.image.append(time.process_time() - began)


def test_one_pass_a_step_saves_its_share(tmp_path, capsys):
    with_two = publish(tmp_path / "two", w_conditioned=False)
    with_one = publish(tmp_path / "one", w_conditioned=True)
    few = SamplerCoefficients.of(
        Schedule(), grid=time_grid(2), prediction_type="v_prediction", guidance=with_one.sampler.guidance
    )
    set_num_threads(1)
    drawings = {
        "two conditions": Drawing(with_two),
        "one pass": Drawing(with_one),
        "one pass, 2 steps": Drawing(with_one, sampler=few),
    }
    for _ in range(TURNS):
        for drawing in drawings.values():
            drawing()
    two, one, few = drawings.values()
    found = {
        "UNet": median(one.unet) / median(two.unet),
        "image": median(one.image) / median(two.image),
        "image of 2 steps": median(few.image) / median(two.image),
    }
    with capsys.disabled():
        for name, drawing in drawings.items():
            times = f"UNet {1e3 * median(drawing.unet):.2f}, image {1e3 * median(drawing.image):.2f}"
            print(f"\n{name}: CPU ms, median of {TURNS}: {times}", end="")
        print("\n" + ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items()))
    assert all(found[name] <= limit for name, limit in LIMITS.items())
