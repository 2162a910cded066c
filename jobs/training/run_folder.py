"""The folder of a training: begun with its identity, resumed, and published all or nothing.

OUT/metrics.json           identity, settings, parents, training curve and evaluation; written last
OUT/logs/                  logs of the training, for TensorBoard
OUT/watch/                 sample grids, if the model was validated
OUT.training/begun.json    identity that the training was begun with, beside checkpoints and logs
OUT.training/followed/     the units of a table that grows meanwhile (`pipelines.loading.followed`)
OUT.training/leases/       who trains; deleted with all of OUT.training once the folder is published
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from jobs.training.metrics import METRICS
from jobs.training.spec import TrainingError, first_differences
from pipelines.storage.folders import publish_folder
from pipelines.storage.objects import exists, write_once
from pipelines.storage.records import read_record
from pipelines.tables.leases import exclusive_lease
from snapfusion.models.checksums import file_hash
from snapfusion.settings import digest
from snapfusion.storage import get_tree
from snapfusion.training.checkpoint import CheckpointStore

FOLLOWED = "followed"
"""Folder beside the checkpoints of a training that follows its table: the units that it has read."""

_STARTED = "begun.json"
_LEASES = "leases"
_PUBLISHED_FOLDERS = ("logs", "watch")
"""Folders that stand beside the checkpoints while training runs, and are published with the result."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A training's folder.

    Attributes:
        url: of the folder, once it is published.
        kind: of its content, such as "student" or "decoder".
    """

    url: str
    kind: str

    @property
    def store_url(self) -> str:
        """URL of the checkpoints, until the folder is published."""
        return f"{self.url}.training"

    def stored_identity(self) -> dict[str, Any] | None:
        """The identity that the folder was made with, or begun with; None for a new one."""
        for url in (f"{self.url}/{METRICS}", f"{self.store_url}/{_STARTED}"):
            if exists(url):
                return dict(read_record(url)["identity"])
        return None

    def finished(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The metrics of a folder that is published already; None if it is not.

        Raises:
            TrainingError: if it has another identity; names what differs.
        """
        url = f"{self.url}/{METRICS}"
        if not exists(url):
            return None
        record = read_record(url)
        check_identity(record["identity"], identity, url=self.url, kind=self.kind)
        return record

    def publish(
        self, identity: Mapping[str, Any], *, fill: Callable[[Path], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Publish the folder, logs included; the checkpoints stay.

        Args:
            identity: of the training.
            fill: writes the files into an empty folder and returns the metrics.

        Returns:
            The metrics, as in metrics.json.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            record: dict[str, Any] = {
                "kind": self.kind,
                "identity": identity,
                "settings_hash": digest(identity),
            }
            record |= fill(folder)
            # What the numbers were measured on: a folder may get other weights later.
            record["weight_files"] = {
                path.relative_to(folder).as_posix(): file_hash(path)
                for path in sorted(folder.rglob("*.safetensors"))
            }
            text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False)
            (folder / METRICS).write_text(text)
            self._copy_logs(folder)
            publish_folder(folder, self.url, last=METRICS)
        return dict(json.loads(text))

    @contextmanager
    def exclusive(self, *, seconds: float) -> Iterator[None]:
        """Train within the context alone; raises `TableBusy` if another driver does.

        A driver that was killed is followed after `seconds`.
        """
        with exclusive_lease(
            f"{self.store_url}/{_LEASES}", purpose=f"the training {self.url}", seconds=seconds
        ):
            yield

    def delete_checkpoints(self) -> None:
        """Delete the checkpoints, also those that a driver left that was killed after it had published.

        Call it once the folder is published: whoever is killed before resumes from them.
        """
        with suppress(FileNotFoundError):  # another driver deletes them as well
            CheckpointStore(self.store_url).delete()

    def _copy_logs(self, folder: Path) -> None:
        filesystem, root = fsspec.core.url_to_fs(self.store_url)
        for name in _PUBLISHED_FOLDERS:
            if filesystem.exists(f"{root}/{name}"):
                get_tree(filesystem, f"{root}/{name}", folder / name)


def begin(url: str, identity: Mapping[str, Any], *, kind: str) -> None:
    """Record in the folder `url` the identity of what begins there, or check that of what resumes.

    Raises:
        TrainingError: if something of another identity was begun; names what differs.
    """
    write_once(f"{url}/{_STARTED}", json.dumps({"identity": identity}).encode())
    # Read back: of two drivers that begin at once, the file is that of the first.
    found = read_record(f"{url}/{_STARTED}")["identity"]
    check_identity(found, identity, url=url, kind=kind)


def check_identity(found: Any, expected: Mapping[str, Any], *, url: str, kind: str) -> None:  # noqa: ANN401 - JSON
    """Refuse to resume or reuse what was made with other settings.

    Raises:
        TrainingError: names what differs.
    """
    if differing := first_differences(found, dict(expected)):
        raise TrainingError(
            f"{url} holds a {kind} of other settings: {differing}; choose another --out, or remove it"
        )
