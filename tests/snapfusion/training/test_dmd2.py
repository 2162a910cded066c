"""DMD2: losses and gradients against float64, guidance, turns, the sampler's inputs, resumption."""

import copy
import itertools

import pytest
import torch
from conftest import tiny_bundle
from diffusion_oracles import alpha_sigma
from dmd2_training import (
    BATCH,
    CAPTIONS,
    batch_of,
    networks_of,
    objective_of,
    run,
    settings_of,
    state_of,
    step_at,
    teacher_of,
)
from torch.nn.functional import softplus

from snapfusion.noise import gaussian, noise_key, step_noise
from snapfusion.sampling import time_grid, trajectory
from snapfusion.settings import SettingsError
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.dmd2 import FAKE_SCORE, GAN_HEAD, draw_depth
from snapfusion.training.draws import row_key
from snapfusion.training.networks import MODEL, Networks
from snapfusion.training.settings import Dmd2Settings
from snapfusion.training.state import StateError
from snapfusion.training.velocity import draw_timesteps

GRID = (999, 749, 499, 249)


class Oracle:
    """The losses of DMD2 in float64, of alphas and sigmas in NumPy, for one step of a training."""

    def __init__(self, settings, networks, *, teacher, batch, step):
        self.settings, self.teacher, self.batch = settings, teacher, batch
        self.real = copy.deepcopy(teacher.unet).double()
        self.generator, self.fake, self.head = (
            copy.deepcopy(networks[name]).double() for name in (MODEL, FAKE_SCORE, GAN_HEAD)
        )
        self.c = CAPTIONS.encode(batch["token_ids"]).double()
        self.keys = [row_key(0, row, step) for row in batch.ids]
        self.depth = draw_depth(0, step, steps=settings.steps)

    @staticmethod
    def coefficients(t):
        pairs = torch.tensor([alpha_sigma(int(time)) for time in t], dtype=torch.float64)
        return (pairs[:, index].view(-1, 1, 1, 1) for index in range(2))

    def x(self, unet, z, t, c, *, kind="v_prediction", w=None):
        output = unet(z, t, encoder_hidden_states=c).sample
        if w is not None:
            # As the official code has it: its guidance_scale is w of Eq. 3.
            empty = unet(z, t, encoder_hidden_states=CAPTIONS.null.double().expand_as(c)).sample
            output = empty + w * (output - empty)
        alpha, sigma = self.coefficients(t)
        return (z - sigma * output) / alpha if kind == "epsilon" else alpha * z - sigma * output

    @staticmethod
    def noise(keys):
        return torch.stack([gaussian(key, (4, 8, 8)) for key in keys]).double()

    def start(self):
        """The generator's input: noise, or what it made of the times before, noised again."""
        z = self.noise(self.keys)
        for now, after in itertools.pairwise(GRID[: self.depth + 1]):
            with torch.no_grad():
                x = self.x(self.generator, z, torch.full((len(z),), now), self.c)
            alpha, sigma = alpha_sigma(after)
            z = alpha * x + sigma * self.noise([noise_key("step", key, after) for key in self.keys])
        return z, torch.full((len(z),), GRID[self.depth])

    def noised(self, x, draw, **times):
        keys = [noise_key(draw, key) for key in self.keys]
        t, eps = draw_timesteps(keys, schedule=self.teacher.schedule, **times), self.noise(keys)
        alpha, sigma = self.coefficients(t)
        return alpha * x + sigma * eps, eps, t

    def logits(self, z, t, c):
        seen = []
        handle = self.fake.mid_block.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
        self.fake(z, t, encoder_hidden_states=c)
        handle.remove()
        return self.head.layers(seen[0]).flatten()

    def generator_loss(self):
        """The value of each row's loss, and a loss of the same gradient."""
        kind, settings = self.teacher.prediction_type, self.settings
        x = self.x(self.generator, *self.start(), self.c)
        with torch.no_grad():
            z, _, t = self.noised(x, "matching", first=20, last=980)
            x_real = self.x(self.real, z, t, self.c, kind=kind, w=1.75)
            x_fake = self.x(self.fake, z, t, self.c, kind=kind)
            distance = (x - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient = ((x - x_real) - (x - x_fake)) / distance
        value = 0.5 * gradient.square().mean(dim=(1, 2, 3))
        surrogate = (gradient * x).mean(dim=(1, 2, 3))
        rest = torch.zeros(len(x), dtype=torch.float64)
        if settings.gan is not None:
            z, _, t = self.noised(x, "generator GAN")
            rest = rest + 1e-3 * softplus(-self.logits(z, t, self.c))
        if settings.regression_weight:
            z = self.noise(self.batch["noise_key"].tolist())
            error = self.x(self.generator, z, torch.full((len(z),), 999), self.c) - self.batch["latent"]
            rest = rest + settings.regression_weight * error.square().mean(dim=(1, 2, 3))
        return value + rest, surrogate + rest

    def fake_loss(self):
        with torch.no_grad():
            x = self.x(self.generator, *self.start(), self.c)
        z, eps, t = self.noised(x, "fake")
        output = self.fake(z, t, encoder_hidden_states=self.c).sample
        alpha, sigma = self.coefficients(t)
        target = eps if self.teacher.prediction_type == "epsilon" else alpha * eps - sigma * x
        loss = (output - target).square().mean(dim=(1, 2, 3))
        if self.settings.gan is not None:
            z_real, _, t_real = self.noised(self.batch["latent"].double(), "real")
            real, generated = self.logits(z_real, t_real, self.c), self.logits(z, t, self.c)
            loss = loss + 1e-2 * (softplus(generated) + softplus(-real))
        return loss, loss


def gradients(loss, network):
    found = torch.autograd.grad(loss.sum(), list(network.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in found]).double()


@pytest.mark.parametrize("generator", [True, False], ids=["generator", "fake score"])
@pytest.mark.parametrize(
    ("kind", "depth", "changes"),
    [
        ("epsilon", 0, {}),
        ("v_prediction", 3, {}),
        ("epsilon", 2, {"gan": None, "regression_weight": 0.25}),
    ],
    ids=["GAN, from noise", "v, from the third step", "regression"],
)
def test_loss_and_gradient_match_float64(generator, kind, depth, changes):
    settings, teacher = settings_of(**changes), teacher_of(kind)
    networks = networks_of(teacher)
    step = step_at(depth, generator=generator, settings=settings)
    batch = batch_of(step)
    objective = objective_of(settings, teacher=teacher)
    turn = objective.turn(step)
    assert turn == ((MODEL,) if generator else (FAKE_SCORE, GAN_HEAD)[: 1 if settings.gan is None else 2])
    oracle = Oracle(settings, networks, teacher=teacher, batch=batch, step=step)
    value, expected = oracle.generator_loss() if generator else oracle.fake_loss()
    trained = {name: networks[name] for name in turn}
    loss = objective(Networks(trained=trained, bare=networks, averages={}), batch, step=step)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), value, rtol=1e-4, atol=1e-6)
    doubles = {MODEL: oracle.generator, FAKE_SCORE: oracle.fake, GAN_HEAD: oracle.head}
    for name in turn:
        found, correct = gradients(loss, networks[name]), gradients(expected, doubles[name])
        torch.testing.assert_close(found, correct, rtol=0, atol=1e-3 * float(correct.abs().max()))


