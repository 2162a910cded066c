"""Compile a model for phones: one bundle of ExecuTorch programs and Core ML packages, held to torch.

MODEL is a diffusers folder, the folder of a training, a URL or a hub id; left out, it is the recipe's
`mobile.model`. The bundle is OUT/mobile (`snapfusion.export.bundle` says what is in it).
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.cli.job import Job, run
from jobs.evaluation.images import distilled_steps
from jobs.runtime.exit_codes import exit_process
from jobs.runtime.progress import format_duration
from jobs.runtime.versions import versions
from jobs.training.run_folder import METRICS
from pipelines.storage.folders import publish_folder
from pipelines.storage.objects import StorageError, absolute_url, exists, is_local, read_bytes
from snapfusion.export.build import build_bundle, hash_files
from snapfusion.export.bundle import CARD, FORMAT_VERSION, LICENCE, MANIFEST, BundleError
from snapfusion.export.card import model_card
from snapfusion.export.settings import LicenceError, MobileSettings
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.decoder import HalfDecoder, load_decoder
from snapfusion.models.load import MODEL_FOLDER, load
from snapfusion.settings import differences, digest

_DESCRIBED_ELSEWHERE = ("model", "decoder", "licence")
"""Settings that are told elsewhere in the manifest: by what was found there, or in words of their own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.compile_mobile`."""
    return run("compile_mobile", compile_mobile, preview=preview, about=__doc__, argv=argv, target="MODEL")


def compile_mobile(job: Job) -> None:
    """Make the run's bundle; one that is there already is left as it is."""
    settings = job.recipe.mobile
    try:
        settings.licence.check()
    except LicenceError as error:
        raise LicenceError(f"--set {error}") from None
    model, decoder = model_and_decoder(job)
    manifest = publish_bundle(
        settings,
        bundle=load(model),
        decoder=None if decoder is None else load_decoder(decoder),
        parents={
            "model": parent_record(model, told=job.target or settings.model or job.recipe.model),
            "decoder": decoder and parent_record(decoder, told=settings.decoder or ""),
        },
        out_url=job.url("mobile"),
    )
    for line in summary(manifest):
        print(f"  {line}")


def model_and_decoder(job: Job) -> tuple[str, str | None]:
    """The model that is compiled, and its half-width decoder if there is to be one."""
    settings = job.recipe.mobile
    model = job.target or (job.resolve(settings.model) if settings.model else job.recipe.model)
    return model, job.resolve(settings.decoder) if settings.decoder else None


def parent_record(place: str, *, told: str) -> dict[str, Any]:
    """What the manifest says of a model or decoder: the source as given, and what it was trained by."""
    folder = place.removesuffix(f"/{MODEL_FOLDER}")
    metrics = f"{folder}/{METRICS}"
    trained = json.loads(read_bytes(metrics)) if "/" in place and exists(metrics) else {}
    return {"source": told, "settings_hash": trained.get("settings_hash")}


def publish_bundle(
    settings: MobileSettings,
    *,
    bundle: Bundle,
    decoder: HalfDecoder | None,
    parents: Mapping[str, Any],
    out_url: str,
) -> dict[str, Any]:
    """Publish the bundle of a model; nothing at all if a part of it does not agree with torch.

    Args:
        settings: what is asked for.
        bundle: the model, float32 on the CPU.
        decoder: its half-width decoder; None for the model's own.
        parents: what they were made from, for the manifest.
        out_url: the bundle's folder, on disk or in an object store.

    Returns:
        The manifest; that of the bundle already there, if it was made from the same.

    Raises:
        ParityError: if a part does not agree with torch.
        LicenceError: if nobody has said under what licence it may be handed on.
        BundleError: if `out_url` holds a bundle made from something else, or the parts do not fit together.
        StorageError: if the place, or the scratch space beside it, cannot be written.
    """
    settings.licence.check()
    check_fit(bundle, decoder)
    number_of_steps = settings.steps or distilled_steps(bundle)
    told = settings.to_values()
    identity = {
        "settings": {key: value for key, value in told.items() if key not in _DESCRIBED_ELSEWHERE},
        "licence": told["licence"],
        "steps": number_of_steps,
        "model": bundle.describe(),
        "decoder": None if decoder is None else weight_hash(decoder),
        "parents": dict(parents),
    }
    if exists(f"{out_url}/{MANIFEST}"):
        return _existing_manifest(out_url, identity=json.loads(json.dumps(identity)))
    with _scratch_folder(out_url) as scratch:
        folder = scratch / "bundle"
        folder.mkdir()
        manifest = build_bundle(
            folder,
            bundle=bundle,
            decoder=decoder,
            settings=settings,
            number_of_steps=number_of_steps,
            scratch=scratch,
            say=_ElapsedPrinter(),
        )
        manifest |= {"format": FORMAT_VERSION, "identity": identity, "versions": versions()}
        manifest["settings_hash"] = digest(identity)
        _write_terms(folder, manifest=manifest, settings=settings)
        manifest["files"] = hash_files(folder)
        text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
        (folder / MANIFEST).write_text(text)
        publish_folder(folder, out_url, last=MANIFEST)
    # As a later reader will find it: tuples are lists.
    return dict(json.loads(text))


def check_fit(bundle: Bundle, decoder: HalfDecoder | None) -> None:
    """Refuse parts that cannot work together before anything is computed.

    Raises:
        BundleError: naming the two that do not fit.
    """
    width, wanted = bundle.text_encoder.config.hidden_size, bundle.unet.config
    context = wanted["architecture"]["context"] if "architecture" in wanted else wanted["cross_attention_dim"]
    if width != context:
        raise BundleError(f"the text encoder gives {width} numbers a token, the UNet takes {context}")
    if decoder is None:
        return
    channels = bundle.latent_shape[0]
    if decoder.config.latent_channels != channels:
        raise BundleError(
            f"the decoder takes {decoder.config.latent_channels} channels, the UNet gives {channels}"
        )
    if decoder.config.scaling_factor != bundle.scaling_factor:
        raise BundleError(
            f"the decoder was made for latents scaled by {decoder.config.scaling_factor}, the model's are "
            f"scaled by {bundle.scaling_factor}: it is the decoder of another model"
        )


class _ElapsedPrinter:
    """Says what is being done, and how long it has been going on by then."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"  {format_duration(time.monotonic() - self._began)}: {line}", flush=True)


@contextmanager
def _scratch_folder(url: str) -> Iterator[Path]:
    """A folder for what is not published yet: beside the place, where there is room for what comes there."""
    beside = Path(absolute_url(url)).parent if is_local(url) else Path(tempfile.gettempdir())
    try:
        beside.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".mobile-", dir=beside))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"the bundle cannot be written below {beside}: {error}") from error


def _existing_manifest(url: str, *, identity: dict[str, Any]) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(read_bytes(f"{url}/{MANIFEST}"))
    if manifest.get("settings_hash") == digest(identity):
        return manifest
    changed = ", ".join(differences(manifest.get("identity", {}), identity))
    raise BundleError(
        f"{url} holds a bundle made otherwise ({changed}); a bundle is never changed: give another place, or "
        "remove it"
    )


def _write_terms(folder: Path, *, manifest: Mapping[str, Any], settings: MobileSettings) -> None:
    if settings.licence.text:
        try:
            (folder / LICENCE).write_bytes(read_bytes(settings.licence.text))
        except (StorageError, FileNotFoundError) as error:
            raise LicenceError(f"--set mobile.licence.text={settings.licence.text}: {error}") from None
    (folder / CARD).write_text(model_card(manifest, licence=settings.licence))


def summary(manifest: Mapping[str, Any]) -> list[str]:
    """Each variant with its size and how well its pictures agree."""
    lines = []
    for name, told in manifest["variants"].items():
        size = sum(module["bytes"] for module in told["modules"].values()) / 2**20
        lines.append(f"{name}: {size:.1f} MiB, {told['weights']}, {_describe_parity(told['images'])}")
    return lines


def _describe_parity(parity: Mapping[str, Any]) -> str:
    if parity["psnr_db"] is None:
        return "images bit for bit as torch's"
    below = f", accepted below the limit: {parity['override']}" if parity["override"] else ""
    return f"images {parity['psnr_db']:.1f} dB to torch's{below}"


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    place, settings = job.url("mobile"), job.recipe.mobile
    held = "which is there already" if exists(f"{place}/{MANIFEST}") else "which is not there yet"
    model, decoder = model_and_decoder(job)
    own = f"the decoder {decoder}" if decoder else "its own decoder"
    variants = [
        *(f"ExecuTorch {kind}" for kind in settings.executorch),
        *(f"Core ML {kind}" for kind in settings.coreml),
    ]
    return [
        f"would compile {model} with {own} into {place} ({held})",
        f"  {', '.join(variants)}; {len(settings.captions)} captions at guidance {settings.guidance:g}",
    ]


if __name__ == "__main__":
    exit_process(main())
