"""The folder that a training leaves: begun with settings and parents, gone on with, published whole.

OUT/metrics.json           what it was made of and from, how it was trained, how good it is; written last
OUT/logs/                  the course of training, for TensorBoard
OUT/watch/                 pictures that were drawn on the way, where a model was watched
OUT.training/begun.json    what it was begun with; beside it checkpoints and logs, until it is published
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from jobs.training.spec import TrainingError
from pipelines.storage.folders import publish_folder
from pipelines.storage.objects import exists, read_bytes, write_once
from snapfusion.settings import differences
from snapfusion.training.checkpoint import CheckpointStore

METRICS = "metrics.json"
_STARTED = "begun.json"
_PUBLISHED_FOLDERS = ("logs", "watch")
"""Folders that stand beside the checkpoints and belong to the result."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A training's folder.

    Attributes:
        url: where it is to be.
        kind: what it holds, in a word.
    """

    url: str
    kind: str

    @property
    def store_url(self) -> str:
        """Where the training's checkpoints stand until it is published."""
        return f"{self.url}.training"

    def pinned_version(self, parent: str) -> int | None:
        """The version of a parent table that it was made from, or has been begun with."""
        for place in (f"{self.url}/{METRICS}", f"{self.store_url}/{_STARTED}"):
            if exists(place):
                return int(json.loads(read_bytes(place))["identity"][parent]["version"])
        return None

    def finished(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The metrics of a folder that is there already, which must be of this identity.

        Raises:
            TrainingError: if it is of another; names what differs.
        """
        place = f"{self.url}/{METRICS}"
        return self._checked(place, identity) if exists(place) else None

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Say what is begun here, or see that what was begun is the same.

        Raises:
            TrainingError: if a training of another identity was begun; names what differs.
        """
        place = f"{self.store_url}/{_STARTED}"
        write_once(place, json.dumps({"identity": identity}).encode())
        self._checked(place, identity)

    def publish(self, fill: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """Make the folder, whole or not at all, logs included; what training would resume from then goes.

        Args:
            fill: writes the files into an empty folder, and gives the metrics.

        Returns:
            The metrics, as in metrics.json.
        """
        with tempfile.TemporaryDirectory() as scratch:
            text = json.dumps(fill(Path(scratch)), indent=2, sort_keys=True, allow_nan=False)
            (Path(scratch) / METRICS).write_text(text)
            self._take_along(Path(scratch))
            publish_folder(Path(scratch), self.url, last=METRICS)
        CheckpointStore(self.store_url).delete()
        return dict(json.loads(text))

    def read(self) -> dict[str, Any]:
        """What the finished folder says of itself.

        Raises:
            TrainingError: if there is none.
        """
        place = f"{self.url}/{METRICS}"
        if not exists(place):
            raise TrainingError(f"{self.url} holds no finished {self.kind}; run the job that makes it first")
        metrics: dict[str, Any] = json.loads(read_bytes(place))
        return metrics

    def _take_along(self, folder: Path) -> None:
        filesystem, root = fsspec.core.url_to_fs(self.store_url)
        for name in _PUBLISHED_FOLDERS:
            if filesystem.exists(f"{root}/{name}"):
                filesystem.get(f"{root}/{name}", str(folder / name), recursive=True)

    def _checked(self, place: str, identity: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(read_bytes(place))
        check_identity(found["identity"], identity, url=place.rpartition("/")[0], kind=self.kind)
        return found


def check_identity(found: Any, wanted: Any, *, url: str, kind: str) -> None:  # noqa: ANN401 - JSON values
    """Refuse to go on with, or to take for one's own, what was made otherwise.

    Raises:
        TrainingError: names what differs.
    """
    differing = list(differences(found, dict(wanted)))
    if differing:
        raise TrainingError(
            f"{url} holds a {kind} of other settings: {'; '.join(differing[:3])}; give another place, or "
            "remove it"
        )
