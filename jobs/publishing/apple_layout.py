"""Exports a model as a folder of resources for Apple's ml-stable-diffusion, whole or not at all."""

import shutil
import tempfile
from pathlib import Path

from jobs.runtime.logs import logger
from jobs.training.mobile_bundle import check_parts
from pipelines.storage.objects import StorageError
from snapfusion.export.apple_readme import README, apple_readme, fitting_scheduler, parity_lines
from snapfusion.export.apple_resources import write_apple_resources
from snapfusion.export.installed import check_installed
from snapfusion.export.settings import AppleSettings
from snapfusion.models.card import CARD
from snapfusion.models.decoder import load_decoder
from snapfusion.models.load import load
from snapfusion.models.local_folder import local_folder
from snapfusion.settings import SettingsError

MODEL_CARD = "MODEL_CARD.md"


def export_apple(source: str, out: Path, *, decoder: str | None, settings: AppleSettings) -> None:
    """Write the new folder `out`, and print what it holds.

    Args:
        source: of the model.
        out: of the resources.
        decoder: folder of its half-width decoder; None for its own.
        settings: weights, layout and the image for comparison.

    Raises:
        SettingsError: if `out` exists.
        NotInstalledError: if coremltools is not installed.
        ModelError, DecoderError, BundleError: if there is no such model or decoder, or they do not fit.
        AppleLayoutError, UNetError: if Apple's pipeline cannot sample the model.
        ParityError: if a package does not agree with torch.
        StorageError: if `out` cannot be written.
    """
    if out.exists():
        raise SettingsError(f"--out {out} exists and is not overwritten; give another folder, or remove it")
    check_installed("coremltools")
    bundle, half = load(source), None if decoder is None else load_decoder(decoder)
    check_parts(bundle, half)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".apple-", dir=out.parent) as scratch:
            folder, packages = Path(scratch, "resources"), Path(scratch, "packages")
            folder.mkdir()
            packages.mkdir()
            resources = write_apple_resources(
                folder,
                bundle=bundle,
                decoder=half,
                settings=settings,
                scratch=packages,
                log=lambda line: logger.info(f"  {line}"),
            )
            (folder / README).write_text(
                apple_readme(resources, bundle, caption=settings.caption), encoding="utf-8"
            )
            _copy_card(source, folder)
            folder.rename(out)
    except OSError as error:
        raise StorageError(f"--out {out} cannot be written: {error}") from error
    sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in resources.packages.items())
    logger.info(f"{out}: {sizes}")
    logger.info(f"  to torch: {', '.join(parity_lines(resources))}")
    logger.info(f"  {fitting_scheduler(resources)}")
    logger.info(f"  {out / README} says how a Mac compiles and loads them")


def _copy_card(source: str, folder: Path) -> None:
    """Copy the card of a model in a local folder, which has its licence."""
    model = local_folder(source)
    if model is not None and (model / CARD).is_file():
        shutil.copyfile(model / CARD, folder / MODEL_CARD)
