"""Training of several networks: turns, what is read and written, resumption; and what is refused."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn
from training_batches import pairs_of
from two_networks import CRITIC, CRITIC_SETTINGS, SETTINGS, AdversarialObjective, critic, decoder, mean

from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.decoder import DecoderObjective, stored_images
from snapfusion.training.loop import new_state, train
from snapfusion.training.networks import MODEL, Networks
from snapfusion.training.state import StateError


def state_of(seed=0):
    model, other = decoder(seed), critic(seed + 1)
    return new_state(
        model,
        settings=SETTINGS,
        others={CRITIC: (other, CRITIC_SETTINGS)},
        averaged={MODEL: copy.deepcopy(model), CRITIC: copy.deepcopy(other)},
    )


def run(state, *, objective=None, steps=SETTINGS.num_steps, micro_batch=8, after_step=None):
    results = []
    train(
        state,
        objective=objective or AdversarialObjective(),
        batches=map(pairs_of, itertools.count(state.step)),
        settings=SETTINGS.model_copy(update={"num_steps": steps}),
        micro_batch=micro_batch,
        after_step=after_step or results.append,
    )
    return results


def snapshot(state):
    return {
        (group, name): tensor.clone()
        for group, named in state.tensors().items()
        for name, tensor in named.items()
    }


def changed(before, after):
    return {
        group
        for group, name in after
        if not torch.equal(before.get((group, name), torch.empty(0)), after[group, name])
    }


def test_step_changes_only_the_network_it_trains():
    state, seen = state_of(), []
    before = snapshot(state)

    def compare(step):
        nonlocal before
        after = snapshot(state)
        seen.append((step.network, changed(before, after)))
        before = after

    run(state, after_step=compare)
    of_model, of_critic = (
        {"model", "optimizer", "ema"},
        {f"critic-{group}" for group in ("model", "optimizer", "ema")},
    )
    assert seen[0] == (MODEL, of_model)
    assert seen[1:3] == [(CRITIC, of_critic)] * 2
    assert [name for name, _ in seen] == [MODEL, CRITIC, CRITIC] * 2 + [MODEL]
    assert {name: network.updates for name, network in state.networks.items()} == {MODEL: 3, CRITIC: 4}
    assert all(p.requires_grad and p.grad is None for p in state.networks[CRITIC].model.parameters())


def test_gradient_passes_through_the_networks_that_are_read():
    state, gradients = state_of(), []
    expected, judge = decoder(), critic()
    batch = pairs_of(0)
    image = expected(batch["latent"])
    error = mean((image - stored_images(batch)).square())
    (error.mean() - 0.1 * mean(judge(image)).mean()).backward()
    state.model.inlet.weight.register_hook(gradients.append)
    run(state, steps=1)
    torch.testing.assert_close(gradients[0], expected.inlet.weight.grad, rtol=1e-4, atol=1e-6)


class Both:
    """One loss of both networks."""

    averages = ()

    def turn(self, step):
        return MODEL, CRITIC

    def __call__(self, networks, batch, *, step):
        image = networks.trained[MODEL](batch["latent"])
        return mean(image.square()) + mean(networks.trained[CRITIC](image).square())


def test_step_trains_several_networks_by_one_loss():
    state, model, other, batch = state_of(), decoder(), critic(), pairs_of(0)
    image = model(batch["latent"])
    (mean(image.square()) + mean(other(image).square())).mean().backward()
    before = snapshot(state)
    (result,) = run(state, objective=Both(), steps=1, micro_batch=3)
    groups = {"model", "optimizer", "ema"}
    assert changed(before, snapshot(state)) == groups | {f"critic-{group}" for group in groups}
    for network, found in ((model, result.grad_norm), (other, result.metrics["critic/grad_norm"])):
        norm = torch.stack([weight.grad.norm() for weight in network.parameters()]).norm()
        assert found == pytest.approx(float(norm), rel=1e-4)
    assert (result.network, state.networks[CRITIC].updates) == (MODEL, 1)


def test_each_network_has_its_own_optimizer_and_average():
    state = state_of()
    results = run(state, steps=3)
    assert [result.learning_rate for result in results[1:]] == [pytest.approx(3e-3)] * 2
    assert results[0].learning_rate == pytest.approx(1e-3)
    assert state.networks[CRITIC].ema.decay == 0.8
    # An average over the first update alone is that update's weights.
    for name, tensor in state.ema.averages.items():
        torch.testing.assert_close(tensor, state.model.state_dict()[name])
        assert torch.equal(tensor, state.ema.module.state_dict()[name])


@pytest.mark.parametrize(("killed_after", "micro_batch"), [(1, 8), (2, 3), (4, 3), (6, 8)])
def test_killed_and_resumed_run_is_identical(tmp_path, killed_after, micro_batch):
    whole = state_of()
    run(whole, micro_batch=micro_batch)
    store, killed = CheckpointStore(str(tmp_path)), state_of()

    def save_and_die(step):
        store.save(killed.step, tensors=killed.tensors(), values=killed.values())
        if step.step == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, micro_batch=micro_batch, after_step=save_and_die)
    resumed, found = state_of(seed=5), store.newest()
    resumed.restore(found.tensors, found.values)
    run(resumed, micro_batch=micro_batch)
    assert resumed.values() == whole.values()
    assert changed(snapshot(whole), snapshot(resumed)) == set()


def test_state_of_other_networks_is_refused():
    state = state_of()
    run(state, steps=2)
    alone = new_state(decoder(), settings=SETTINGS)
    with pytest.raises(
        StateError, match=r"holds \['critic-ema', .*\['ema', 'model', 'optimizer'\] is needed"
    ):
        alone.restore(state.tensors(), state.values())


class Carrying:
    """A loss that carries something else."""

    def __init__(self, carried):
        self.carried = carried

    def __call__(self, model, batch, *, step):
        return mean(model(batch["latent"]).square())


@pytest.mark.parametrize(
    ("carry", "path"),
    [
        (lambda net: net, r"Carrying\.carried\.inlet\.weight"),
        (lambda net: {"nets": [net.eval()]}, r"Carrying\.carried\.nets\.0\.inlet\.weight"),
        (lambda net: functools.partial(print, net), r"Carrying\.carried\.args\.0\.inlet\.weight"),
        (lambda net: lambda x: net(2 * x), r"Carrying\.carried\.net\.inlet\.weight"),
        (lambda net: Carrying(net.forward), r"Carrying\.carried\.carried\.__self__\.inlet\.weight"),
        (lambda net: net.inlet.weight, r"Carrying\.carried"),
        (lambda net: torch.optim.SGD(net.requires_grad_(False).parameters()), r"Carrying\.carried"),
    ],
)
def test_trainable_state_outside_the_networks_is_refused(carry, path):
    state = new_state(decoder(), settings=SETTINGS)
    with pytest.raises(
        StateError, match=rf"^{path} is trained and is none of the training's networks \(model\)"
    ):
        run(state, objective=Carrying(carry(critic())))
    assert state.step == 0


def test_frozen_and_trained_networks_may_be_carried():
    state = new_state(decoder(), settings=SETTINGS)
    frozen = critic().requires_grad_(requires_grad=False)
    run(state, objective=Carrying([frozen, state.model, nn.Identity()]), steps=1)
    assert state.step == 1


def test_turns_and_averages_must_exist():
    with pytest.raises(StateError, match="does not say whose turn a step is, of model, critic"):
        run(state_of(), objective=DecoderObjective(stored_images))
    alone = new_state(decoder(), settings=SETTINGS)
    with pytest.raises(StateError, match="reads the averaged weights of 'model', which the state has not"):
        run(alone, objective=AdversarialObjective())
    settings = SETTINGS.model_copy(update={"ema_decay": None})
    with pytest.raises(ValueError, match="ema_decay is null"):
        new_state(decoder(), settings=settings, averaged={MODEL: decoder()})

    class Nobody(AdversarialObjective):
        def turn(self, step):
            return ("nobody",)

    with pytest.raises(StateError, match="step 0 trains 'nobody'; the networks are model, critic"):
        run(state_of(), objective=Nobody())


def test_objectives_see_bare_networks_and_averages():
    seen = []

    class Seeing(AdversarialObjective):
        def __call__(self, networks, batch, *, step):
            seen.append(networks)
            assert [p.requires_grad for p in networks.bare[MODEL].parameters()] == [step % 3 == 0] * 6
            return super().__call__(networks, batch, step=step)

    state = state_of()
    run(state, objective=Seeing(), steps=2)
    assert seen[0] == Networks(
        trained={MODEL: state.model},
        bare={MODEL: state.model, CRITIC: state.networks[CRITIC].model},
        averages={MODEL: state.ema.module, CRITIC: state.networks[CRITIC].ema.module},
    )
    assert not any(p.requires_grad for module in seen[0].averages.values() for p in module.parameters())
