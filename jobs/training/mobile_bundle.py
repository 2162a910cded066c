"""Compiles a model into a mobile bundle and publishes it, all or nothing."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from jobs.runtime.logs import logger
from jobs.runtime.progress import format_duration, show_status
from jobs.runtime.versions import versions
from jobs.training.metrics import METRICS
from pipelines.storage.folders import publish_folder
from pipelines.storage.objects import StorageError, absolute_url, exists, is_local, read_bytes
from pipelines.storage.records import read_record
from snapfusion.export.build import BundleBuilder
from snapfusion.export.bundle import CARD, LICENCE
from snapfusion.export.bundle_files import BundleError
from snapfusion.export.card import model_card
from snapfusion.export.installed import check_compilers
from snapfusion.export.layout import MANIFEST
from snapfusion.export.processes import Progress
from snapfusion.export.sampler_coefficients import LinearSolver
from snapfusion.export.settings import Licence, LicenceError, MobileSettings
from snapfusion.mini.captions import known_captions
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.checksums import file_records
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.defaults import distilled_solver, distilled_steps, needs_one_pass, sampling_grid
from snapfusion.models.local_folder import MODEL_FOLDER
from snapfusion.settings import differences, digest

_DESCRIBED_ELSEWHERE = ("model", "decoder", "licence")
"""Settings that the identity holds under keys of their own."""
_ADDED_LATER = ("onnx",)
"""Settings that older bundles lack: left out where they are empty, so that these stay what was published."""


def parent_record(url: str, *, source: str) -> dict[str, Any]:
    """The manifest's record of a model or decoder: its source as given, and the settings of its training."""
    metrics = f"{url.removesuffix(f'/{MODEL_FOLDER}')}/{METRICS}"
    trained = read_record(metrics) if "/" in url and exists(metrics) else {}
    return {"source": source, "settings_hash": trained.get("settings_hash")}


def publish_bundle(
    settings: MobileSettings,
    *,
    bundle: Bundle,
    decoder: HalfDecoder | None,
    parents: Mapping[str, Any],
    out_url: str,
) -> dict[str, Any]:
    """Publish the mobile bundle of a model; nothing at all if a part of it does not agree with torch.

    Args:
        settings: of the bundle.
        bundle: the model, float32 on the CPU.
        decoder: its half-width decoder; None for the model's own.
        parents: records of the models that it is made from.
        out_url: folder to publish, on disk or in an object store.

    Returns:
        The manifest, as it is published.

    Raises:
        ParityError: if a part does not agree with torch.
        LostProcessError: if a process that compiles is ended; a second try may help.
        NotInstalledError: if what compiles a variant is not installed.
        LicenceError: if the licence is not stated.
        BundleError: if `out_url` holds a bundle made from something else, or the parts do not fit together.
        StorageError: if it cannot be written.
    """
    settings.licence.check()
    check_parts(bundle, decoder)
    num_steps = settings.steps or distilled_steps(bundle)
    check_sampling(bundle, guidance=settings.guidance, steps=num_steps)
    identity = {
        **_identity_of(settings),
        "steps": num_steps,
        "model": bundle.describe(),
        "decoder": None if decoder is None else weight_hash(decoder),
        "parents": dict(parents),
    }
    if exists(f"{out_url}/{MANIFEST}"):
        return _published_manifest(out_url, identity=identity)
    check_compilers(settings)
    with _scratch_folder(out_url) as scratch:
        folder = scratch / "bundle"
        folder.mkdir()
        builder = BundleBuilder(
            folder=folder,
            bundle=bundle,
            decoder=decoder,
            settings=settings,
            num_steps=num_steps,
            scratch=scratch,
            progress=_progress(),
        )
        known = known_captions(vocabulary_size=bundle.tokenizer.vocab_size)
        contents = {**builder.build(), "known_captions": known}
        text = _write_manifest(folder, contents=contents, identity=identity, licence=settings.licence)
        publish_folder(folder, out_url, last=MANIFEST)
    return dict(json.loads(text))


def _identity_of(settings: MobileSettings) -> dict[str, Any]:
    values = settings.to_values()
    described = {
        key: value
        for key, value in values.items()
        if key not in _DESCRIBED_ELSEWHERE and (value or key not in _ADDED_LATER)
    }
    return {"settings": described, "licence": values["licence"]}


def _progress() -> Progress:
    """Report lines with the time since now, and what is being done on the status line."""
    began = time.monotonic()
    return Progress(
        log=lambda line: logger.info(f"  {format_duration(time.monotonic() - began)}: {line}"),
        status=show_status,
    )


