"""Tests of training under Ray Train."""

import dataclasses
import json
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import torch
from student_inputs import TRAINER
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from jobs.training.callback import save_with_retries
from jobs.training.initial_state import initial_state
from jobs.training.progress_channel import report_line
from jobs.training.settings import TrainerSettings
from jobs.training.spec import Training, TrainingError
from jobs.training.trainer import resume, run_trainings
from pipelines.loading.loader import BatchLoader
from pipelines.loading.settings import LoaderSettings
from pipelines.tables.unit_files import UnitFile
from snapfusion.noise import gaussian, noise_key
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.loop import new_state, train
from snapfusion.training.settings import LoopSettings, NetworkSettings

SETTINGS = LoopSettings(num_steps=6, global_batch=8, learning_rate=0.01, ema_decay=0.9)


class Numbers:
    """A table of three units whose rows are numbers."""

    def __init__(self):
        self.units = [UnitFile(unit=f"u{index}", path=f"u{index}", rows=11, size=0) for index in range(3)]

    def read_unit(self, unit, columns=None):
        first = 11 * int(unit.unit[1:])
        rows = [{"id": f"r{number}", "noise_key": number} for number in range(first, first + 11)]
        return pa.Table.from_pylist(rows).select(columns)


class Regression:
    """A linear map is to find the sum of its noise; dies once, or meets a NaN, where it is configured to."""

    def __init__(self, *, die_at=None, marker=None, nan_at=None):
        self.die_at, self.marker, self.nan_at = die_at, marker, nan_at

    def __call__(self, model, batch, *, step):
        if step == self.die_at and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        noise = torch.stack([gaussian(noise_key(int(key)), (5,)) for key in batch["noise_key"]])
        losses = (model(noise)[:, 0] - noise.sum(dim=1)).square()
        return losses * float("nan") if step == self.nan_at else losses


def training(*, name="sums", **behaviour):
    torch.manual_seed(1)
    model = nn.Linear(5, 1)
    return Training(
        name=name,
        model=model,
        objective=Regression(**behaviour),
        loader=BatchLoader(
            Numbers(),
            columns=("noise_key",),
            global_batch=SETTINGS.global_batch,
            seed=SETTINGS.seed,
            settings=LoaderSettings(window_units=2),
        ),
        settings=SETTINGS,
        identity={"settings": SETTINGS.to_values()},
        evaluate=lambda: {"bias": float(model.bias.detach())},
    )


class UnpickledIn:
    """Leaves a file for each process that unpickles it, named by the process's rank in the training."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__.update(state)
        (self.folder / f"rank-{os.environ.get('RANK')}").touch()


class WithCritic:
    """As `Regression`, and a second map learns the first one's averaged output in two steps of three."""

    averages = ("model",)

    def turn(self, step):
        return ("critic",) if step % 3 else ("model",)

    def __call__(self, networks, batch, *, step):
        noise = torch.stack([gaussian(noise_key(int(key)), (5,)) for key in batch["noise_key"]])
        (name,) = self.turn(step)
        found = networks.trained[name](noise)[:, 0]
        if name == "model":
            return (found - noise.sum(dim=1) - networks.bare["critic"](noise)[:, 0]).square()
        return (found - networks.averages["model"](noise)[:, 0]).square()


def two_networks():
    torch.manual_seed(2)
    critic = nn.Linear(5, 1)
    others = {"critic": (critic, NetworkSettings(learning_rate=0.02, clip_norm=0.5))}
    return dataclasses.replace(training(name="two"), objective=WithCritic(), others=others)


def program(marker, unpickled_in, device):
    (unpickled_in.folder / "allocator").write_text(os.environ["MIMALLOC_PURGE_DELAY"])
    yield training(name="killed", die_at=3, marker=marker)
    yield training(name="whole")
    yield two_networks()
    yield training(name="broken", nan_at=3)


def weights_of_one_process(made):
    state = initial_state(made)
    with closing(made.loader.batches(0)) as batches:
        train(state, objective=made.objective, batches=batches, settings=SETTINGS, micro_batch=8)
    return state.tensors()


