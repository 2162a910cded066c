"""Checkpoints in a store of our own: safetensors files and a manifest with their hashes, written last.

On disk or object storage, under one URL:

    step-00000400/model.safetensors, optimizer.safetensors, ema.safetensors
    step-00000400/manifest.json        step, values, size and SHA-256 of each file, and of the manifest itself

A folder whose manifest is missing or untrue is no checkpoint, so a save that is killed anywhere changes
nothing. One process writes at a time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from snapfusion.settings import digest
from snapfusion.training.state import TensorGroups

MANIFEST = "manifest.json"
CHUNK_BYTES = 8 << 20


class CheckpointError(ValueError):
    """A checkpoint that is torn or altered."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One complete checkpoint, read and verified.

    Attributes:
        step: optimizer steps done.
        tensors: by group and name, on the CPU.
        values: what was saved beside them, JSON values.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one training, under `url` (a path or any fsspec URL).

    Args:
        url: the folder that holds them; need not exist.
        keep: how many of the newest complete ones stay.

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

        A folder of that step that is there already is written anew, and folders of later steps go: had they
        been good, training would have continued from them.

        Raises:
            CheckpointError: if what arrived in the store has another size; then nothing is deleted.
        """
        folder = self._folder(step)
        self._fs.makedirs(folder, exist_ok=True)
        if self._fs.exists(f"{folder}/{MANIFEST}"):
            self._fs.rm_file(f"{folder}/{MANIFEST}")
        files = {f"{group}.safetensors": self._put(folder, group, named) for group, named in tensors.items()}
        manifest: dict[str, Any] = {"step": step, "values": dict(values), "files": files}
        manifest["sha256"] = digest(manifest)
        self._fs.pipe_file(f"{folder}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        if not self._is_complete(folder):
            raise CheckpointError(f"{folder} did not arrive whole; is the store full?")
        self._prune(step)

    def load(self, step: int, *, without: Collection[str] = ()) -> Checkpoint:
        """The checkpoint of `step`, but for groups of tensors that are not wanted.

        Raises:
            CheckpointError: if it is missing, torn or altered.
        """
        folder = self._folder(step)
        manifest = self._manifest(folder)
        tensors = {
            PurePosixPath(name).stem: self._get(f"{folder}/{name}", sha256=entry["sha256"])
            for name, entry in manifest["files"].items()
            if PurePosixPath(name).stem not in without
        }
        return Checkpoint(step=manifest["step"], tensors=tensors, values=manifest["values"])

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete and unaltered, or None where there is none."""
        for step in self._steps():
            try:
                return self.load(step)
            except CheckpointError:
                continue
        return None

    def delete(self) -> None:
        """Delete the whole store."""
        if self._fs.exists(self._root):
            self._fs.rm(self._root, recursive=True)

    def _folder(self, step: int) -> str:
        return f"{self._root}/step-{step:08d}"

    def _steps(self) -> list[int]:
        """Steps that have a folder, whole or torn, the newest first."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        names = (PurePosixPath(path).name for path in self._fs.ls(self._root, detail=False))
        numbers = (name.removeprefix("step-") for name in names if name.startswith("step-"))
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def _put(self, folder: str, group: str, named: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write one file by way of a local one, which a large model's tensors pass without a second copy."""
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / "tensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, local)
            entry = {"bytes": local.stat().st_size, "sha256": _hash_file(local)}
            self._fs.put_file(str(local), f"{folder}/{group}.safetensors")
        return entry

    def _get(self, path: str, *, sha256: str) -> dict[str, Tensor]:
        try:
            content = self._fs.cat_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise CheckpointError(f"{path} was altered: SHA-256 {found}, the manifest says {sha256}")
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
            raise CheckpointError(f"{path} is missing: the save did not end") from None
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a manifest: {error}") from error
        if digest(manifest) != sha256:
            raise CheckpointError(f"{path} was altered")
        return manifest

    def _is_complete(self, folder: str) -> bool:
        """Whether all files are there in full size; their hashes are looked at when they are read."""
        try:
            files = self._manifest(folder)["files"]
            return all(self._fs.size(f"{folder}/{name}") == entry["bytes"] for name, entry in files.items())
        except (CheckpointError, FileNotFoundError):
            return False

    def _prune(self, newest: int) -> None:
        for folder in self._superfluous(newest):
            # The manifest first: what a kill leaves behind is then torn, and goes at the next save.
            if self._fs.exists(f"{folder}/{MANIFEST}"):
                self._fs.rm_file(f"{folder}/{MANIFEST}")
            self._fs.rm(folder, recursive=True)

    def _superfluous(self, newest: int) -> Iterator[str]:
        kept = 0
        for step in self._steps():
            if step > newest or kept >= self.keep:
                yield self._folder(step)
            elif self._is_complete(self._folder(step)):
                kept += 1


def _hash_file(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()
