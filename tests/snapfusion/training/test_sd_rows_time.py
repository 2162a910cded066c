"""Time of a step on rows of SD's size, with draws made beforehand and not, beside a bare loop, in turns.

pytest -m slow --capture=no tests/snapfusion/training/test_sd_rows_time.py

The network is as small as it can be, so that a row takes about as long as SD-v1.5's on a fast device, and
what is left on the main thread weighs as much as there.
"""

import copy
import itertools
import time
from statistics import median, quantiles

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.utils import clip_grad_norm_

from pipelines.loading.prefetch import Prefetcher
from snapfusion.models.load import load
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.loop import new_state, train
from snapfusion.training.row_draws import draw_rows
from snapfusion.training.settings import LoopSettings, VelocitySettings
from snapfusion.training.velocity import VelocityObjective

ROWS, TURNS, LEAST = 8, 60, 0.95
LOOP = LoopSettings(num_steps=1, global_batch=ROWS, learning_rate=1e-5, ema_decay=0.99)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def small_unet(width):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(8, 16),
        layers_per_block=1,
        mid_block_type=None,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        norm_num_groups=4,
    )
    return unet.train()


class BareLoop:
    """Eq. 6 written out, with noise of torch's own generator."""

    def __init__(self, model, *, bundle, latent, token_ids):
        self.model, self.bundle, self.latent, self.token_ids = model, bundle, latent, token_ids
        self.average = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        t = torch.randint(self.bundle.schedule.num_steps, (ROWS,))
        alpha, sigma = self.bundle.schedule.alpha(t), self.bundle.schedule.sigma(t)
        eps = torch.randn_like(self.latent)
        c = self.bundle.encode_text(self.token_ids).clone()
        z_t = alpha * self.latent + sigma * eps
        v = self.model(z_t, t, encoder_hidden_states=c, return_dict=False)[0]
        loss = (v - (alpha * eps - sigma * self.latent)).square().mean()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.average.parameters()], [*self.model.parameters()], 0.01)
        return loss.item()


def test_step_with_sd_rows_takes_as_long_as_a_bare_loop(capsys):
    bundle = load("mini-v")
    latent = torch.randn(ROWS, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    token_ids = bundle.tokenize(["a large red circle at the top on a white background"] * ROWS)
    batch = Batch(ids=tuple(map(str, range(ROWS))), columns={"latent": latent, "token_ids": token_ids})
    width = bundle.encode_text(token_ids).shape[-1]
    objective = VelocityObjective(
        VelocitySettings(), captions=CaptionEncoder(bundle), schedule=bundle.schedule, seed=0
    )

    def loop(batches):
        state = new_state(small_unet(width), settings=LOOP)

        def step():
            settings = LOOP.model_copy(update={"num_steps": state.step + 1})
            train(state, objective=objective, batches=batches, settings=settings, micro_batch=ROWS)

        return step

    drawn = Prefetcher((draw_rows(objective, batch, step=step) for step in itertools.count()), depth=2)
    turns = {
        "beforehand": loop(drawn),
        "in the step": loop(itertools.repeat(batch)),
        "bare": BareLoop(small_unet(width), bundle=bundle, latent=latent, token_ids=token_ids),
    }
    times = {name: [] for name in turns}
    for turn, (name, step) in itertools.product(range(TURNS + 2), turns.items()):
        began = time.perf_counter(), time.thread_time()
        step()
        spent = time.perf_counter() - began[0], time.thread_time() - began[1]
        if turn >= 2:  # the first steps allocate
            times[name].append(spent)
    drawn.close()
    speeds = {}
    for name, clock in itertools.product(("beforehand", "in the step"), ("wall", "main thread's CPU")):
        index = clock != "wall"
        pairs = zip(times["bare"], times[name], strict=True)
        ratios = [bare[index] / ours[index] for bare, ours in pairs]
        low, _, high = quantiles(ratios, n=4)
        speeds[name, clock] = median(ratios)
        with capsys.disabled():
            ours = 1e3 * median(each[index] for each in times[name])
            print(f"\n{name}, {clock}: {ours:.0f} ms, {median(ratios):.3f} of bare, {low:.3f} to {high:.3f}")
    # Not of wall times: on a machine with other work they say nothing, and draws need a core of their own.
    clock = "main thread's CPU"
    assert speeds["beforehand", clock] >= LEAST
    assert speeds["beforehand", clock] > speeds["in the step", clock]
