"""Eq. 6 and Eq. 11 as objectives: what is drawn, what is weighed, where the gradient goes, what resumes."""

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


@pytest.fixture(scope="module")
def teacher():
    bundle = tiny_bundle()
    bundle.prediction_type = "v_prediction"
    return bundle


@pytest.fixture(scope="module")
def captions(teacher):
    return CaptionEncoder(teacher)


def student(seed=3):
    return tiny_bundle(seed).unet.requires_grad_(requires_grad=True).train()


def batch_of(step, *, teacher, rows=8):
    ids = tuple(f"{step}-{row}" for row in range(rows))
    latent = gaussian_batch([noise_key(row) for row in ids], (4, 8, 8))
    return Batch(
        ids=ids, columns={"latent": latent, "token_ids": teacher.tokenize(["red", "re"] * (rows // 2))}
    )


def online(teacher, captions, settings):
    return OnlineTargets(
        teacher,
        captions=captions,
        settings=settings,
        seed=0,
    )


def objective_of(teacher, captions, *, lessons=None, **changes):
    settings = StepDistillationSettings(**{"student_steps": 4, "cfg_range": RANGE, **changes})
    lessons = lessons or online(teacher, captions, settings)
    return StepDistillationObjective(
        settings, targets=lessons, captions=captions, schedule=teacher.schedule, seed=0
    )


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_branches_follow_from_seed_and_step_in_the_asked_proportion():
    drawn = [is_guided_step(0, step, 0.1) for step in range(4000)]
    assert sum(drawn) / 4000 == pytest.approx(0.1, abs=0.015)
    assert drawn == [is_guided_step(0, step, 0.1) for step in range(4000)]
    assert drawn != [is_guided_step(1, step, 0.1) for step in range(4000)]
    assert not any(is_guided_step(0, step, 0.0) for step in range(100))
    assert all(is_guided_step(0, step, 1.0) for step in range(100))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_formula_through_every_pass(teacher, captions, p):
    batch, unet = batch_of(0, teacher=teacher), student()
    settings = StepDistillationSettings(student_steps=4, cfg_range=RANGE, gamma=0.0, cfg_probability=p)
    objective = objective_of(teacher, captions, gamma=0.0, cfg_probability=p)
    lesson = online(teacher, captions, settings)(batch, guided=p == 1.0, step=0)
    assert (lesson.w is None) == (p == 0.0)

    def formula(uncond_passes_gradient):
        cond = unet(lesson.z_t, lesson.t, encoder_hidden_states=lesson.c).sample
        v = cond
        if lesson.w is not None:
            null = captions.null.expand_as(lesson.c)
            uncond = unet(lesson.z_t, lesson.t, encoder_hidden_states=null).sample
            v = guide(cond=cond, uncond=uncond if uncond_passes_gradient else uncond.detach(), w=lesson.w)
        x_hat = teacher.schedule.from_v(v=v, z_t=lesson.z_t, t=lesson.t).x
        return distillation_loss(x_hat, x_target=lesson.x_target, t=lesson.t, schedule=teacher.schedule)

    expected = formula(uncond_passes_gradient=True)
    loss = objective(unet, batch, step=0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    found, wanted = gradients(unet, loss.sum()), gradients(unet, expected.sum())
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * scale)
    if p == 1.0:
        partial = gradients(unet, formula(uncond_passes_gradient=False).sum())
        assert max(
            float((mine - theirs).abs().max()) for mine, theirs in zip(found, partial, strict=True)
        ) > (0.01 * scale)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_student_that_is_the_teacher_with_k_1_has_no_distillation_loss(teacher, captions, p):
    objective = objective_of(teacher, captions, gamma=0.0, cfg_probability=p, k=1)
    loss = objective(teacher.unet, batch_of(0, teacher=teacher), step=0)
    assert loss.max() < 1e-7


class Constant(nn.Module):
    """Says the same velocity whatever it is asked."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.1))

    def forward(self, z_t, t, *, encoder_hidden_states, return_dict):
        assert not return_dict
        return (self.value.expand_as(z_t),)


@pytest.mark.parametrize(("original_times", "micro_batch"), [("schedule", 4), ("schedule", 8), ("grid", 8)])
def test_the_original_losss_share_follows_gamma_whatever_the_accumulation(
    teacher, captions, original_times, micro_batch
):
    taught, settings = {}, StepDistillationSettings(student_steps=4, cfg_range=RANGE)
    lessons = online(teacher, captions, settings)

    def once(batch, *, guided, step):
        return taught.setdefault(batch.ids, lessons(batch, guided=guided, step=step))

    def of_gamma(gamma):
        changes = {"gamma": gamma, "cfg_probability": 0.5, "ratio_decay": 0.9}
        return objective_of(teacher, captions, lessons=once, original_times=original_times, **changes)

    model, shares, gammas = Constant(), {True: [], False: []}, []
    objective, alone = of_gamma(0.2), of_gamma(0.0)
    for step in range(30):
        guided = objective.guided(step)
        gammas.append(objective.gamma(guided=guided))
        parts = list(batch_of(step, teacher=teacher).split(micro_batch))
        total, distillation = (
            float(torch.cat([loss(model, part, step=step) for part in parts]).detach().mean())
            for loss in (objective, alone)
        )
        shares[guided].append((total - distillation) / distillation)
        objective.end_step()
    for branch in shares.values():
        assert branch[0] == pytest.approx(0.0, abs=1e-6)  # nothing is known in the first step
        # A ratio of means against a mean of ratios, over few rows: a fifth of it.
        assert sum(branch[3:]) / len(branch[3:]) == pytest.approx(0.2, rel=0.3)
    assert len(set(gammas)) > 20


def test_gamma_is_the_same_whatever_the_accumulation(teacher, captions):
    ends = []
    for micro_batch in (2, 3, 8):
        objective = objective_of(teacher, captions)
        for step in range(3):
            for part in batch_of(step, teacher=teacher).split(micro_batch):
                objective(teacher.unet, part, step=step)
            objective.end_step()
        ends.append(objective.gamma(guided=False))
    assert ends[1:] == pytest.approx(ends[:1] * 2, rel=1e-5)


def test_constant_gamma_is_itself(teacher, captions):
    objective = objective_of(teacher, captions, gamma=0.7, gamma_rule="constant")
    assert objective.gamma(guided=True) == 0.7


def test_figures_are_those_of_each_interval_and_the_gradient_norm_is_autograds(teacher, captions):
    settings = StepDistillationSettings(
        student_steps=4, cfg_range=RANGE, cfg_probability=1.0, caption_dropout=0.0
    )
    batch = batch_of(0, teacher=teacher, rows=16)
    lesson = online(teacher, captions, settings)(batch, guided=True, step=0)
    objective = objective_of(teacher, captions, cfg_probability=1.0, caption_dropout=0.0)
    objective(teacher.unet, batch, step=0)
    figures = objective.end_step()

    both = [torch.zeros_like(lesson.z_t).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        for said, c in zip(both, (lesson.c, captions.null.expand_as(lesson.c)), strict=True):
            said.copy_(teacher.unet(lesson.z_t, lesson.t, encoder_hidden_states=c).sample)
    x_hat = teacher.schedule.from_v(
        v=guide(cond=both[0], uncond=both[1], w=lesson.w), z_t=lesson.z_t, t=lesson.t
    ).x
    loss = distillation_loss(x_hat, x_target=lesson.x_target, t=lesson.t, schedule=teacher.schedule)
    norms = torch.stack(torch.autograd.grad(loss.sum(), both)).square().sum(dim=(0, 2, 3, 4)).sqrt()
    errors = (x_hat - lesson.x_target).square().mean(dim=(1, 2, 3))
    assert set(lesson.interval.tolist()) == set(range(4))
    for part in range(4):
        here = lesson.interval == part
        assert figures[f"guided/loss/{part}"] == pytest.approx(float(loss[here].detach().mean()), rel=1e-3)
        assert figures[f"guided/error/{part}"] == pytest.approx(float(errors[here].detach().mean()), rel=1e-3)
        assert figures[f"guided/grad_norm/{part}"] == pytest.approx(float(norms[here].mean()), rel=1e-3)
    assert figures["guided/loss"] == pytest.approx(float(loss.detach().mean()), rel=1e-3)
    assert figures["guided/ratio"] == pytest.approx(figures["guided/loss"] / figures["guided/original"])
    assert figures["guided/gamma"] == pytest.approx(0.2 * figures["guided/ratio"])
    assert not any(name.startswith("vanilla") for name in figures)


def test_a_stored_lesson_is_the_online_one_after_the_cast(teacher, captions):
    settings = StepDistillationSettings(student_steps=4, cfg_range=RANGE, caption_dropout=0.0)
    batch, lessons = batch_of(0, teacher=teacher), online(teacher, captions, settings)
    keys = [noise_key("row", row) for row in batch.ids]
    for guided in (False, True):
        made = lessons.compute(batch, keys, guided=guided)
        columns = {
            **batch.columns,
            "noise_key": torch.tensor(keys),
            "interval": made.interval.int(),
            "t": made.t.int(),
            "x_target": made.x_target.half().float(),
        }
        if guided:
            columns["w"] = made.w.flatten()
        stored = StoredTargets(captions=captions, schedule=teacher.schedule)
        read = stored(Batch(ids=batch.ids, columns=columns), guided=guided, step=7)
        for name in ("x", "eps", "z_t", "interval", "t", "c"):
            assert torch.equal(getattr(read, name), getattr(made, name)), name
        assert (read.w is None) == (made.w is None)
        assert made.w is None or torch.equal(read.w, made.w)
        assert torch.equal(read.x_target, made.x_target.half().float())


def test_a_rows_lesson_does_not_depend_on_its_batch(teacher, captions):
    settings = StepDistillationSettings(student_steps=4, cfg_range=RANGE)
    batch, lessons = batch_of(0, teacher=teacher), online(teacher, captions, settings)
    whole = lessons(batch, guided=True, step=5)
    first, second = (lessons(part, guided=True, step=5) for part in batch.split(4))
    for name in ("eps", "interval", "w", "c", "z_t"):
        parts = torch.cat([getattr(first, name), getattr(second, name)])
        torch.testing.assert_close(parts, getattr(whole, name))
    assert not torch.equal(lessons(batch, guided=True, step=6).eps, whole.eps)


def run(state, objective, *, teacher, micro_batch=8, after_step=lambda step: None, settings=LOOP):
    batches = (batch_of(step, teacher=teacher) for step in itertools.count(state.step))
    train(
        state,
        objective=objective,
        batches=batches,
        settings=settings,
        micro_batch=micro_batch,
        after_step=after_step,
    )


def test_killed_and_resumed_it_ends_with_the_same_bits_and_averages(teacher, captions, tmp_path):
    whole = new_state(student(), settings=LOOP)
    told = []
    run(whole, objective_of(teacher, captions, cfg_probability=0.5), teacher=teacher, after_step=told.append)
    assert {name.split("/")[0] for name in told[-1].metrics} == {"vanilla", "guided"}

    store, killed = CheckpointStore(str(tmp_path)), new_state(student(), settings=LOOP)

    def save_and_die(step):
        store.save(killed.step, tensors=killed.tensors(), values=killed.values())
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            killed,
            objective_of(teacher, captions, cfg_probability=0.5),
            teacher=teacher,
            after_step=save_and_die,
        )
    resumed = new_state(student(seed=4), settings=LOOP)
    found = store.newest()
    resumed.restore(found.tensors, found.values)
    run(resumed, objective_of(teacher, captions, cfg_probability=0.5), teacher=teacher)
    assert resumed.objective_state == whole.objective_state
    for group, named in whole.tensors().items():
        assert all(torch.equal(tensor, resumed.tensors()[group][name]) for name, tensor in named.items())


def test_a_loss_above_its_limit_stops_and_names_the_rows(teacher, captions):
    state = new_state(student(), settings=LOOP)
    limited = LOOP.model_copy(update={"max_loss": 1e-6})
    with pytest.raises(
        DivergedError, match=r"step 0 is .*, above max_loss 1e-06; the batch is rows 0-0"
    ) as told:
        run(state, objective_of(teacher, captions), teacher=teacher, settings=limited)
    assert told.value.rows == [f"0-{row}" for row in range(8)]
    assert state.step == 0


def test_velocity_objective_is_eq_6_at_draws_of_each_row(teacher, captions):
    objective = VelocityObjective(VelocitySettings(), captions=captions, schedule=teacher.schedule, seed=0)
    batch = batch_of(0, teacher=teacher)
    loss = objective(teacher.unet, batch, step=2)
    parts = torch.cat([objective(teacher.unet, part, step=2) for part in batch.split(3)])
    torch.testing.assert_close(parts, loss, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(objective(teacher.unet, batch, step=3), loss)


def test_a_student_learns_the_velocity(teacher, captions):
    objective = VelocityObjective(VelocitySettings(), captions=captions, schedule=teacher.schedule, seed=0)
    settings = LOOP.model_copy(update={"num_steps": 30, "learning_rate": 5e-3})
    state, losses = new_state(student(), settings=settings), []
    batch = batch_of(0, teacher=teacher)
    black = Batch(ids=batch.ids, columns={**batch.columns, "latent": torch.zeros(8, 4, 8, 8)})
    train(
        state,
        objective=objective,
        batches=itertools.repeat(black),
        settings=settings,
        micro_batch=8,
        after_step=lambda step: losses.append(step.loss),
    )
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_times_cover_the_schedule_and_captions_are_dropped_in_the_asked_proportion(teacher):
    keys = range(4000)
    times = draw_timesteps(keys, schedule=teacher.schedule)
    assert 0 <= int(times.min()) < 5
    assert 994 < int(times.max()) <= 999
    assert float(times.float().mean()) == pytest.approx(499.5, abs=15)
    assert float(draw_caption_dropout(keys, fraction=0.1).float().mean()) == pytest.approx(0.1, abs=0.015)
    assert not draw_caption_dropout(keys, fraction=0.0).any()


def test_a_dropped_caption_is_the_empty_one(teacher, captions):
    c = captions.encode(teacher.tokenize(["red", "red"]), dropped=torch.tensor([True, False]))
    assert torch.equal(c[:1], captions.null)
    assert torch.equal(c[1:], captions.encode(teacher.tokenize(["red"])))


def test_times_belong_to_the_interval_they_lie_in(teacher, captions):
    objective = objective_of(teacher, captions)
    grid = time_grid(4)
    assert objective._interval_at(torch.tensor(grid[:-1])).tolist() == [0, 1, 2, 3]
    assert objective._interval_at(torch.tensor([grid[1] + 1, grid[1], 0])).tolist() == [0, 1, 3]


def test_moving_means_are_plain_means_first_and_keep_parts_apart():
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


def test_a_w_conditioned_student_is_told_w_and_answers_once(teacher, captions):
    torch.manual_seed(5)
    unet = with_guidance_embedding(tiny_bundle(3).unet).requires_grad_(requires_grad=True)
    nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.1)
    rows = []
    unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    changes = {"cfg_probability": 1.0, "w_conditioned": True}
    settings = StepDistillationSettings(student_steps=4, cfg_range=RANGE)
    batch = batch_of(0, teacher=teacher)
    lesson = online(teacher, captions, settings)(batch, guided=True, step=0)
    loss = objective_of(teacher, captions, gamma=0.0, **changes)(unet, batch, step=0)
    v = unet(
        lesson.z_t,
        lesson.t,
        encoder_hidden_states=lesson.c,
        timestep_cond=guidance_embedding(lesson.w.flatten()),
    ).sample
    x_hat = teacher.schedule.from_v(v=v, z_t=lesson.z_t, t=lesson.t).x
    expected = distillation_loss(x_hat, x_target=lesson.x_target, t=lesson.t, schedule=teacher.schedule)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    objective_of(teacher, captions, **changes)(unet, batch, step=0).sum().backward()
    assert rows == [8, 8, 16]
    assert unet.time_embedding.cond_proj.weight.grad.abs().max() > 0
    with pytest.raises(SettingsError, match="no unguided pass"):
        StepDistillationSettings.parse({"w_conditioned": True, "original_times": "grid"})
