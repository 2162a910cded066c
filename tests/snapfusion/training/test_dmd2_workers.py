"""DMD2 on two workers, replicated and sharded: the same as in one process, and resumed with the same bits."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dmd2_training import LOOP, run, state_of
from torch.nn.parallel import DistributedDataParallel

from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.fsdp import shard
from snapfusion.training.loop import StepResult

pytestmark = pytest.mark.slow
SHARES = (slice(0, 2), slice(2, 4))
KILLED_AFTER = 1


def shard_on_cpu(network):
    return shard(network, device=torch.device("cpu"))


def replicated(state):
    return {
        name: DistributedDataParallel(network.model, find_unused_parameters=True)
        for name, network in state.networks.items()
    }


def train_both(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for kind in ("replicated", "sharded"):
        for resumed in (False, True):
            state = state_of(made=shard_on_cpu) if kind == "sharded" else state_of()
            store = CheckpointStore(f"{folder}/{kind}{'-resumed' if resumed else ''}")
            if resumed:
                middle = CheckpointStore(f"{folder}/{kind}").load(KILLED_AFTER)
                state.restore(middle.tensors, middle.values)

            def save(step: StepResult, state=state, store=store) -> None:
                tensors = state.tensors()
                if rank == 0 and step.step in (KILLED_AFTER, LOOP.num_steps):
                    store.save(step.step, tensors=tensors, values=state.values())

            run(
                state,
                rows=SHARES[rank],
                micro_batch=1,
                wrapped=replicated(state) if kind == "replicated" else None,
                after_step=save,
            )
            dist.barrier()  # rank 0 has saved
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """The last checkpoint of each run."""
    folder = tmp_path_factory.mktemp("runs")
    mp.spawn(train_both, (str(folder),), nprocs=2)
    names = ("replicated", "replicated-resumed", "sharded", "sharded-resumed")
    return {name: CheckpointStore(f"{folder}/{name}").load(LOOP.num_steps) for name in names}


def difference(first, second):
    return max(
        (tensor - second[group][name]).abs().max().item()
        for group, named in first.items()
        for name, tensor in named.items()
    )


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_resumed_training_is_identical(kind, ends):
    assert difference(ends[kind].tensors, ends[f"{kind}-resumed"].tensors) == 0
    assert ends[kind].values == ends[f"{kind}-resumed"].values


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_workers_train_as_one_process(kind, ends):
    state = state_of()
    run(state, micro_batch=4)
    whole = {group: named for group, named in state.tensors().items() if "optimizer" not in group}
    assert difference(whole, ends[kind].tensors) < 1e-4
