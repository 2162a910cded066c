"""Compile the decoder for phones: an ExecuTorch program and a Core ML package, each held to torch.

A bundle is a folder:

manifest.json       what it is made of and from, every file's size and SHA-256, and the parity figures
decoder.pte         ExecuTorch, XNNPACK, float32
decoder.mlpackage/  Core ML, ML program, float16, iOS 17
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import PositiveFloat, PositiveInt

from jobs.distill_decoder import read_metrics
from jobs.exits import leave
from jobs.publish import publish_folder
from pipelines.loader import held_out_rows
from pipelines.schemas import array_of
from pipelines.storage import exists, read_bytes
from pipelines.tables import open_table
from snapfusion.export.coreml import check_weights, compile_coreml, describe_package, read_program
from snapfusion.export.executorch import ExecuTorchProgram, compile_executorch
from snapfusion.export.mil import evaluate
from snapfusion.export.modules import FixedModule, decoder_module
from snapfusion.export.parity import PSNR_LIMIT_DB, check_parity
from snapfusion.models.bundle import weight_hash
from snapfusion.models.decoder import load_decoder
from snapfusion.models.seal import file_hash
from snapfusion.settings import Settings, digest

if TYPE_CHECKING:
    from jobs.cli import Job

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_COMPILERS = ("torch", "executorch", "coremltools", "snapfusion-ray")


class MobileSettings(Settings):
    """How mobile artifacts are held to torch.

    Attributes:
        parity_limit_db: the lowest PSNR, peak = max |reference|, at which an artifact is published.
        parity_samples: on how many held-out latents it is measured.
    """

    parity_limit_db: PositiveFloat = PSNR_LIMIT_DB
    parity_samples: PositiveInt = 16


class BundleError(ValueError):
    """A place that already holds another bundle."""


def compile_decoder(
    settings: MobileSettings,
    *,
    decoder_url: str,
    latents: np.ndarray,
    parents: Mapping[str, Any],
    out_url: str,
) -> dict[str, Any]:
    """Publish the bundle of the decoder in `decoder_url`; nothing at all if an artifact does not agree.

    Args:
        settings: the gate's.
        decoder_url: a half-width decoder's folder.
        latents: held-out, scaled, [N,4,h,w]; the first `parity_samples` are used.
        parents: what the decoder and the latents were made from, for the manifest.
        out_url: the bundle's folder, on disk or in an object store.

    Returns:
        The manifest; that of the bundle already there, if it was made from the same.

    Raises:
        ParityError: if an artifact does not agree with torch on these latents.
        BundleError: if `out_url` holds a bundle made from something else.
        DecoderError: if the decoder's folder is not usable.
        ValueError: if there are no latents, or the decoder's own output is not finite.
    """
    if not len(latents):
        raise ValueError("no held-out latents to hold the artifacts to; give at least one")
    decoder = load_decoder(decoder_url)
    samples = np.ascontiguousarray(latents[: settings.parity_samples], dtype=np.float32)
    identity = {
        "format": FORMAT_VERSION,
        "settings": settings.to_values(),
        "decoder": weight_hash(decoder),
        "latents": hashlib.sha256(samples.tobytes()).hexdigest(),
        "parents": dict(parents),
    }
    if exists(f"{out_url}/{MANIFEST}"):
        return _published(out_url, identity=identity)
    module = decoder_module(decoder, latent_shape=samples.shape[1:])
    with tempfile.TemporaryDirectory() as scratch:
        manifest = _build(Path(scratch), module=module, samples=samples, settings=settings)
        manifest |= {"identity": identity, "settings_hash": digest(identity), "versions": _versions()}
        text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False)
        (Path(scratch) / MANIFEST).write_text(text)
        publish_folder(Path(scratch), out_url, last=MANIFEST)
    # As a later reader will find it: tuples are lists.
    return dict(json.loads(text))


def _published(url: str, *, identity: dict[str, Any]) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(read_bytes(f"{url}/{MANIFEST}"))
    if manifest.get("settings_hash") == digest(identity):
        return manifest
    found = manifest.get("identity", {})
    changed = sorted(key for key in identity if found.get(key) != json.loads(json.dumps(identity[key])))
    raise BundleError(
        f"{url} holds a bundle made with other {' and '.join(changed)}; a bundle is never changed: "
        "give another place, or remove it"
    )


def _build(
    folder: Path, *, module: FixedModule, samples: np.ndarray, settings: MobileSettings
) -> dict[str, Any]:
    """Write both artifacts below `folder` and describe them."""
    gate = _Gate(module, samples=samples, limit_db=settings.parity_limit_db)
    artifacts = {
        "executorch": _build_executorch(folder, module=module, gate=gate),
        "coreml": _build_coreml(folder, module=module, gate=gate),
    }
    described = {
        "inputs": {port.name: port.shape for port in module.inputs},
        "outputs": {port.name: port.shape for port in module.outputs},
        "parameters": sum(parameter.numel() for parameter in module.network.parameters()),
        "artifacts": artifacts,
    }
    return {"modules": {module.name: described}, "files": _files(folder)}


class _Gate:
    """Torch's own outputs on the held-out samples, to which each artifact is held."""

    def __init__(self, module: FixedModule, *, samples: np.ndarray, limit_db: float) -> None:
        self._inputs = [[sample[None]] for sample in samples]
        self._references = [module.reference(inputs) for inputs in self._inputs]
        self._limit_db = limit_db

    def hold(self, artifact: str, run: Callable[[Sequence[np.ndarray]], np.ndarray]) -> dict[str, Any]:
        """The parity figures of `run`; a ParityError if they are below the limit."""
        outputs = [run(inputs) for inputs in self._inputs]
        parity = check_parity(
            artifact=artifact, outputs=outputs, references=self._references, limit_db=self._limit_db
        )
        return parity.to_values()


