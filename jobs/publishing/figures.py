"""Figures of a saved model for its card, from the records of its training and of its run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.training.metrics import METRICS
from jobs.training.sources import RUN_PREFIX
from pipelines.storage.objects import absolute_url, exists
from pipelines.storage.records import read_record
from snapfusion.models.checksums import file_hash
from snapfusion.models.local_folder import MODEL_FOLDER
from snapfusion.models.source import parse_source

_FOLDERS = (MODEL_FOLDER, "raw", "best")
"""The models in a training's folder."""
_UNET = "unet/diffusion_pytorch_model.safetensors"
_METRICS = {"fid": "FID", "clip": "CLIP"}


@dataclass(frozen=True, kw_only=True)
class TrainingFolder:
    """Where a saved model comes from.

    Attributes:
        url: of the training's folder.
        model: the folder in it.
        record: of the training.
    """

    url: str
    model: str
    record: Mapping[str, Any]

    @property
    def run(self) -> str:
        """URL of the run."""
        return self.url.rpartition("/")[0]

    def is_meant_by(self, source: str) -> bool:
        """Whether another record of the run means this model; paths in it may be relative to any folder."""
        _, run, name = f"/{self.url}".rsplit("/", 2)
        own = [f"{name}/{self.model}", *([name] if self.model == MODEL_FOLDER else [])]
        ends = tuple(f"/{run}/{path}" for path in own)
        return source.removeprefix(RUN_PREFIX) in own or f"/{source}".endswith(ends)


def training_folder(source: str, folder: Path) -> TrainingFolder | None:
    """The training whose record names these weights; None for a model that no training here has left.

    Args:
        source: of the model.
        folder: its local folder.
    """
    url = absolute_url(parse_source(source).path).rstrip("/")
    if not exists(f"{url}/{METRICS}"):
        url, _, name = url.rpartition("/")
        if name not in _FOLDERS or not exists(f"{url}/{METRICS}"):
            return None
    else:
        name = MODEL_FOLDER
    record = read_record(f"{url}/{METRICS}")
    # A folder may have got other weights since.
    if (folder / _UNET).is_file() and record.get("weight_files", {}).get(f"{name}/{_UNET}") == file_hash(
        folder / _UNET
    ):
        return TrainingFolder(url=url, model=name, record=record)
    return None


def figures(training: TrainingFolder) -> str:
    """The figures of a model as Markdown; "" if there are none."""
    parts = [*_losses(training.record), *_side_by_side(training), *_evaluation(training)]
    return "\n\n".join(parts)


def _losses(record: Mapping[str, Any]) -> Iterator[str]:
    evaluation, steps = record.get("evaluation", {}), record["settings"].get("loop", {}).get("num_steps")
    after = f"after {steps:,} steps of training" if steps else "after training"
    if "before" in evaluation and record.get("distillation"):
        rows = [
            (branch, f"{evaluation['before'][branch]['loss']:.4g}", f"{losses['loss']:.4g}")
            for branch, losses in evaluation["after"].items()
        ]
        yield _table(("distillation loss of held-out rows (Eq. 9)", "before", after), rows)
    elif "loss" in evaluation:
        yield f"Loss of {evaluation['rows']:,} held-out rows (Eq. 6), {after}: {evaluation['loss']:.4g}."


def _side_by_side(training: TrainingFolder) -> Iterator[str]:
    """The report's comparison with teacher and initial weights."""
    url = f"{training.run}/{METRICS}"
    record = read_record(url).get("fewer_steps") if exists(url) else None
    if not record or not training.is_meant_by(record["ways"]["student"]["model"]):
        return
    rows = [(name, str(way["steps"]), f"{way['clip']:.3f}") for name, way in record["ways"].items()]
    yield (
        f"{record['captions']} captions from the same noise at guidance {record['guidance']:g}, CLIP by "
        f"`{record['scorer']}`:\n\n{_table(('', 'steps', 'CLIP'), rows)}"
    )


def _evaluation(training: TrainingFolder) -> Iterator[str]:
    """The curves of the run's evaluation that are this model's."""
    url = f"{training.run}/evaluation/results.json"
    if not exists(url):
        return
    results = read_record(url)
    for name, curve in results["curves"].items():
        if not curve["model"] or not training.is_meant_by(curve["model"]):
            continue
        metrics = [metric for metric in _METRICS if any(point.get(metric) for point in curve["points"])]
        rows = [
            (f"{point['w']:g}", *(_interval(point.get(metric)) for metric in metrics))
            for point in curve["points"]
        ]
        heading = ("guidance", *(_METRICS[metric] for metric in metrics))
        sampler, decoder = curve["sampler"], ", half-width decoder" if curve["decoder"] else ""
        yield (
            f"`{name}`: {sampler['steps']} steps of {sampler['solver']}{decoder}; "
            f"{results['protocol']['title']}:\n\n{_table(heading, rows)}"
        )


def _interval(value: Sequence[float] | None) -> str:
    """A value and its interval, three numbers in the file."""
    return "" if value is None else "{:.4g} ({:.4g} to {:.4g})".format(*value)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
