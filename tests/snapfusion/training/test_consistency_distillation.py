"""LCM and PCM: loss and gradient against float64, a perfect student, guidance, resumption."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from diffusion_oracles import SCHEDULE, alpha_sigma
from torch import nn

from snapfusion.models.guidance_embedding import guidance_embedding, with_guidance_embedding
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import time_grid
from snapfusion.settings import SettingsError
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.distillation_batch import DistillationBatch, OnlineTargets
from snapfusion.training.lcm import LcmObjective
from snapfusion.training.loop import new_state, train
from snapfusion.training.networks import MODEL
from snapfusion.training.pcm import PcmObjective
from snapfusion.training.settings import CfgRange, LcmSettings, LoopSettings, PcmSettings

TEACHER = tiny_bundle()
TEACHER.prediction_type = "v_prediction"
CAPTIONS = CaptionEncoder(TEACHER)
RANGE = CfgRange(low=2.0, high=6.0)
LCM = LcmSettings(points=8, cfg_range=RANGE)
PCM = PcmSettings(points=8, cfg_range=RANGE)
LOOP = LoopSettings(num_steps=3, global_batch=6, learning_rate=1e-3, ema_decay=0.9)


def student(seed=3, *, w_conditioned=False):
    unet = tiny_bundle(seed).unet
    if w_conditioned:
        unet = with_guidance_embedding(unet)
        torch.manual_seed(seed)
        nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.1)
    return unet.requires_grad_(requires_grad=True).train()


def batch_of(step, *, rows=6):
    ids = tuple(f"{step}-{row}" for row in range(rows))
    latent = gaussian_batch([noise_key(row) for row in ids], (4, 8, 8))
    return Batch(
        ids=ids, columns={"latent": latent, "token_ids": TEACHER.tokenize(["red", "re"] * (rows // 2))}
    )


def online(settings):
    return OnlineTargets(TEACHER, captions=CAPTIONS, settings=settings.targets, seed=0)


def objective_of(settings):
    kind = LcmObjective if isinstance(settings, LcmSettings) else PcmObjective
    return kind(settings, targets=online(settings), schedule=TEACHER.schedule)


class Oracle:
    """The papers' losses in float64, of alphas and sigmas in NumPy; rows are those of the objective."""

    def __init__(self, settings, rows, *, model, average=None):
        self.settings, self.rows = settings, rows
        self.model, self.average, self.teacher = (
            copy.deepcopy(network).double() for network in (model, average or model, TEACHER.unet)
        )

    @staticmethod
    def coefficients(times):
        pairs = np.array([alpha_sigma(int(t)) for t in times])
        return (torch.from_numpy(pairs[:, i]).view(-1, 1, 1, 1) for i in range(2))

    def x_and_eps(self, network, z, times, c, w=None):
        (alpha, sigma), t = self.coefficients(times), torch.tensor(times).clamp(min=0)
        cond = None if w is None else guidance_embedding(w.flatten()).double()
        v = network(z, t, encoder_hidden_states=c.double(), timestep_cond=cond).sample
        return alpha * z - sigma * v, sigma * z + alpha * v

    def loss(self):
        rows, settings = self.rows, self.settings
        fine = time_grid(settings.points)
        t, s = ([fine[i + j] for i in rows.interval.tolist()] for j in range(2))
        (alpha, sigma), (alpha_s, sigma_s) = self.coefficients(t), self.coefficients(s)
        z_t = alpha * rows.x.double() + sigma * rows.eps.double()
        with torch.no_grad():
            x, eps = self.x_and_eps(self.teacher, z_t, t, rows.c)
            if rows.w is not None:
                # The papers' scale: cond + w (cond - uncond), with their w one below ours.
                x_0, eps_0 = self.x_and_eps(self.teacher, z_t, t, CAPTIONS.null.expand_as(rows.c))
                w = rows.w.double() - 1.0
                x, eps = x + w * (x - x_0), eps + w * (eps - eps_0)
            z_s = alpha_s * x + sigma_s * eps
            target = self.function(self.average, z_s, s)
        error = self.function(self.model, z_t, t) - target
        c = settings.huber_c
        return ((error**2 + c**2).sqrt() - c).mean(dim=(1, 2, 3))

    def function(self, network, z, times):
        rows, settings = self.rows, self.settings
        if isinstance(settings, LcmSettings):
            x, _ = self.x_and_eps(network, z, times, rows.c, rows.w)
            r = torch.tensor([10.0 * (t + 1) for t in times], dtype=torch.float64).view(-1, 1, 1, 1)
            return 0.25 / (r**2 + 0.25) * z + r / (r**2 + 0.25).sqrt() * x
        x, eps = self.x_and_eps(network, z, times, rows.c)
        size = settings.points // settings.phases
        ends = [time_grid(settings.points)[(i // size + 1) * size] for i in rows.interval.tolist()]
        alpha, sigma = self.coefficients(ends)
        return alpha * x + sigma * eps


def gradient(model, loss):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize(
    "settings",
    [LCM, PCM, PCM.model_copy(update={"phases": 1}), PCM.model_copy(update={"guided": False})],
    ids=["lcm", "pcm", "pcm of one phase", "unguided pcm"],
)
def test_loss_and_gradient_match_float64(settings):
    batch, is_lcm = batch_of(0, rows=16), isinstance(settings, LcmSettings)
    model = student(w_conditioned=is_lcm)
    average = student(seed=4, w_conditioned=True) if is_lcm else None
    rows = online(settings)(batch, guided=getattr(settings, "guided", True), step=0)
    assert settings.points - 1 in rows.interval  # it ends at the clean end
    oracle = Oracle(settings, rows, model=model, average=average)
    expected = oracle.loss()
    if is_lcm:
        networks = SimpleNamespace(trained={MODEL: model}, averages={MODEL: average})
        loss = objective_of(settings)(networks, batch, step=0)
    else:
        loss = objective_of(settings)(model, batch, step=0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    found, correct = gradient(model, loss.sum()).double(), gradient(oracle.model, expected.sum())
    torch.testing.assert_close(found, correct, rtol=0, atol=1e-3 * float(correct.abs().max()))


class Composed(nn.Module):
    """The student that composes the steps of a teacher whose x is `gain` z, to the end of each phase."""

    def __init__(self, settings, gain):
        super().__init__()
        self.settings, self.gain = settings, gain

    def factor(self, t):
        """z at the end of the phase over z at t."""
        phases = getattr(self.settings, "phases", 1)
        end = next(end for end in time_grid(phases)[1:] if end < t)
        factor, fine = 1.0, time_grid(self.settings.points)
        for now, after in itertools.pairwise(fine[fine.index(t) : fine.index(end) + 1]):
            (alpha, sigma), (alpha_2, sigma_2) = alpha_sigma(now), alpha_sigma(after)
            factor *= alpha_2 * self.gain + sigma_2 * (1.0 - alpha * self.gain) / sigma
        return end, factor

    def forward(self, z_t, t, *, encoder_hidden_states, return_dict, timestep_cond=None):
        velocities = []
        for row, time in zip(z_t.double(), t.tolist(), strict=True):
            if time == 0:  # the clean end, where the output has no weight
                velocities.append(torch.zeros_like(row))
                continue
            (end, factor), (alpha, sigma) = self.factor(time), alpha_sigma(time)
            alpha_2, sigma_2 = alpha_sigma(end)
            if isinstance(self.settings, LcmSettings):
                # f = c_skip z + c_out x is to be factor z.
                r = 10.0 * (time + 1)
                x = (factor - 0.25 / (r**2 + 0.25)) * (r**2 + 0.25) ** 0.5 / r
            else:
                # alpha'' x + sigma'' (1 - alpha x) / sigma is to be factor, in units of z.
                x = (factor - sigma_2 / sigma) / (alpha_2 - sigma_2 / sigma * alpha)
            velocities.append(row * (alpha - x) / sigma)
        return (torch.stack(velocities).float(),)


def linear_rows(settings, gain):
    """Rows of every interval, of a teacher whose x is `gain` z."""
    interval = torch.arange(settings.points)
    x, eps = (
        gaussian_batch([noise_key(name, i) for i in range(settings.points)], (4, 8, 8)) for name in "xe"
    )
    t = torch.tensor(time_grid(settings.points))[interval]
    z_t = SCHEDULE.diffuse(x=x, eps=eps, t=t)
    return DistillationBatch(
        x=x,
        eps=eps,
        z_t=z_t,
        interval=interval,
        t=t,
        c=torch.zeros(len(t), 1, 8),
        w=None,
        x_target=gain * z_t,
    )


@pytest.mark.parametrize(
    "settings", [LcmSettings(points=40), PcmSettings(points=40), PcmSettings(points=64, phases=8)]
)
def test_perfect_student_has_no_loss(settings):
    rows, perfect = linear_rows(settings, 0.7), Composed(settings, 0.7)
    objective = objective_of(settings)
    options = {"average": perfect} if isinstance(settings, LcmSettings) else {}
    assert float(objective.loss(perfect, rows, **options).max()) < 1e-7
    worse = Composed(settings, 0.69)
    options = {"average": worse} if options else {}
    assert float(objective.loss(worse, rows, **options).mean()) > 1e-4


def test_gradient_passes_through_the_first_pass_alone():
    model, batch = student(), batch_of(1)
    rows = online(PCM)(batch, guided=True, step=0)
    still = copy.deepcopy(model).requires_grad_(requires_grad=False)
    calls = []

    def once(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return (model if torch.is_grad_enabled() else still)(*args, **kwargs)

    objective = objective_of(PCM)
    apart = gradient(model, objective.loss(once, rows).sum())
    assert calls == [False, True]
    torch.testing.assert_close(gradient(model, objective.loss(model, rows).sum()), apart, rtol=0, atol=0)


def test_teacher_is_guided_as_the_settings_say():
    guided = online(PCM)(batch_of(0), guided=True, step=0)
    assert 2.0 <= float(guided.w.min()) <= float(guided.w.max()) <= 6.0
    unguided = PCM.model_copy(update={"guided": False, "caption_dropout": 0.5})
    rows = online(unguided)(batch_of(0), guided=False, step=0)
    empty = (rows.c == CAPTIONS.null).all(dim=(1, 2))
    assert rows.w is None
    assert 0 < int(empty.sum()) < 6
    assert LcmSettings().cfg_range == CfgRange(low=6.0, high=16.0)  # the script's 5 to 15, counted from 0
    assert PcmSettings().cfg_range == CfgRange(low=5.0, high=6.0)  # 4 to 5


def test_phases_must_divide_the_points():
    with pytest.raises(SettingsError, match="4 phases do not divide 50 points"):
        PcmSettings.parse({"points": 50})


def state_of(settings, seed=3):
    is_lcm = isinstance(settings, LcmSettings)
    model = student(seed, w_conditioned=is_lcm)
    return new_state(model, settings=LOOP, averaged={MODEL: copy.deepcopy(model)} if is_lcm else None)


def run(state, settings, **options):
    batches = (batch_of(step) for step in itertools.count(state.step))
    train(state, objective=objective_of(settings), batches=batches, settings=LOOP, micro_batch=4, **options)


@pytest.mark.parametrize("settings", [LCM, PCM], ids=["lcm", "pcm"])
def test_killed_and_resumed_training_is_identical(settings, tmp_path):
    whole, killed, store = state_of(settings), state_of(settings), CheckpointStore(str(tmp_path))
    run(whole, settings)

    def save_and_die(step):
        store.save(killed.step, tensors=killed.tensors(), values=killed.values())
        if step.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, settings, after_step=save_and_die)
    resumed, found = state_of(settings, seed=7), store.newest()
    resumed.restore(found.tensors, found.values)
    run(resumed, settings)
    for group, named in whole.tensors().items():
        assert all(torch.equal(tensor, resumed.tensors()[group][name]) for name, tensor in named.items())
