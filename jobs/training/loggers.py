"""Experiment loggers: TensorBoard, Weights & Biases, MLflow.

A run that was killed resumes from its last checkpoint and logs some steps again. Each logger makes sure that
no step appears twice; `Loggers.flush`, called before a checkpoint is saved, that none is missing.
"""

import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from jobs.training.settings import LoggerKind
from pipelines.storage.objects import is_local, local_path
from snapfusion.settings import flatten

_PROJECT = "snapfusion"
_OPTIONAL: tuple[LoggerKind, ...] = ("wandb", "mlflow")
_MLFLOW_URI = "MLFLOW_TRACKING_URI"


class LoggerError(ValueError):
    """A logger that cannot be used here; the message says what is missing."""


class Logger(ABC):
    """One destination of scalars and images."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Log scalars of a step, counted from 1."""

    @abstractmethod
    def image(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """Log an image, uint8 [H,W,3]."""

    @abstractmethod
    def close(self) -> None:
        """End the logger."""

    def flush(self) -> None:  # noqa: B027 - most loggers have nothing to do
        """Make everything logged so far outlive this process; unnecessary if a server or a daemon has it."""


class Loggers(AbstractContextManager["Loggers"]):
    """The loggers of one training, and the folder for their files.

    If `url` is in an object store, files are written to a local folder and uploaded by `flush`.

    Args:
        kinds: loggers to use.
        url: folder of this training alone.
        run: id of this training for loggers that keep all runs together; the same when it resumes.
        name: display name.
        done: steps done already; anything logged for later steps is superseded.
        settings: logged as parameters where the logger has them.
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
        self._url, self._scratch = url, None
        if is_local(url):
            self._folder = local_path(url)
        else:
            self._scratch = tempfile.TemporaryDirectory()
            self._folder = Path(self._scratch.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        makers = {
            "tensorboard": lambda: TensorBoardLogger(self._folder, done=done),
            "wandb": lambda: WandbLogger(self._folder, run=run, name=name, settings=settings),
            "mlflow": lambda: MlflowLogger(run=run, name=name, settings=settings),
        }
        self._loggers: list[Logger] = [makers[kind]() for kind in kinds]

    def __exit__(self, *error: object) -> None:
        for logger in self._loggers:
            logger.close()
        self._upload()
        if self._scratch is not None:
            self._scratch.cleanup()

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Log scalars of a step, counted from 1."""
        for logger in self._loggers:
            logger.scalars(values, step=step)

    def image(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """Log an image, uint8 [H,W,3]."""
        for logger in self._loggers:
            logger.image(name, pixels, step=step)

    def flush(self) -> None:
        """Make everything logged so far outlive this process."""
        for logger in self._loggers:
            logger.flush()
        self._upload()

    def _upload(self) -> None:
        if self._scratch is None:
            return
        filesystem, root = fsspec.core.url_to_fs(self._url)
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                filesystem.put_file(str(path), f"{root}/{path.relative_to(self._folder).as_posix()}")


class TensorBoardLogger(Logger):
    """Event files in a folder. Readers skip steps after `done` from older files: they are logged again."""

    def __init__(self, folder: Path, *, done: int) -> None:
        # Takes a second to import, and only workers need it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """See `Logger`."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """See `Logger`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._writer.close()


class WandbLogger(Logger):
    """A run of Weights & Biases, which ignores steps below its last one.

    Configured by WANDB_PROJECT (default "snapfusion"), WANDB_MODE, WANDB_API_KEY and WANDB_DIR (default the
    training's folder).
    """

    def __init__(self, folder: Path, *, run: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            id=run,
            name=name,
            resume="allow",  # the same id continues the run
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """See `Logger`."""
        self._run.log(dict(values), step=step)

    def image(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """See `Logger`."""
        self._run.log({name: self._image(pixels)}, step=step)

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()


class MlflowLogger(Logger):
    """A run of the MLflow server at MLFLOW_TRACKING_URI; MLFLOW_EXPERIMENT_NAME is by default "snapfusion".

    MLflow keeps equal steps side by side, so a resumed run leaves out steps that are logged already.
    """

    _TAG = "snapfusion.run"

    def __init__(self, *, run: str, name: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        found = self._client.search_runs([experiment], filter_string=f"tags.`{self._TAG}` = '{run}'")
        self._resumed, self._last_steps = bool(found), dict[str, int]()
        if found:
            self._id = found[0].info.run_id
        else:
            self._id = self._client.create_run(experiment, run_name=name, tags={self._TAG: run}).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in flatten(settings)]
            # A server accepts at most 100 parameters per request.
            for start in range(0, len(params), 100):
                self._client.log_batch(self._id, params=params[start : start + 100])

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """See `Logger`."""
        now = int(time.time() * 1000)
        metrics = [
            self._metric(name, float(value), now, step)
            for name, value in values.items()
            if step > self._last_step(name)
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def image(self, name: str, pixels: np.ndarray, *, step: int) -> None:
        """See `Logger`."""
        self._client.log_image(self._id, pixels, artifact_file=f"{name}/step-{step:08d}.png")

    def close(self) -> None:
        """See `Logger`."""
        self._client.set_terminated(self._id)

    def _last_step(self, name: str) -> int:
        """The last step of a metric that an earlier process logged; 0 if there is none."""
        if self._resumed and name not in self._last_steps:
            history = self._client.get_metric_history(self._id, name)
            self._last_steps[name] = max((metric.step for metric in history), default=0)
        return self._last_steps.get(name, 0)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)


def check_loggers(kinds: Sequence[LoggerKind]) -> None:
    """Check that all loggers can be used, before any work begins.

    Raises:
        LoggerError: if a package is not installed, or MLflow's server is not set.
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
