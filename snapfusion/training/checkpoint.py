"""Checkpoint store: safetensors files, and a manifest with their hashes that is written last.

Layout under one URL, on disk or object storage:

    step-00000400/model.safetensors, optimizer.safetensors, ema.safetensors
    step-00000400/manifest.json        step, values, size and SHA-256 of each file, SHA-256 of the manifest

The manifest is the commit point: a folder without a valid one is no checkpoint, so killing a save at any
moment loses nothing. One process writes at a time.
"""

import hashlib
import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from snapfusion.models.checksums import file_hash
from snapfusion.settings import digest
from snapfusion.storage import remove_tree
from snapfusion.training.state import TensorGroups

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is incomplete or altered."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete, verified checkpoint.

    Attributes:
        step: optimizer steps done.
        tensors: by group and name, on the CPU.
        values: the JSON values saved with them.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


class CheckpointStore:
    """Reads and writes the checkpoints of one training under `url` (a path or any fsspec URL).

    Args:
        url: their folder, which need not exist.
        keep: number of complete checkpoints to keep, the newest.

    Raises:
        ValueError: if `keep` is below 1.
    """

    def __init__(self, url: str, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 is needed")
        self.url, self.keep = url, keep
        self._fs, self._root = fsspec.core.url_to_fs(url)

    def save(self, step: int, *, tensors: TensorGroups, values: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step`, then delete all but the newest `keep` complete ones.

        An earlier checkpoint of `step` is replaced. Folders of later steps are deleted: training would have
        resumed from them if they were valid.

        Raises:
            CheckpointError: if a stored file has the wrong size; then nothing is deleted.
        """
        folder = self._folder(step)
        self._fs.makedirs(folder, exist_ok=True)
        self._remove_manifest(folder)
        files = {f"{group}.safetensors": self._put(folder, group, named) for group, named in tensors.items()}
        manifest: dict[str, Any] = {"step": step, "values": dict(values), "files": files}
        # Also of the manifest: its values (step, averages) matter as much as the tensors.
        manifest["sha256"] = digest(manifest)
        # The commit point: only now is the folder a checkpoint.
        self._fs.pipe_file(f"{folder}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        if not self._is_complete(folder):
            raise CheckpointError(f"{folder} is incomplete after writing; is the store full?")
        self._prune(step)

    def load(self, step: int, *, only: Collection[str] | None = None) -> Checkpoint:
        """Load the checkpoint of `step`, or `only` these groups of its tensors.

        Raises:
            CheckpointError: if it is missing, incomplete or altered.
        """
        folder = self._folder(step)
        manifest = self._manifest(folder)
        tensors = {
            PurePosixPath(name).stem: self._get(f"{folder}/{name}", sha256=entry["sha256"])
            for name, entry in manifest["files"].items()
            if only is None or PurePosixPath(name).stem in only
        }
        return Checkpoint(step=manifest["step"], tensors=tensors, values=manifest["values"])

    def newest(self) -> Checkpoint | None:
        """Load the newest complete, unaltered checkpoint; None if there is none."""
        for step in self._steps():
            try:
                return self.load(step)
            except CheckpointError:
                continue  # an older one costs some repeated steps, a wrong one the whole training
        return None

    def delete(self) -> None:
        """Delete the whole store."""
        if self._fs.exists(self._root):
            remove_tree(self._fs, self._root)

    def _folder(self, step: int) -> str:
        return f"{self._root}/step-{step:08d}"

    def _steps(self) -> list[int]:
        """List the steps that have a folder, complete or not, newest first."""
        # fsspec caches listings, and another process may have written or deleted checkpoints.
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        names = (PurePosixPath(path).name for path in self._fs.ls(self._root, detail=False))
        numbers = (name.removeprefix("step-") for name in names if name.startswith("step-"))
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def _put(self, folder: str, group: str, named: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write one file; return its entry in the manifest."""
        # By way of a local file: serializing to bytes would hold a second copy of the model in memory.
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / "tensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, local)
            entry = {"bytes": local.stat().st_size, "sha256": file_hash(local)}
            self._fs.put_file(str(local), f"{folder}/{group}.safetensors")
        return entry

    def _get(self, path: str, *, sha256: str) -> dict[str, Tensor]:
        # One read for hash and tensors, so that exactly what was verified is loaded.
        try:
            content = self._fs.cat_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        actual = hashlib.sha256(content).hexdigest()
        if actual != sha256:
            raise CheckpointError(f"{path} was altered: its SHA-256 is {actual}, the manifest says {sha256}")
        try:
            return load_safetensors(content)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error

    def _manifest(self, folder: str) -> dict[str, Any]:
        path = f"{folder}/{MANIFEST}"
        try:
            manifest: dict[str, Any] = json.loads(self._fs.cat_file(path))
            sha256 = manifest.pop("sha256")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: the save was interrupted") from None
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a manifest: {error}") from error
        if digest(manifest) != sha256:
            raise CheckpointError(f"{path} was altered")
        return manifest

    def _is_complete(self, folder: str) -> bool:
        """Whether all files exist in full size; their hashes are verified by `load`."""
        try:
            files = self._manifest(folder)["files"]
            return all(self._fs.size(f"{folder}/{name}") == entry["bytes"] for name, entry in files.items())
        except (CheckpointError, FileNotFoundError):
            return False

    def _prune(self, newest: int) -> None:
        """Delete later steps, and what is older than the newest `keep` complete checkpoints."""
        kept = 0
        for step in self._steps():
            folder = self._folder(step)
            if step > newest or kept >= self.keep:
                # The manifest first: a folder that is half deleted by a kill is then no checkpoint.
                self._remove_manifest(folder)
                remove_tree(self._fs, folder)
            elif self._is_complete(folder):
                kept += 1

    def _remove_manifest(self, folder: str) -> None:
        if self._fs.exists(f"{folder}/{MANIFEST}"):
            self._fs.rm_file(f"{folder}/{MANIFEST}")
