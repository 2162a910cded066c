"""Tests of the experiment loggers: after a kill no step is logged twice, and none is missing."""

import fsspec
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.training.loggers import LoggerError, Loggers, check_loggers

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def loggers(kind, url, *, done=0):
    return Loggers(
        [kind], url=str(url), run="0123abcd", name="student/unet", done=done, settings={"a": {"b": 1}}
    )


def scalars(folder, name):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def killed_and_continued(kind, url):
    """Log steps 1 to 5, of which 4 and 5 are lost with the checkpoint; then 4 to 6 again."""
    killed = loggers(kind, url)
    for step in range(1, 6):
        killed.scalars({"loss": float(step), "vanilla/loss/0": 0.5}, step=step)
    killed.flush()
    with loggers(kind, url, done=3) as continued:
        for step in range(4, 7):
            continued.scalars({"loss": float(step), "vanilla/loss/0": 0.5}, step=step)
        continued.image("watch/pictures", PIXELS, step=6)
    return killed


def test_tensorboard_reads_each_step_once(tmp_path):
    killed_and_continued("tensorboard", tmp_path)
    assert scalars(tmp_path, "loss") == [(step, float(step)) for step in range(1, 7)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [image] = events.Images("watch/pictures")
    assert (image.step, image.height, image.width) == (6, 4, 6)


def test_flush_uploads_logs_to_an_object_store(tmp_path):
    url = f"memory://{tmp_path.name}/logs"
    with loggers("tensorboard", url) as opened:
        opened.scalars({"loss": 1.0}, step=1)
        opened.flush()
        opened.scalars({"loss": 2.0}, step=2)
        fsspec.filesystem("memory").get(url, str(tmp_path / "flushed"), recursive=True)
    fsspec.filesystem("memory").get(url, str(tmp_path / "closed"), recursive=True)
    assert scalars(tmp_path / "flushed", "loss") == [(1, 1.0)]
    assert scalars(tmp_path / "closed", "loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(kind, monkeypatch):
    monkeypatch.setattr("jobs.training.loggers.find_spec", lambda name: None)
    with pytest.raises(LoggerError, match=rf"{kind}, which is not installed: pip install .*\[{kind}\]"):
        check_loggers(("tensorboard", kind))


def test_mlflow_needs_a_server(monkeypatch):
    monkeypatch.setattr("jobs.training.loggers.find_spec", lambda name: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(LoggerError, match="set MLFLOW_TRACKING_URI"):
        check_loggers(("mlflow",))


def test_mlflow_has_each_step_once(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/runs")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server's protocol, without the server
    check_loggers(("mlflow",))
    killed_and_continued("mlflow", tmp_path / "logs")
    client = tracking.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("snapfusion").experiment_id])
    for name in ("loss", "vanilla/loss/0"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [metric.step for metric in history] == list(range(1, 7))
    assert run.data.params == {"a.b": "1"}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "watch/pictures")] == [
        "watch/pictures/step-00000006.png"
    ]


def test_wandb_writes_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with loggers("wandb", tmp_path) as opened:
        opened.scalars({"loss": 1.0}, step=1)
        opened.image("watch/pictures", PIXELS, step=1)
    [file] = tmp_path.glob("wandb/offline-run-*/run-0123abcd.wandb")
    assert b"loss" in file.read_bytes()