def _build_executorch(folder: Path, *, module: FixedModule, gate: _Gate) -> dict[str, Any]:
    path = folder / f"{module.name}.pte"
    path.write_bytes(compile_executorch(module))
    # Executed from what lies on the disk: that is what will be published.
    program = ExecuTorchProgram(path.read_bytes())
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "backend": "XNNPACK, float32",
        "parity": gate.hold(path.name, program),
        "parity_by": "executed in ExecuTorch's runtime",
    }


def _build_coreml(folder: Path, *, module: FixedModule, gate: _Gate) -> dict[str, Any]:
    package = folder / f"{module.name}.mlpackage"
    compile_coreml(module, package)
    program = read_program(package)
    return {
        "file": package.name,
        "bytes": sum(path.stat().st_size for path in package.rglob("*") if path.is_file()),
        "backend": "ML program, float16, iOS 17",
        "parity": gate.hold(package.name, partial(evaluate, program)),
        "parity_by": "its operations, read back and evaluated with torch, each result rounded to float16; "
        "Core ML itself runs on Apple's systems only",
        "max_weight_error": check_weights(program, module.network.state_dict()),
        "description": describe_package(package).to_values(),
    }


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in paths
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _COMPILERS}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.compile_mobile`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli import run

    return run("compile_mobile", compile_mobile, preview=preview, about=__doc__, argv=argv)


def compile_mobile(job: Job) -> None:
    """Make the run's bundle; one that is there already is left as it is."""
    made = read_metrics(job.place("decoder"))
    manifest = compile_decoder(
        job.recipe.mobile,
        decoder_url=job.place("decoder"),
        latents=held_out_latents(job, version=made["parents"]["pairs"]["version"]),
        parents={"decoder": {"settings_hash": made["settings_hash"]}, "pairs": made["parents"]["pairs"]},
        out_url=job.place("mobile"),
    )
    for line in summary(manifest):
        print(f"  {line}")


def held_out_latents(job: Job, *, version: int) -> np.ndarray:
    """Latents that the decoder has not seen, float32 [N,4,h,w], as many as the gate asks for."""
    held_out, limit = job.recipe.decoder.loader.held_out, job.recipe.mobile.parity_samples
    pairs = open_table(job.place("pairs"), version=version, kind="pairs")
    rows = pa.concat_tables(held_out_rows(pairs, ["latent"], fraction=held_out, limit=limit))
    latents = array_of(rows.schema.field("latent")).unpack(rows.column("latent").to_pylist())
    return latents.astype(np.float32)


def summary(manifest: Mapping[str, Any]) -> list[str]:
    """Each artifact with its size and how well it agrees."""
    lines = []
    for module in manifest["modules"].values():
        for artifact in module["artifacts"].values():
            psnr_db = artifact["parity"]["psnr_db"]
            agrees = "bit for bit as torch" if psnr_db is None else f"{psnr_db:.1f} dB to torch"
            size = f"{artifact['bytes'] / 2**20:.2f} MiB"
            lines.append(f"{artifact['file']}: {size}, {artifact['backend']}, {agrees}")
    return lines


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    place = job.place("mobile")
    held = "which is there already" if exists(f"{place}/{MANIFEST}") else "which is not there yet"
    return [f"would compile {job.place('decoder')} into {place} ({held})"]


if __name__ == "__main__":
    leave(main())