def check_parts(bundle: Bundle, decoder: HalfDecoder | None) -> None:
    """Refuse parts that do not fit together, before anything is computed.

    Raises:
        BundleError: naming the two that do not fit.
    """
    width, config = bundle.text_encoder.config.hidden_size, bundle.unet.config
    context = config["architecture"]["context"] if "architecture" in config else config["cross_attention_dim"]
    if width != context:
        raise BundleError(f"the text encoder has {width} features per token, the UNet takes {context}")
    if decoder is None:
        return
    channels = bundle.latent_shape[0]
    if decoder.config.latent_channels != channels:
        raise BundleError(
            f"the decoder takes {decoder.config.latent_channels} channels, the UNet has {channels}"
        )
    if decoder.config.scaling_factor != bundle.scaling_factor:
        raise BundleError(
            f"the decoder was made for latents scaled by {decoder.config.scaling_factor}, the model's are "
            f"scaled by {bundle.scaling_factor}: it is the decoder of another model"
        )


def check_sampling(bundle: Bundle, *, guidance: float, steps: int) -> None:
    """Refuse a student that a bundle would not sample as it was distilled.

    Raises:
        BundleError: naming what does not fit.
    """
    accepted = get_args(LinearSolver)
    if (solver := distilled_solver(bundle)) not in accepted:
        raise BundleError(
            f"{bundle.source} was distilled for the sampler {solver}, and a bundle has the steps of "
            + " or ".join(accepted)
        )
    try:
        sampling_grid(bundle, steps=steps, solver=solver)
    except ValueError as error:
        raise BundleError(f"mobile.steps is {steps}: {error}") from None
    cfg_range = (bundle.distillation or {}).get("cfg_range")
    if cfg_range and needs_one_pass(bundle) and not cfg_range["low"] <= guidance <= cfg_range["high"]:
        raise BundleError(
            f"mobile.guidance is {guidance:g}, and {bundle.source} was distilled for {cfg_range['low']:g} to "
            f"{cfg_range['high']:g}: its guidance is compiled into the programs"
        )


@contextmanager
def _scratch_folder(url: str) -> Iterator[Path]:
    """A temporary folder beside the bundle, where there is room for it; in the system's for object stores."""
    # Built aside and published in one step: an interrupted or refused bundle leaves nothing behind.
    beside = Path(absolute_url(url)).parent if is_local(url) else Path(tempfile.gettempdir())
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mobile-", dir=beside, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as error:
        raise StorageError(f"the bundle cannot be written below {beside}: {error}") from error


def _published_manifest(url: str, *, identity: Mapping[str, Any]) -> dict[str, Any]:
    manifest = read_record(f"{url}/{MANIFEST}")
    # Through JSON, as the published one: tuples become lists.
    identity = json.loads(json.dumps(identity))
    if manifest.get("settings_hash") == digest(identity):
        return manifest
    differing = ", ".join(differences(manifest.get("identity", {}), identity))
    raise BundleError(
        f"{url} holds a bundle made otherwise ({differing}); a bundle is never changed: choose another "
        "--out, or remove it"
    )


def _write_manifest(
    folder: Path, *, contents: Mapping[str, Any], identity: Mapping[str, Any], licence: Licence
) -> str:
    """Write the licence text, if there is one, the model card and the manifest, whose text is returned."""
    if licence.text:
        try:
            (folder / LICENCE).write_bytes(read_bytes(licence.text))
        except (StorageError, FileNotFoundError) as error:
            raise LicenceError(f"--set mobile.licence.text={licence.text}: {error}") from None
    manifest = {
        **contents,
        "identity": identity,
        "versions": versions(),
        "settings_hash": digest(identity),
    }
    (folder / CARD).write_text(model_card(manifest, licence=licence))
    # Last: the manifest has the hash of each other file.
    manifest["files"] = file_records(folder)
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text)
    return text


def summary(manifest: Mapping[str, Any]) -> Iterator[str]:
    """One line for each variant: size, weights and parity of its images."""
    for name, variant in manifest["variants"].items():
        size = sum(module["bytes"] for module in variant["modules"].values()) / 2**20
        yield f"{name}: {size:.1f} MiB, {variant['weights']}, {_describe_parity(variant['images'])}"


def _describe_parity(parity: Mapping[str, Any]) -> str:
    if parity["psnr_db"] is None:
        return "images bit for bit as torch's"
    override = f", accepted below the limit: {parity['override']}" if parity["override"] else ""
    return f"images {parity['psnr_db']:.1f} dB to torch's{override}"
