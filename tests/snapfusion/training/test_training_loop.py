"""The training loop: resumption, accumulation, errors; EMA, learning rate, the decoder's objective."""

import copy
import itertools

import pytest
import torch
from torch import nn
from training_batches import pairs_of

from snapfusion.training.batch import Batch
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.decoder import DecoderObjective, decoded_images, stored_images
from snapfusion.training.ema import Ema
from snapfusion.training.learning_rate import learning_rate
from snapfusion.training.loop import NonFiniteLossError, new_state, train
from snapfusion.training.settings import LoopSettings
from snapfusion.training.state import StateError

SETTINGS = LoopSettings(num_steps=6, global_batch=8, learning_rate=0.01, warmup_steps=2, ema_decay=0.9)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 1))


OBJECTIVE = DecoderObjective(stored_images)


def state_of(**changes):
    return new_state(network(**changes), settings=SETTINGS)


def run(state, *, settings=SETTINGS, micro_batch=8, objective=OBJECTIVE, source=None, after_step=None):
    steps, source = [], source or map(pairs_of, itertools.count(state.step))
    options = {"micro_batch": micro_batch, "after_step": after_step or steps.append}
    train(state, objective=objective, batches=source, settings=settings, **options)
    return steps


def assert_equal(first, second):
    for group, named in first.tensors().items():
        for name, tensor in named.items():
            assert torch.equal(tensor, second.tensors()[group][name]), (group, name)


def test_loss_falls_and_steps_are_reported():
    state = state_of()
    steps = run(state)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1].loss < steps[0].loss
    assert all(0.0 <= step.data_seconds <= step.seconds for step in steps)
    assert state.step == 6


def test_fused_updates_are_those_of_version_0_1_up_to_rounding():
    constant = {"ema_decay": None, "decay": "constant"}
    fused, single = (SETTINGS.model_copy(update={**constant, "arithmetic": version}) for version in (2, 1))
    states = [new_state(network(), settings=settings) for settings in (fused, single)]
    assert [state.optimizer.defaults["fused"] for state in states] == [True, False]
    for state, settings in zip(states, (fused, single), strict=True):
        run(state, settings=settings)
    found, expected = (state.final_weights() for state in states)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_finished_state_is_unchanged():
    state = state_of()
    state.step = 6
    assert run(state, source=iter(())) == []


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_killed_and_resumed_run_is_identical(tmp_path, killed_after):
    whole = state_of()
    run(whole)

    store = CheckpointStore(str(tmp_path))
    killed = state_of()

    def save_and_die(step):
        killed.curve.append({"step": step.step, "loss": step.loss})
        store.save(killed.step, tensors=killed.tensors(), values=killed.values())
        if step.step == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, after_step=save_and_die)
    resumed = state_of(seed=1)  # its initial weights must not matter
    found = store.newest()
    resumed.restore(found.tensors, found.values)
    assert (resumed.step, len(resumed.curve)) == (killed_after, killed_after)
    run(resumed)
    assert_equal(whole, resumed)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_accumulation_matches_the_whole_batch(micro_batch):
    whole, pieces = (state_of() for _ in range(2))
    steps = run(whole)
    more = run(pieces, micro_batch=micro_batch)
    for step, other in zip(steps, more, strict=True):
        assert other.loss == pytest.approx(step.loss, rel=1e-5)
    # float32 sums in another order, which Adam's division amplifies while moments are small.
    for name, tensor in whole.final_weights().items():
        torch.testing.assert_close(pieces.final_weights()[name], tensor, rtol=0, atol=1e-5)


def test_nan_loss_names_its_rows():
    state = state_of()
    broken = pairs_of(0)
    broken["latent"][3] = float("nan")
    broken["latent"][6, 0, 0, 0] = float("inf")
    before = copy.deepcopy(state.model.state_dict())
    with pytest.raises(NonFiniteLossError, match=r"step 0 is not finite in rows 0-3, 0-6$"):
        run(state, source=iter([broken]), micro_batch=4)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.model.state_dict().items())
    assert state.step == 0


def test_nan_gradient_names_its_batch():
    def objective(model, batch, *, step):
        return (model(batch["latent"]).square().mean(dim=(1, 2, 3)) * 0.0).sqrt()

    with pytest.raises(NonFiniteLossError, match=r"gradient of step 0 is nan; the batch is rows 0-0, 0-1"):
        run(state_of(), objective=objective)


