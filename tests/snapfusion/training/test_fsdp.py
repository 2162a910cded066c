"""DDP and FSDP over two processes: training, saving and resuming, of one network and of several."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training_batches import pairs_of
from two_networks import CRITIC, CRITIC_SETTINGS, AdversarialObjective, critic, decoder

from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.decoder import DecoderObjective, stored_images
from snapfusion.training.fsdp import shard
from snapfusion.training.loop import new_state, train
from snapfusion.training.networks import MODEL
from snapfusion.training.settings import LoopSettings

SETTINGS = LoopSettings(num_steps=4, global_batch=8, learning_rate=1e-3, ema_decay=0.9, clip_norm=0.01)
SHARES = (slice(0, 4), slice(4, 8))
RUNS = {  # whether it is sharded, and the run whose checkpoint at step 2 it resumes
    "full": (False, None),
    "sharded": (True, None),
    "sharded, then sharded": (True, "sharded"),
    "sharded, then full": (False, "sharded"),
    "full, then sharded": (True, "full"),
    "two networks, full": (False, None),
    "two networks, full, then full": (False, "two networks, full"),
    "two networks, sharded": (True, None),
    "two networks, sharded, then sharded": (True, "two networks, sharded"),
    "two networks, sharded, then full": (False, "two networks, sharded"),
}


class Network(nn.Module):
    """With a list of blocks, each of which becomes an FSDP unit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Conv2d(4, 7, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(size, size + 2, 3, padding=1) for size in (7, 9, 11))
        self.outlet = nn.Conv2d(13, 3, 1)

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = torch.nn.functional.silu(block(x))
        return self.outlet(x)


def batches(start, *, rank):
    return (pairs_of(step, rows=SHARES[rank]) for step in itertools.count(start))


def initial_state(*, sharded, several):
    """The state of a training of one network or of two, and its objective."""

    def made(network):
        return shard(network, device=torch.device("cpu")) if sharded else network

    if not several:
        return new_state(made(Network()), settings=SETTINGS), DecoderObjective(stored_images)
    state = new_state(
        made(decoder()),
        settings=SETTINGS,
        others={CRITIC: (made(critic()), CRITIC_SETTINGS)},
        averaged={MODEL: made(decoder()), CRITIC: made(critic())},
    )
    return state, AdversarialObjective()


def run(folder, *, name, rank):
    sharded, origin = RUNS[name]
    state, objective = initial_state(sharded=sharded, several="two" in name)
    store = CheckpointStore(f"{folder}/{name}")
    if origin:
        middle = CheckpointStore(f"{folder}/{origin}").load(2)
        state.restore(middle.tensors, middle.values)

    def save(step):
        state.curve.append({"loss": step.loss, "grad_norm": step.grad_norm})
        tensors = state.tensors()
        if rank == 0 and step.step in (2, 4):
            store.save(step.step, tensors=tensors, values=state.values())

    train(
        state,
        objective=objective,
        batches=batches(state.step, rank=rank),
        settings=SETTINGS,
        micro_batch=3,
        wrapped=None if sharded else wrapped(state),
        after_step=save,
    )
    dist.barrier()  # rank 0 has saved


def wrapped(state):
    return {
        name: DistributedDataParallel(network.model, find_unused_parameters=True)
        for name, network in state.networks.items()
    }


def run_all(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name in RUNS:
        run(folder, name=name, rank=rank)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """The last checkpoint of each run."""
    folder = tmp_path_factory.mktemp("runs")
    mp.spawn(run_all, (str(folder),), nprocs=2)
    return {name: CheckpointStore(f"{folder}/{name}").load(4) for name in RUNS}


def difference(first, second):
    """Largest absolute difference of all tensors."""
    assert {group: named.keys() for group, named in first.tensors.items()} == {
        group: named.keys() for group, named in second.tensors.items()
    }
    return max(
        (tensor - second.tensors[group][name]).abs().max().item()
        for group, named in first.tensors.items()
        for name, tensor in named.items()
    )


def test_sharded_training_matches_full(ends):
    full, sharded = ends["full"], ends["sharded"]
    assert set(sharded.tensors) == {"model", "optimizer", "ema"}
    assert difference(full, sharded) < 1e-6
    for point, expected in zip(sharded.values["curve"], full.values["curve"], strict=True):
        assert point == pytest.approx(expected, rel=1e-5)
        assert point["grad_norm"] > SETTINGS.clip_norm


def test_sharded_training_resumes_bit_for_bit(ends):
    assert difference(ends["sharded"], ends["sharded, then sharded"]) == 0
    assert ends["sharded"].values == ends["sharded, then sharded"].values


def test_several_networks_are_trained_alike_and_resume(ends):
    full, sharded = ends["two networks, full"], ends["two networks, sharded"]
    groups = {"model", "optimizer", "ema", "critic-model", "critic-optimizer", "critic-ema"}
    assert set(full.tensors) == groups
    for kind, end in (("full", full), ("sharded", sharded)):
        resumed = ends[f"two networks, {kind}, then {kind}"]
        assert difference(end, resumed) == 0
        assert end.values == resumed.values
    for name in ("two networks, sharded", "two networks, sharded, then full"):
        assert difference(full, ends[name]) < 1e-6


def test_two_workers_train_as_one_process(ends):
    state, objective = initial_state(sharded=False, several=True)
    batches = map(pairs_of, itertools.count())
    train(state, objective=objective, batches=batches, settings=SETTINGS, micro_batch=8)
    for group, named in state.tensors().items():
        for name, tensor in named.items():
            other = ends["two networks, full"].tensors[group][name]
            torch.testing.assert_close(other, tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sharded, then full", "full, then sharded"])
def test_checkpoints_are_full(ends, name):
    assert difference(ends["full"], ends[name]) < 1e-6