def test_defaults_are_those_of_the_script():
    settings = Dmd2Settings()
    assert (settings.guidance, settings.fake_updates, settings.matching_times) == (1.75, 10, (0.02, 0.98))
    assert (settings.gan.generator_weight, settings.gan.head_weight) == (1e-3, 1e-2)
    assert time_grid(settings.steps) == (*GRID, -1)


def test_ten_fake_updates_come_before_each_of_the_generator():
    objective = objective_of(Dmd2Settings())
    turns = [objective.turn(step) for step in range(22)]
    assert turns == [*[(FAKE_SCORE, GAN_HEAD)] * 10, (MODEL,)] * 2


def test_depth_is_one_for_all_rows_of_a_step():
    depths = [draw_depth(0, step, steps=4) for step in range(400)]
    assert [80 < depths.count(depth) < 120 for depth in range(5)] == [True] * 4 + [False]
    settings, model = settings_of(gan=None), tiny_bundle(3).unet
    objective, times = objective_of(settings), []
    model.register_forward_hook(lambda _module, inputs, _output: times.append(set(inputs[1].tolist())))
    networks = Networks(trained={}, bare={MODEL: model, FAKE_SCORE: tiny_bundle(5).unet}, averages={})
    for step in range(4):
        times.clear()
        for piece in batch_of(step).split(2):
            objective.held_out(networks, piece, step=step)
        seen = [{time} for time in GRID[: depths[step] + 1]]
        assert times == seen * (BATCH // 2)


def test_generator_is_trained_on_what_it_is_sampled_at():
    """The input of a step is that of the consistency sampler, from the same noise and by the same keys."""
    student, settings = tiny_bundle(3), settings_of(gan=None)
    student.prediction_type = "v_prediction"
    step = step_at(3, generator=True, settings=settings)
    batch, inputs = batch_of(step), []
    student.unet.register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
    networks = Networks(trained={}, bare={MODEL: student.unet, FAKE_SCORE: tiny_bundle(5).unet}, averages={})
    objective_of(settings).held_out(networks, batch, step=step)
    keys = [row_key(0, row, step) for row in batch.ids]
    walk = trajectory(
        student.denoiser(CAPTIONS.encode(batch["token_ids"])),
        torch.stack([gaussian(key, (4, 8, 8)) for key in keys]),
        grid=time_grid(4),
        schedule=student.schedule,
        solver="consistency",
        noise=step_noise(keys, (4, 8, 8), device=torch.device("cpu")),
    )
    with torch.no_grad():
        latents = [latent for _, latent, _ in walk]
    torch.testing.assert_close(inputs[3], latents[2], rtol=0, atol=1e-5)


def test_bfloat16_loses_no_gradient():
    """Weights that autocast casts in the passes without a gradient are not those of the pass with one."""
    settings = settings_of(gan=None)
    networks = networks_of(teacher_of("epsilon"))
    step = step_at(3, generator=True, settings=settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = Networks(trained={MODEL: networks[MODEL]}, bare=networks, averages={})
        loss = objective_of(settings)(view, batch_of(step), step=step)
    loss.sum().backward()
    assert all(weight.grad is not None for weight in networks[MODEL].parameters())


@pytest.fixture(scope="module")
def whole():
    """A training that was not killed, and the results of its steps."""
    state, results = state_of(), []
    run(state, after_step=results.append)
    return state, results


def test_networks_are_trained_in_turns(whole):
    state, results = whole
    assert [result.network for result in results] == [FAKE_SCORE, MODEL] * 2
    updates = {name: network.updates for name, network in state.networks.items()}
    assert updates == {MODEL: 2, FAKE_SCORE: 2, GAN_HEAD: 2}
    # Each network's gradient has its own norm.
    assert 0.0 < results[0].metrics[f"{GAN_HEAD}/grad_norm"] != results[0].grad_norm > 0.0
    assert results[1].metrics == {}


@pytest.mark.parametrize("killed_after", [1, 2])
def test_killed_and_resumed_training_is_identical(killed_after, whole, tmp_path):
    killed, store = state_of(), CheckpointStore(str(tmp_path))

    def save_and_die(step):
        if step.step == killed_after:
            store.save(killed.step, tensors=killed.tensors(), values=killed.values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, after_step=save_and_die)
    resumed, found = state_of(seed=7), store.newest()
    resumed.restore(found.tensors, found.values)
    run(resumed)
    tensors = resumed.tensors()
    for group, named in whole[0].tensors().items():
        assert all(torch.equal(tensor, tensors[group][name]) for name, tensor in named.items())
    assert resumed.values() == whole[0].values()


def test_fake_score_without_its_checkpoint_is_refused():
    state = state_of()
    tensors = {group: named for group, named in state.tensors().items() if FAKE_SCORE not in group}
    with pytest.raises(StateError, match=r"'fake_score-model', 'fake_score-optimizer'.* is needed"):
        state_of().restore(tensors, state.values())


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(SettingsError, match=r"the GAN needs real ones: set gan=null or regression_weight=0"):
        Dmd2Settings.parse({"regression_weight": 0.25})
    with pytest.raises(SettingsError, match=r"matching_times 0\.5 to 0\.5 are no range"):
        Dmd2Settings.parse({"matching_times": [0.5, 0.5]})