def test_batch_of_another_size_fails():
    with pytest.raises(ValueError, match="step 0 got 5 rows; the global batch is 8"):
        run(state_of(), source=iter([pairs_of(0, rows=slice(5))]))


def test_loss_that_is_not_per_row_fails():
    with pytest.raises(ValueError, match=r"float32 \[8\], the loss of each row"):
        run(state_of(), objective=lambda model, batch, step: model(batch["latent"]).mean())


def test_bfloat16_keeps_losses_and_weights_in_float32():
    dtypes = []

    def objective(model, batch, *, step):
        dtypes.append(model(batch["latent"]).dtype)
        return OBJECTIVE(model, batch, step=step)

    state = state_of()
    settings = SETTINGS.model_copy(update={"precision": "bfloat16", "num_steps": 1})
    run(state, settings=settings, objective=objective)
    assert dtypes == [torch.bfloat16]
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}


def test_state_of_another_model_fails():
    state = state_of()
    run(state)
    other = new_state(nn.Sequential(nn.Conv2d(4, 3, 1)), settings=SETTINGS)
    with pytest.raises(StateError, match="does not fit"):
        other.restore(state.tensors(), state.values())
    bare = new_state(network(), settings=SETTINGS.model_copy(update={"ema_decay": None}))
    with pytest.raises(StateError, match="holds"):
        bare.restore(state.tensors(), state.values())


@pytest.mark.parametrize(("decay", "steps"), [(0.5, 1), (0.5, 2), (0.5, 40), (0.999, 5)])
def test_ema_is_the_weighted_mean_of_the_run(decay, steps):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1e6)  # initial weights have no share
    ema = Ema(model, decay=decay)
    for step in range(1, steps + 1):
        nn.init.constant_(model.weight, float(step**2))
        ema.update(model, step=step)
    shares = [decay ** (steps - step) for step in range(1, steps + 1)]
    mean = sum(share * step**2 for step, share in enumerate(shares, start=1)) / sum(shares)
    assert float(ema.averages["weight"]) == pytest.approx(mean, rel=1e-6)


def test_ema_of_version_0_1_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.5, of_run=False)
    nn.init.ones_(model.weight)
    ema.update(model, step=1)  # d = 2/11
    ema.update(model, step=99)  # d = 0.5
    assert float(ema.averages["weight"]) == pytest.approx(1 - 0.5 * 2 / 11)
    with pytest.raises(ValueError, match="decay is 1"):
        Ema(model, decay=1.0)


def test_learning_rate_schedule():
    def rate(step, decay="cosine"):
        settings = LoopSettings(num_steps=12, global_batch=1, learning_rate=1.0, warmup_steps=4, decay=decay)
        return learning_rate(step, num_steps=12, settings=settings)

    assert [rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(4) == 1.0
    assert rate(8) == pytest.approx(0.5)
    assert 0.0 < rate(11) < 0.05
    assert rate(11, "constant") == 1.0


def test_perfect_decoder_has_no_loss():
    batch = pairs_of(0)
    target = stored_images(batch)
    assert float(target.min()) >= -1.0
    assert float(target.max()) <= 1.0
    assert torch.equal(OBJECTIVE(lambda latent: target, batch, step=0), torch.zeros(8))

    teacher = network()
    online = DecoderObjective(decoded_images(teacher))
    losses = online(copy.deepcopy(teacher), batch, step=0)
    assert torch.equal(losses, torch.zeros(8))
    losses.sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_decoder_loss_is_per_row_mse():
    batch = pairs_of(0)
    student = stored_images(batch) + torch.arange(8.0).view(8, 1, 1, 1)
    losses = OBJECTIVE(lambda latent: student, batch, step=0)
    torch.testing.assert_close(losses, torch.arange(8.0).square(), rtol=1e-6, atol=0)


def test_batch_validates_its_columns():
    with pytest.raises(ValueError, match="'x' has 2 rows for 1 ids"):
        Batch(ids=("a",), columns={"x": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"no column 'image'; it has \['latent'\]"):
        Batch(ids=("a",), columns={"latent": torch.zeros(1)})["image"]
