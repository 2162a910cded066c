"""Time of a training step of each objective beside a bare loop of the same maths, in turns.

pytest -m slow --capture=no tests/snapfusion/training/test_step_time.py
"""

import copy
import itertools
import time
from statistics import median

import pytest
import torch
from torch.nn.functional import softplus
from torch.nn.utils import clip_grad_norm_

from snapfusion.models.bundle import Bundle
from snapfusion.models.gan_head import head_for
from snapfusion.models.guidance_embedding import guidance_embedding, with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.sampling import time_grid
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import OnlineTargets
from snapfusion.training.dmd2 import (
    FAKE_SCORE,
    GAN_HEAD,
    Dmd2Objective,
    draw_depth,
    is_generator_step,
)
from snapfusion.training.lcm import LcmObjective
from snapfusion.training.loop import new_state, train
from snapfusion.training.networks import MODEL
from snapfusion.training.pcm import PcmObjective
from snapfusion.training.settings import (
    CfgRange,
    Dmd2Settings,
    LcmSettings,
    LoopSettings,
    NetworkSettings,
    PcmSettings,
    StepDistillationSettings,
)
from snapfusion.training.step_distillation import StepDistillationObjective

ROWS, TURNS, LEAST = 16, 8, 0.95
CFG_RANGE = CfgRange(low=2.0, high=6.0)
LOOP = LoopSettings(num_steps=TURNS + 2, global_batch=ROWS, learning_rate=1e-5, ema_decay=0.99)
STEPS = StepDistillationSettings(student_steps=8, k=2, cfg_range=CFG_RANGE, cfg_probability=1.0)
OBJECTIVES = {
    "CFG-aware": STEPS,
    "w-conditioned": STEPS.model_copy(update={"w_conditioned": True}),
    "LCM": LcmSettings(cfg_range=CFG_RANGE),
    "PCM": PcmSettings(cfg_range=CFG_RANGE),
}
# One update of the fake score for each of the generator's, so that both are measured as often.
DMD2 = Dmd2Settings(steps=4, fake_updates=1)
DMD2_LOOP = LOOP.model_copy(update={"num_steps": 2 * TURNS + 4})
BESIDE = NetworkSettings(learning_rate=1e-5)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class BareLoop:
    """A training step written out: passes, loss, gradient, AdamW and the average, and nothing else."""

    def __init__(self, settings, *, teacher: Bundle, model, latent, token_ids) -> None:
        self.settings, self.teacher, self.model = settings, teacher, model
        self.latent, self.token_ids = latent, token_ids
        self.average = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self.null = teacher.null_condition().clone()
        t = torch.arange(teacher.schedule.num_steps + 1) - 1
        self.alphas, self.sigmas = (
            each(t).flatten() for each in (teacher.schedule.alpha, teacher.schedule.sigma)
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
        self.ratio = 1.0

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.losses().mean()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*self.average.parameters()], [*self.model.parameters()], 0.01)
        return float(loss.detach())

    def losses(self):
        points = getattr(self.settings, "points", None) or self.settings.student_steps
        grid = torch.tensor(time_grid(points))
        interval = torch.randint(points, (ROWS,))
        t, s = grid[interval], grid[interval + 1]
        z_t = self.noised(t)
        c = self.teacher.encode_text(self.token_ids).clone()
        w = (2.0 + 4.0 * torch.rand(ROWS)).view(-1, 1, 1, 1)
        if isinstance(self.settings, StepDistillationSettings):
            return self.step_distillation(z_t, t, s, c, w)
        with torch.no_grad():
            x, eps = self.taught(z_t, t, c, w)
            z_s = self.alpha(s) * x + self.sigma(s) * eps
        if isinstance(self.settings, LcmSettings):
            with torch.no_grad():
                target = self.clean(self.average, z_s, s, c, w)
            return self.huber(self.clean(self.model, z_t, t, c, w) - target)
        size = points // self.settings.phases
        end = grid[(interval // size + 1) * size]
        with torch.no_grad():
            target = self.phase(z_s, s, c, end)
            target = torch.where((s == end).view(-1, 1, 1, 1), z_s, target)
        return self.huber(self.phase(z_t, t, c, end) - target)

    def step_distillation(self, z_t, t, s, c, w):
        middle = (t + s + 1) // 2  # these grids nest
        with torch.no_grad():
            x, eps = self.taught(z_t, t, c, w)
            x, eps = self.taught(self.alpha(middle) * x + self.sigma(middle) * eps, middle, c, w)
            z_s = self.alpha(s) * x + self.sigma(s) * eps
            share = self.sigma(s) / self.sigma(t)
            x_target = (z_s - share * z_t) / (self.alpha(s) - share * self.alpha(t))
        other, noise = torch.randint(1000, (ROWS,)), torch.randn_like(self.latent)
        noisy = self.alpha(other) * self.latent + self.sigma(other) * noise
        if self.settings.w_conditioned:
            scales = torch.cat([w.flatten(), torch.ones(ROWS)])
            v, original = self.velocity(
                self.model, torch.cat([z_t, noisy]), torch.cat([t, other]), torch.cat([c, c]), w=scales
            ).chunk(2)
        else:
            conditions = torch.cat([c, self.null.expand_as(c), c])
            cond, uncond, original = self.velocity(
                self.model, torch.cat([z_t, z_t, noisy]), torch.cat([t, t, other]), conditions
            ).chunk(3)
            v = w * cond - (w - 1.0) * uncond
        velocity = self.alpha(other) * noise - self.sigma(other) * self.latent
        first = (original - velocity).square().mean(dim=(1, 2, 3))
        weight = (self.alpha(t) ** 2 / self.sigma(t) ** 2).clamp(min=1.0).flatten()
        error = self.alpha(t) * z_t - self.sigma(t) * v - x_target
        distilled = weight * error.square().mean(dim=(1, 2, 3))
        self.ratio = 0.98 * self.ratio + 0.02 * float(distilled.detach().mean() / first.detach().mean())
        return distilled + 0.2 * self.ratio * first

    def noised(self, t):
        return self.alpha(t) * self.latent + self.sigma(t) * torch.randn_like(self.latent)

    def alpha(self, t):
        return self.alphas[t + 1].view(-1, 1, 1, 1)

    def sigma(self, t):
        return self.sigmas[t + 1].view(-1, 1, 1, 1)

    @staticmethod
    def velocity(network, z, t, c, w=None):
        condition = {} if w is None else {"timestep_cond": guidance_embedding(w)}
        return network(z, t, encoder_hidden_states=c, return_dict=False, **condition)[0]

    def taught(self, z, t, c, w):
        """The guided teacher's x and eps."""
        conditions = torch.cat([self.null.expand_as(c), c])
        both = self.velocity(self.teacher.unet, torch.cat([z, z]), torch.cat([t, t]), conditions)
        uncond, cond = both.chunk(2)
        return self.estimate(w * cond - (w - 1.0) * uncond, z, t)

    def estimate(self, v, z, t):
        return self.alpha(t) * z - self.sigma(t) * v, self.sigma(t) * z + self.alpha(t) * v

    def clean(self, network, z, t, c, w):
        """LCM's consistency function."""
        x, _ = self.estimate(self.velocity(network, z, t.clamp(min=0), c, w=w.flatten()), z, t)
        r = (10.0 * (t + 1)).float().view(-1, 1, 1, 1)
        return 0.25 / (r**2 + 0.25) * z + r / (r**2 + 0.25).sqrt() * x

    def phase(self, z, t, c, end):
        """PCM's step to the end of the phase."""
        x, eps = self.estimate(self.velocity(self.model, z, t.clamp(min=0), c), z, t)
        return self.alpha(end) * x + self.sigma(end) * eps

    @staticmethod
    def huber(error):
        return ((error**2 + 0.001**2).sqrt() - 0.001).mean(dim=(1, 2, 3))


class BareDmd2(BareLoop):
    """Steps of DMD2 written out, in turns of the fake score with the head and of the generator."""

    def __init__(self, settings, *, beside, **parts) -> None:
        super().__init__(settings, **parts)
        self.fake, self.head = beside
        self.grid, self.steps = time_grid(settings.steps), 0
        self.optimizers = {
            network: torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
            for network in (self.fake, self.head)
        } | {self.model: self.optimizer}
        self.features = []
        self.fake.mid_block.register_forward_hook(lambda *call: self.features.append(call[2]))

    def step(self) -> float:
        generator = is_generator_step(self.steps, fake_updates=self.settings.fake_updates)
        depth = draw_depth(0, self.steps, steps=self.settings.steps)
        self.steps += 1
        trained = [self.model] if generator else [self.fake, self.head]
        for network, optimizer in self.optimizers.items():
            network.requires_grad_(requires_grad=network in trained)
            optimizer.zero_grad(set_to_none=True)
        loss = (self.generator_loss if generator else self.fake_loss)(depth).mean()
        loss.backward()
        for network in trained:
            clip_grad_norm_(network.parameters(), 1.0)
            self.optimizers[network].step()
        if generator:
            with torch.no_grad():
                torch._foreach_lerp_([*self.average.parameters()], [*self.model.parameters()], 0.01)
        return float(loss.detach())

    def sample(self, depth, c):
        """The generator's x with a gradient, of its own samples of the times before."""
        z = torch.randn_like(self.latent)
        times = [torch.full((ROWS,), t) for t in self.grid[: depth + 1]]
        for t, after in itertools.pairwise(times):
            with torch.no_grad():
                x = self.x(self.model, z, t, c)
            z = self.alpha(after) * x + self.sigma(after) * torch.randn_like(z)
        return self.x(self.model, z, times[-1], c)

    def x(self, network, z, t, c):
        return self.estimate(self.velocity(network, z, t, c), z, t)[0]

    def fake_loss(self, depth):
        c = self.teacher.encode_text(self.token_ids).clone()
        with torch.no_grad():
            x = self.sample(depth, c)
        both, t = torch.cat([x, self.latent]), torch.randint(1000, (2 * ROWS,))
        eps = torch.randn_like(both)
        z = self.alpha(t) * both + self.sigma(t) * eps
        self.features.clear()
        v = self.velocity(self.fake, z, t, torch.cat([c, c]))[:ROWS]
        velocity = (self.alpha(t) * eps - self.sigma(t) * both)[:ROWS]
        fake, real = self.head(self.features[0]).chunk(2)
        return (v - velocity).square().mean(dim=(1, 2, 3)) + 1e-2 * (softplus(fake) + softplus(-real))

    def generator_loss(self, depth):
        c = self.teacher.encode_text(self.token_ids).clone()
        x = self.sample(depth, c)
        with torch.no_grad():
            t = torch.randint(20, 981, (ROWS,))
            z = self.alpha(t) * x + self.sigma(t) * torch.randn_like(x)
            x_real, _ = self.taught(z, t, c, self.settings.guidance)
            distance = (x - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
            target = x - (self.x(self.fake, z, t, c) - x_real) / distance
        matching = 0.5 * (x - target).square().mean(dim=(1, 2, 3))
        t = torch.randint(1000, (ROWS,))
        self.features.clear()
        self.velocity(self.fake, self.alpha(t) * x + self.sigma(t) * torch.randn_like(x), t, c)
        return matching + 1e-3 * softplus(-self.head(self.features[0]))


def objective_of(settings, *, teacher, captions):
    targets = settings if isinstance(settings, StepDistillationSettings) else settings.targets
    online = OnlineTargets(teacher, captions=captions, settings=targets, seed=0)
    parts = {"targets": online, "schedule": teacher.schedule}
    if isinstance(settings, StepDistillationSettings):
        return StepDistillationObjective(settings, captions=captions, seed=0, **parts)
    return {LcmSettings: LcmObjective, PcmSettings: PcmObjective}[type(settings)](settings, **parts)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_step_takes_as_long_as_a_bare_loop(name, capsys):
    settings, teacher = OBJECTIVES[name], load("mini-v")
    w_conditioned = getattr(settings, "w_conditioned", False)

    def student():
        unet = trainable("mini-v")
        return with_guidance_embedding(unet).requires_grad_(requires_grad=True) if w_conditioned else unet

    bare = BareLoop(settings, teacher=teacher, model=student(), **rows_of(teacher))
    model = student()
    averaged = {MODEL: copy.deepcopy(model)} if name == "LCM" else None
    pairs = interleaved(
        new_state(model, settings=LOOP, averaged=averaged),
        objective_of(settings, teacher=teacher, captions=CaptionEncoder(teacher)),
        bare=bare,
        loop=LOOP,
    )
    assert_speed(name, pairs, capsys)


def test_dmd2_takes_as_long_as_a_bare_loop(capsys):
    teacher = load("mini-v")

    def beside():
        fake = trainable("mini-v")
        return fake, head_for(fake, seed=0)

    bare = BareDmd2(DMD2, teacher=teacher, model=trainable("mini-v"), beside=beside(), **rows_of(teacher))
    others = dict(zip((FAKE_SCORE, GAN_HEAD), ((network, BESIDE) for network in beside()), strict=True))
    pairs = interleaved(
        new_state(trainable("mini-v"), settings=DMD2_LOOP, others=others),
        Dmd2Objective(DMD2, teacher=teacher, captions=CaptionEncoder(teacher), seed=0),
        bare=bare,
        loop=DMD2_LOOP,
    )
    for network, name in ((MODEL, "DMD2, generator"), (FAKE_SCORE, "DMD2, fake score and head")):
        assert_speed(name, [pair for pair in pairs if pair[0].network == network], capsys)


def trainable(name):
    return load(name).unet.requires_grad_(requires_grad=True)


def rows_of(teacher):
    torch.manual_seed(0)
    token_ids = teacher.tokenize(["a large red circle at the top on a white background"] * ROWS)
    return {"latent": 0.5 * torch.randn(ROWS, *teacher.latent_shape), "token_ids": token_ids}


def interleaved(state, objective, *, bare, loop):
    """Each step with its CPU seconds, the loss of a step of the bare loop after it, and its CPU seconds."""
    batch = Batch(
        ids=tuple(map(str, range(ROWS))),
        columns={"latent": bare.latent, "token_ids": bare.token_ids.to(torch.int32)},
    )
    pairs, mark = [], [time.process_time()]

    def after_step(step):
        """Take a step of the other loop between two of this one, so that both meet the same machine."""
        seconds = time.process_time() - mark[0]
        began = time.process_time()
        loss = bare.step()
        pairs.append((step, seconds, loss, time.process_time() - began))
        mark[0] = time.process_time()

    train(
        state,
        objective=objective,
        batches=itertools.repeat(batch),
        settings=loop,
        micro_batch=ROWS,
        after_step=after_step,
    )
    return pairs


def assert_speed(name, pairs, capsys):
    # The first steps allocate.
    steps, ours, losses, others = zip(*pairs[2:], strict=True)
    speed = median(other / own for own, other in zip(ours, others, strict=True))
    loss = median(step.loss for step in steps)
    with capsys.disabled():
        print(
            f"\n{name}: {1e3 * median(ours):.1f} CPU ms a step, {1e3 * median(others):.1f} of the bare loop, "
            f"speed {speed:.3f} of it; losses {loss:.4g} and {median(losses):.4g}"
        )
    assert 0.5 < loss / median(losses) < 2.0  # so the maths is the same
    assert speed >= LEAST