@pytest.mark.ray
def test_two_killed_workers_resume_to_the_same_weights(ray_cluster, tmp_path, monkeypatch):
    """One start of Ray Train for all trainings: one is killed, one has two networks, one meets a NaN."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    settings = TRAINER.model_copy(update={"micro_batch": 3})
    url, marker, reports = str(tmp_path / "checkpoints"), tmp_path / "died", []
    how = {"store_url": url, "settings": settings, "on_report": reports.append}
    with pytest.raises(TrainingError, match=r"loss of step 3 is not finite in rows r\d+, r\d+"):
        run_trainings(program, {"marker": str(marker), "unpickled_in": UnpickledIn(tmp_path)}, **how)
    assert marker.exists()
    # Not in Ray's controller, which would import all that the workers import.
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0", "rank-1"}
    assert (tmp_path / "allocator").read_text() == "-1"
    stopped = json.loads((tmp_path / "checkpoints" / "broken.stopped.json").read_text())
    assert stopped["step"] == 3
    assert len(set(stopped["rows"])) == SETTINGS.global_batch
    names = ("killed", "whole", "broken")
    killed, whole, broken = (CheckpointStore(f"{url}/{name}").newest() for name in names)
    assert (killed.step, whole.step, broken.step) == (6, 6, 2)
    assert killed.values == whole.values
    for group, named in whole.tensors.items():
        assert all(torch.equal(killed.tensors[group][name], tensor) for name, tensor in named.items())
    two = CheckpointStore(f"{url}/two").newest()
    assert two.values["state"]["updates"] == {"model": 2, "critic": 4}
    points = [
        (point["step"], "loss" in point, "critic/loss" in point) for point in two.values["state"]["curve"]
    ]
    assert points == [(step + 1, step % 3 == 0, step % 3 > 0) for step in range(6)]
    for checkpoint, made in ((killed, training()), (two, two_networks())):
        alone = weights_of_one_process(made)
        assert set(checkpoint.tensors) == set(alone)
        for group in checkpoint.tensors.keys() - {"optimizer", "critic-optimizer"}:
            for name, tensor in alone[group].items():
                # Two halves of a batch are summed apart: float32 rounding, passed on by six steps of Adam.
                torch.testing.assert_close(checkpoint.tensors[group][name], tensor, rtol=0, atol=1e-5)
    events = EventAccumulator(f"{url}/logs/killed")
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"loss", "grad_norm", "learning_rate", "steps_per_second", "data_wait"} <= names
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    curve = killed.values["state"]["curve"]
    assert logged == [(point["step"], pytest.approx(point["loss"])) for point in curve]
    assert {report["training"] for report in reports} == {"killed", "whole", "two", "broken"}


def test_checkpoints_of_another_training_are_refused(tmp_path):
    store = CheckpointStore(str(tmp_path))
    state = new_state(training().model, settings=SETTINGS)
    values = {"state": state.values(), "identity": {"settings": {"num_steps": 6, "seed": 1}}}
    store.save(0, tensors=state.tensors(), values=values)
    resume(state, store=store, identity={"settings": {"num_steps": 6, "seed": 1}}, rank=0)
    with pytest.raises(TrainingError, match=r"another training: settings\.num_steps is 6 there, 8 here"):
        resume(state, store=store, identity={"settings": {"num_steps": 8, "seed": 1}}, rank=0)


def test_a_checkpoint_survives_transient_store_errors(monkeypatch):
    store = CheckpointStore("memory://moments/unet")
    state = new_state(training().model, settings=SETTINGS)
    put, failures = store._fs.put_file, [OSError("SlowDown"), ConnectionResetError()]

    def failing(*words, **named):
        if failures:
            raise failures.pop()
        return put(*words, **named)

    monkeypatch.setattr(store._fs, "put_file", failing)
    monkeypatch.setattr("pipelines.storage.retry.sleep_with_jitter", lambda seconds: None)
    save_with_retries(store, 3, tensors=state.tensors(), values={"state": state.values(), "identity": {}})
    assert not failures
    assert store.newest().step == 3


def test_min_workers_are_at_most_all():
    assert TrainerSettings(num_workers=2, min_workers=2).min_workers == 2
    with pytest.raises(ValueError, match=r"at most num_workers \(2\) are accepted"):
        TrainerSettings(num_workers=2, min_workers=3)


def test_a_report_is_one_line():
    progress = {"training": "decoder", "step": 40, "num_steps": 400, "workers": 2, "loss": 0.01234567}
    speed = {"steps_per_second": 8.04, "seconds_left": 74.6, "data_wait": 0.026}
    assert report_line(progress | speed) == (
        "decoder 40/400 steps, loss 0.01235, 8.0 steps/s by 2 workers, 1 min 15 s left, 3% waiting for data"
    )
