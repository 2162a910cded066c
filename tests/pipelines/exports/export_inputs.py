"""What tests of exports share: small shards, an export in this process, and a reader of samples."""

import io
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from deletion_run import Run
from in_process import in_process

from pipelines.exports.record import exported_version
from pipelines.exports.settings import ExportSettings
from pipelines.exports.webdataset import Export, export_webdataset

SETTINGS = ExportSettings(rows_per_shard=5, batch_size=3)


def export(run: Run, name: str, folder: Path, *, settings=SETTINGS, runner=in_process, **more: Any) -> Export:
    """As `jobs.export_table`."""
    return export_webdataset(
        exported_version(run.table(name), str(folder)),
        settings,
        model=more.get("model", run.teacher),
        folder=str(folder),
        deleted=run.list,
        run=runner,
    )


def samples_in(folder: Path) -> list[dict[str, bytes]]:
    """The samples of all shards in order, as the package webdataset groups them, if it is installed."""
    tars = sorted(map(str, folder.glob("*.tar")))
    if find_spec("webdataset"):
        import webdataset

        return list(webdataset.WebDataset(tars, shardshuffle=False))
    return [sample for tar in tars for sample in _samples_in_tar(tar)]


def _samples_in_tar(path: str) -> Iterator[dict[str, bytes]]:
    """Neighbouring members of one key; the key ends at the first dot."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            sample = samples.setdefault(key, {"__key__": key})
            sample[ending] = tar.extractfile(member).read()
    yield from samples.values()


def tensor(data: bytes) -> torch.Tensor:
    """A `.pth` member, which holds nothing but a tensor."""
    return torch.load(io.BytesIO(data), weights_only=True)


def files_in(folder: Path) -> dict[str, bytes]:
    """All files of an export by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
