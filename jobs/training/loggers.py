"""What a training says of itself as it goes, written for TensorBoard, Weights & Biases or MLflow.

A run that was killed goes on from its last checkpoint and says some steps again. Each writer sees to it that
they are not there twice, and `Loggers.flush`, called before a checkpoint is saved, that none is missing.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import fsspec
import numpy as np

from jobs.training.settings import LoggerKind
from pipelines.storage.objects import absolute_url, is_local

_PROJECT = "snapfusion"
_OPTIONAL: tuple[LoggerKind, ...] = ("wandb", "mlflow")
_MLFLOW_URI = "MLFLOW_TRACKING_URI"


class LoggerError(ValueError):
    """A logbook that cannot be kept here; the message says what is missing."""


class Logger(Protocol):
    """One place that figures are written to."""

    def scalars(self, figures: Mapping[str, float], *, step: int) -> None:
        """Write the figures of a step, which is counted from 1."""
        ...

    def picture(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """Write a picture, uint8 [H,W,3]."""
        ...

    def flush(self) -> None:
        """See that what was written outlives this process."""
        ...

    def close(self) -> None:
        """Write no more."""
        ...


class Loggers:
    """The writers of one training, and the folder that they may keep files in.

    On a disk that is `url` itself; what belongs into an object store is written to a folder of this machine,
    and put there by `flush`.

    Args:
        kinds: which writers.
        url: a folder of its own for this training.
        run: names this training for writers that keep all of them in one place; the same when it goes on.
        name: what people call it.
        done: steps that are done already; what was said of later ones is void.
        settings: kept beside the figures, where there is a place for them.
    """

    def __init__(
        self,
        kinds: Sequence[LoggerKind],
        *,
        url: str,
        run: str,
        name: str,
        done: int,
        settings: Mapping[str, Any],
    ) -> None:
        self._url, self._scratch = absolute_url(url), None
        if is_local(url):
            self._folder = Path(self._url)
        else:
            self._scratch = tempfile.TemporaryDirectory()
            self._folder = Path(self._scratch.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writers: list[Logger] = []
        for kind in kinds:
            if kind == "tensorboard":
                self._writers.append(TensorBoardLogger(self._folder, done=done))
            elif kind == "wandb":
                self._writers.append(WandbLogger(self._folder, run=run, name=name, settings=settings))
            else:
                self._writers.append(MlflowLogger(run=run, name=name, settings=settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.close()
        self._put()
        if self._scratch is not None:
            self._scratch.cleanup()

    def scalars(self, figures: Mapping[str, float], *, step: int) -> None:
        """Write the figures of a step, which is counted from 1."""
        for writer in self._writers:
            writer.scalars(figures, step=step)

    def picture(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """Write a picture, uint8 [H,W,3]."""
        for writer in self._writers:
            writer.picture(name, pixels, step=step)

    def flush(self) -> None:
        """See that what was written outlives this process."""
        for writer in self._writers:
            writer.flush()
        self._put()

    def _put(self) -> None:
        if self._scratch is None:
            return
        filesystem, root = fsspec.core.url_to_fs(self._url)
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                filesystem.put_file(str(path), f"{root}/{path.relative_to(self._folder).as_posix()}")


class TensorBoardLogger:
    """Event files in a folder; readers drop from older ones what a newer one begins with."""

    def __init__(self, folder: Path, *, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import, which only a worker needs

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def scalars(self, figures: Mapping[str, float], *, step: int) -> None:
        """See `Logger`."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """See `Logger`."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """See `Logger`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases, which refuses steps below those that it has. Its own variables configure it.

    WANDB_PROJECT (by default "snapfusion"), WANDB_MODE, WANDB_API_KEY; WANDB_DIR, by default the folder.
    """

    def __init__(self, folder: Path, *, run: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            id=run,
            name=name,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def scalars(self, figures: Mapping[str, float], *, step: int) -> None:
        """See `Logger`."""
        self._run.log(dict(figures), step=step)

    def picture(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """See `Logger`."""
        self._run.log({name: self._image(pixels)}, step=step)

    def flush(self) -> None:
        """Nothing to do: another process writes, and outlives this one."""

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()


class MlflowLogger:
    """A run of the MLflow server that MLFLOW_TRACKING_URI names, where equal steps stand beside each other.

    So it writes no step that is there already. MLFLOW_EXPERIMENT_NAME is by default "snapfusion".
    """

    _TAG = "snapfusion.run"

    def __init__(self, *, run: str, name: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        found = self._client.search_runs([experiment], filter_string=f"tags.`{self._TAG}` = '{run}'")
        self._continued, self._there = bool(found), dict[str, int]()
        if found:
            self._id = found[0].info.run_id
        else:
            made = self._client.create_run(experiment, run_name=name, tags={self._TAG: run})
            self._id = made.info.run_id
            params = [Param(key, str(value)[:500]) for key, value in _flatten(settings)]
            for start in range(0, len(params), 100):  # as many as a server takes at once
                self._client.log_batch(self._id, params=params[start : start + 100])

    def scalars(self, figures: Mapping[str, float], *, step: int) -> None:
        """See `Logger`."""
        now = int(time.time() * 1000)
        new = {name: float(value) for name, value in figures.items() if step > self._last(name)}
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, now, step) for name, value in new.items()]
        )

    def picture(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """See `Logger`."""
        self._client.log_image(self._id, pixels, artifact_file=f"{name}/step-{step:08d}.png")

    def flush(self) -> None:
        """Nothing to do: the server has what it answered for."""

    def close(self) -> None:
        """See `Logger`."""
        self._client.set_terminated(self._id)

    def _last(self, name: str) -> int:
        """The last step that was there of a figure when this process began; 0 if none was."""
        if self._continued and name not in self._there:
            history = self._client.get_metric_history(self._id, name)
            self._there[name] = max((metric.step for metric in history), default=0)
        return self._there.get(name, 0)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_loggers(kinds: Sequence[LoggerKind]) -> None:
    """See that all `kinds` can be written, before any work begins.

    Raises:
        LogbookError: if a package is not installed, or MLflow's place is not said.
    """
    for kind in _OPTIONAL:
        if kind in kinds and find_spec(kind) is None:
            raise LoggerError(
                f"trainer.log_to names {kind}, which is not installed: "
                f"pip install -c infra/constraints.txt -e '.[{kind}]'"
            )
    if "mlflow" in kinds and not os.environ.get(_MLFLOW_URI):
        raise LoggerError(
            f"trainer.log_to names mlflow: set {_MLFLOW_URI} to its server, as in http://mlflow:5000"
        )
