"""The objectives of Eq. 6 and Eq. 11: draws, weights, gradients, resumption."""

import itertools

import pytest
import torch
from conftest import tiny_bundle
from torch import nn

from snapfusion.losses import distillation_loss
from snapfusion.models.guidance_embedding import guidance_embedding, with_guidance_embedding
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import guide, time_grid
from snapfusion.settings import SettingsError
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder, draw_caption_dropout
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.distillation_batch import OnlineTargets, StoredTargets
from snapfusion.training.loop import DivergedError, new_state, train
from snapfusion.training.moving_averages import MovingAverages
from snapfusion.training.settings import CfgRange, LoopSettings, StepDistillationSettings, VelocitySettings
from snapfusion.training.step_distillation import StepDistillationObjective, is_guided_step
from snapfusion.training.velocity import VelocityObjective, draw_timesteps

LOOP = LoopSettings(num_steps=6, global_batch=8, learning_rate=1e-3, ema_decay=0.9)
RANGE = CfgRange(low=1.0, high=6.0)


TEACHER = tiny_bundle()
TEACHER.prediction_type = "v_prediction"
CAPTIONS = CaptionEncoder(TEACHER)


def student(seed=3):
    return tiny_bundle(seed).unet.requires_grad_(requires_grad=True).train()


def batch_of(step, *, rows=8):
    ids = tuple(f"{step}-{row}" for row in range(rows))
    latent = gaussian_batch([noise_key(row) for row in ids], (4, 8, 8))
    token_ids = TEACHER.tokenize(["red", "re"] * (rows // 2))
    return Batch(ids=ids, columns={"latent": latent, "token_ids": token_ids})


def settings_of(**changes):
    return StepDistillationSettings(**{"student_steps": 4, "cfg_range": RANGE, **changes})


def online(**changes):
    return OnlineTargets(TEACHER, captions=CAPTIONS, settings=settings_of(**changes), seed=0)


def objective_of(*, targets=None, **changes):
    return StepDistillationObjective(
        settings_of(**changes),
        targets=targets or online(**changes),
        captions=CAPTIONS,
        schedule=TEACHER.schedule,
        seed=0,
    )


def velocity_objective():
    return VelocityObjective(VelocitySettings(), captions=CAPTIONS, schedule=TEACHER.schedule, seed=0)


def x_of(v, rows):
    return TEACHER.schedule.from_v(v=v, z_t=rows.z_t, t=rows.t).x


def loss_of(v, rows):
    """Eq. 9 of the student's v."""
    return distillation_loss(x_of(v, rows), x_target=rows.x_target, t=rows.t, schedule=TEACHER.schedule)


def gradient(model, loss):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def test_guided_steps_follow_seed_and_probability():
    draws = [is_guided_step(0, step, 0.1) for step in range(4000)]
    assert sum(draws) / 4000 == pytest.approx(0.1, abs=0.015)
    assert draws == [is_guided_step(0, step, 0.1) for step in range(4000)]
    assert draws != [is_guided_step(1, step, 0.1) for step in range(4000)]
    assert not any(is_guided_step(0, step, 0.0) for step in range(100))
    assert all(is_guided_step(0, step, 1.0) for step in range(100))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_loss_and_gradient_match_the_formula(p):
    batch, unet = batch_of(0), student()
    objective = objective_of(gamma=0.0, cfg_probability=p)
    rows = online()(batch, guided=p == 1.0, step=0)
    assert (rows.w is None) == (p == 0.0)

    def formula(through_uncond):
        cond, uncond = (
            unet(rows.z_t, rows.t, encoder_hidden_states=c.expand_as(rows.c)).sample
            for c in (rows.c, CAPTIONS.null)
        )
        uncond = uncond if through_uncond else uncond.detach()
        return loss_of(cond if rows.w is None else guide(cond=cond, uncond=uncond, w=rows.w), rows)

    expected = formula(through_uncond=True)
    loss = objective(unet, batch, step=0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    found, correct = gradient(unet, loss.sum()), gradient(unet, expected.sum())
    scale = float(correct.abs().max())
    torch.testing.assert_close(found, correct, rtol=0, atol=1e-4 * scale)
    if p == 1.0:
        partial = gradient(unet, formula(through_uncond=False).sum())
        assert (found - partial).abs().max() > 0.01 * scale


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_teacher_as_student_has_no_loss(p):
    assert objective_of(gamma=0.0, cfg_probability=p, k=1)(TEACHER.unet, batch_of(0), step=0).max() < 1e-7


class Constant(nn.Module):
    """Predicts the same velocity for any input."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.1))

    def forward(self, z_t, t, *, encoder_hidden_states, return_dict):
        assert not return_dict
        return (self.value.expand_as(z_t),)


@pytest.mark.parametrize(
    ("original_times", "micro_batch"),
    [pytest.param("schedule", 4, marks=pytest.mark.slow), ("schedule", 8), ("grid", 8)],
)
def test_share_of_the_original_loss_is_gamma(original_times, micro_batch):
    cache, online_targets = {}, online()

    def cached(batch, *, guided, step):
        return cache.setdefault(batch.ids, online_targets(batch, guided=guided, step=step))

    def of_gamma(gamma):
        changes = {"gamma": gamma, "cfg_probability": 0.5, "ratio_decay": 0.9}
        return objective_of(targets=cached, original_times=original_times, **changes)

    model, shares, gammas = Constant(), {True: [], False: []}, []
    objective, alone = of_gamma(0.2), of_gamma(0.0)
    for step in range(30):
        guided = objective.guided(step)
        gammas.append(objective.gamma(guided=guided))
        parts = list(batch_of(step).split(micro_batch))
        total, distillation = (
            float(torch.cat([loss(model, part, step=step) for part in parts]).detach().mean())
            for loss in (objective, alone)
        )
        shares[guided].append((total - distillation) / distillation)
        objective.end_step()
    for branch in shares.values():
        assert branch[0] == pytest.approx(0.0, abs=1e-6)  # no averages in the first step
        # The ratio of means differs from the mean of ratios, over few rows by a fifth.
        assert sum(branch[3:]) / len(branch[3:]) == pytest.approx(0.2, rel=0.3)
    assert len(set(gammas)) > 20


def test_gamma_does_not_depend_on_accumulation():
    ends = []
    for micro_batch in (2, 3, 8):
        objective = objective_of()
        for step in range(3):
            for part in batch_of(step).split(micro_batch):
                objective(TEACHER.unet, part, step=step)
            objective.end_step()
        ends.append(objective.gamma(guided=False))
    assert ends[1:] == pytest.approx(ends[:1] * 2, rel=1e-5)


def test_constant_gamma():
    assert objective_of(gamma=0.7, gamma_rule="constant").gamma(guided=True) == 0.7


def test_metrics_of_intervals_and_gradient_norm():
    batch = batch_of(0, rows=16)
    rows = online(caption_dropout=0.0)(batch, guided=True, step=0)
    objective = objective_of(cfg_probability=1.0, caption_dropout=0.0)
    objective(TEACHER.unet, batch, step=0)
    metrics = objective.end_step()

    both = [torch.zeros_like(rows.z_t).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        for output, c in zip(both, (rows.c, CAPTIONS.null.expand_as(rows.c)), strict=True):
            output.copy_(TEACHER.unet(rows.z_t, rows.t, encoder_hidden_states=c).sample)
    v = guide(cond=both[0], uncond=both[1], w=rows.w)
    loss = loss_of(v, rows)
    norms = torch.stack(torch.autograd.grad(loss.sum(), both)).square().sum(dim=(0, 2, 3, 4)).sqrt()
    errors = (x_of(v, rows) - rows.x_target).square().mean(dim=(1, 2, 3))
    assert set(rows.interval.tolist()) == set(range(4))
    for interval in range(4):
        here = rows.interval == interval
        for name, values in (("loss", loss), ("error", errors), ("grad_norm", norms)):
            expected = float(values[here].detach().mean())
            assert metrics[f"guided/{name}/{interval}"] == pytest.approx(expected, rel=1e-3)
    assert metrics["guided/loss"] == pytest.approx(float(loss.detach().mean()), rel=1e-3)
    assert metrics["guided/ratio"] == pytest.approx(metrics["guided/loss"] / metrics["guided/original"])
    assert metrics["guided/gamma"] == pytest.approx(0.2 * metrics["guided/ratio"])
    assert not any(name.startswith("vanilla") for name in metrics)


@pytest.mark.parametrize("guided", [False, True])
def test_stored_targets_match_online_targets(guided):
    batch = batch_of(0)
    keys = [noise_key("row", row) for row in batch.ids]
    computed = online(caption_dropout=0.0).compute(batch, keys, guided=guided)
    columns = {
        **batch.columns,
        "noise_key": torch.tensor(keys),
        "interval": computed.interval.int(),
        "t": computed.t.int(),
        "x_target": computed.x_target.half().float(),
        **({"w": computed.w.flatten()} if guided else {}),
    }
    stored = StoredTargets(captions=CAPTIONS, schedule=TEACHER.schedule)
    read = stored(Batch(ids=batch.ids, columns=columns), guided=guided, step=7)
    for name in ("x", "eps", "z_t", "interval", "t", "c"):
        assert torch.equal(getattr(read, name), getattr(computed, name)), name
    assert (read.w is None) == (computed.w is None) == (not guided)
    assert not guided or torch.equal(read.w, computed.w)
    assert torch.equal(read.x_target, computed.x_target.half().float())


def test_targets_of_a_row_ignore_its_batch():
    batch, targets = batch_of(0), online()
    whole = targets(batch, guided=True, step=5)
    first, second = (targets(part, guided=True, step=5) for part in batch.split(4))
    for name in ("eps", "interval", "w", "c", "z_t"):
        parts = torch.cat([getattr(first, name), getattr(second, name)])
        torch.testing.assert_close(parts, getattr(whole, name))
    assert not torch.equal(targets(batch, guided=True, step=6).eps, whole.eps)


def run(state, objective, *, settings=LOOP, batches=None, **options):
    batches = batches or (batch_of(step) for step in itertools.count(state.step))
    train(state, objective=objective, batches=batches, settings=settings, micro_batch=8, **options)


def test_killed_and_resumed_training_is_identical(tmp_path):
    whole = new_state(student(), settings=LOOP)
    results = []
    run(whole, objective_of(cfg_probability=0.5), after_step=results.append)
    assert {name.split("/")[0] for name in results[-1].metrics} == {"vanilla", "guided"}

    store, killed = CheckpointStore(str(tmp_path)), new_state(student(), settings=LOOP)

    def save_and_die(step):
        store.save(killed.step, tensors=killed.tensors(), values=killed.values())
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, objective_of(cfg_probability=0.5), after_step=save_and_die)
    resumed = new_state(student(seed=4), settings=LOOP)
    found = store.newest()
    resumed.restore(found.tensors, found.values)
    run(resumed, objective_of(cfg_probability=0.5))
    assert resumed.objective_state == whole.objective_state
    for group, named in whole.tensors().items():
        assert all(torch.equal(tensor, resumed.tensors()[group][name]) for name, tensor in named.items())


def test_loss_above_the_limit_names_the_rows():
    state = new_state(student(), settings=LOOP)
    limited = LOOP.model_copy(update={"max_loss": 1e-6})
    with pytest.raises(DivergedError, match=r"above max_loss 1e-06; the batch is rows 0-0") as caught:
        run(state, objective_of(), settings=limited)
    assert caught.value.rows == [f"0-{row}" for row in range(8)]
    assert state.step == 0


def test_velocity_loss_of_a_row_ignores_its_batch():
    objective = velocity_objective()
    batch = batch_of(0)
    loss = objective(TEACHER.unet, batch, step=2)
    parts = torch.cat([objective(TEACHER.unet, part, step=2) for part in batch.split(3)])
    torch.testing.assert_close(parts, loss, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(objective(TEACHER.unet, batch, step=3), loss)


def test_student_learns_the_velocity():
    objective = velocity_objective()
    settings = LOOP.model_copy(update={"num_steps": 30, "learning_rate": 5e-3})
    state, results, batch = new_state(student(), settings=settings), [], batch_of(0)
    black = Batch(ids=batch.ids, columns={**batch.columns, "latent": torch.zeros(8, 4, 8, 8)})
    run(state, objective, settings=settings, batches=itertools.repeat(black), after_step=results.append)
    losses = [result.loss for result in results]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_timesteps_and_caption_dropout_are_distributed():
    keys = range(4000)
    times = draw_timesteps(keys, schedule=TEACHER.schedule)
    assert 0 <= int(times.min()) < 5
    assert 994 < int(times.max()) <= 999
    assert float(times.float().mean()) == pytest.approx(499.5, abs=15)
    assert float(draw_caption_dropout(keys, fraction=0.1).float().mean()) == pytest.approx(0.1, abs=0.015)
    assert not draw_caption_dropout(keys, fraction=0.0).any()


def test_captions_of_a_step_are_encoded_once(monkeypatch):
    calls, encode_text = [], TEACHER.encode_text
    monkeypatch.setattr(TEACHER, "encode_text", lambda ids: calls.append(len(ids)) or encode_text(ids))
    objective, captions = objective_of(gamma=0.2, caption_dropout=0.5), CAPTIONS
    for step in range(2):
        batch = batch_of(step)
        objective(student(), batch, step=step)
        dropped = draw_caption_dropout(range(8), fraction=0.5)
        c = captions.encode(batch["token_ids"], dropped=dropped)
        assert torch.equal(c[dropped], captions.null.expand_as(c[dropped]))
        assert torch.equal(c[~dropped], encode_text(batch["token_ids"])[~dropped])
    assert calls == [8, 8]


def test_dropped_caption_is_the_empty_one():
    c = CAPTIONS.encode(TEACHER.tokenize(["red", "red"]), dropped=torch.tensor([True, False]))
    assert torch.equal(c[:1], CAPTIONS.null)
    assert torch.equal(c[1:], CAPTIONS.encode(TEACHER.tokenize(["red"])))


def test_interval_of_a_timestep():
    objective = objective_of()
    grid = time_grid(4)
    assert objective._interval_at(torch.tensor(grid[:-1])).tolist() == [0, 1, 2, 3]
    assert objective._interval_at(torch.tensor([grid[1] + 1, grid[1], 0])).tolist() == [0, 1, 3]


def test_moving_averages_start_as_means_per_group():
    means = MovingAverages(["a", "b"], groups=2, decay=0.75)
    assert means.get("a") is None
    for value in (1.0, 3.0):
        means.add("a", torch.tensor([value, value + 1]), group=torch.tensor([0, 1]))
        means.end_step()
    assert (means.get("a"), means.get("a", 0), means.get("a", 1)) == (2.5, 2.0, 3.0)
    assert means.get("b") is None
    for _ in range(3):
        means.add("a", torch.tensor([0.0]), group=torch.tensor([0]))
        means.end_step()
    assert means.get("a", 0) == pytest.approx(2.0 * (2 / 3) * 0.75 * 0.75)
    assert means.get("a", 1) == 3.0
    again = MovingAverages(["a", "b"], groups=2, decay=0.75)
    again.load_state_dict(means.state_dict())
    assert again.state_dict() == means.state_dict()
    with pytest.raises(ValueError, match="other names or another number"):
        MovingAverages(["a"], groups=2, decay=0.75).load_state_dict(means.state_dict())


def test_w_conditioned_student_takes_one_pass():
    torch.manual_seed(5)
    unet = with_guidance_embedding(tiny_bundle(3).unet).requires_grad_(requires_grad=True)
    nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.1)
    sizes = []
    unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    changes = {"cfg_probability": 1.0, "w_conditioned": True}
    batch = batch_of(0)
    rows = online()(batch, guided=True, step=0)
    loss = objective_of(gamma=0.0, **changes)(unet, batch, step=0)
    w = guidance_embedding(rows.w.flatten())
    v = unet(rows.z_t, rows.t, encoder_hidden_states=rows.c, timestep_cond=w).sample
    torch.testing.assert_close(loss, loss_of(v, rows), rtol=1e-4, atol=1e-6)
    objective_of(**changes)(unet, batch, step=0).sum().backward()
    assert sizes == [8, 8, 16]
    assert unet.time_embedding.cond_proj.weight.grad.abs().max() > 0
    with pytest.raises(SettingsError, match="no unguided pass"):
        StepDistillationSettings.parse({"w_conditioned": True, "original_times": "grid"})
