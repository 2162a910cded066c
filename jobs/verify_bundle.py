"""Verify a mobile bundle: its files, its sampler, its tokenizer, and the results of its programs.

ExecuTorch programs and ONNX models are executed and timed anywhere; Core ML packages on a Mac only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.cli.verb import plain_verb
from jobs.runtime.logs import logger

if TYPE_CHECKING:
    from snapfusion.export.bundle import MobileBundle


def verify(folder: Path) -> None:
    """Print each check; raises at the first that fails."""
    from snapfusion.export.bundle import open_bundle
    from snapfusion.export.verification import check_sampler_and_tokenizer

    bundle = open_bundle(folder)
    files = bundle.manifest["files"]
    size = sum(file["bytes"] for file in files.values()) / 2**20
    logger.info(f"{folder}: {len(files)} files, {size:.1f} MiB, as in the manifest")
    for checked in check_sampler_and_tokenizer(bundle):
        logger.info(f"  {checked.what}: {checked.found}")
    for name, variant in bundle.manifest["variants"].items():
        _verify_variant(bundle, name, runtime=variant["runtime"])


def _verify_variant(bundle: MobileBundle, variant: str, *, runtime: str) -> None:
    from snapfusion.export.bundle import COREML, EXECUTED_HERE, MODULES
    from snapfusion.export.coreml_package import open_packages
    from snapfusion.export.loop import CompiledModel
    from snapfusion.export.verification import check_variant

    if runtime in EXECUTED_HERE:
        model = bundle.programs(variant)
    elif runtime == COREML and sys.platform == "darwin":
        packages = {part: open_packages(bundle.files(variant, part)) for part in MODULES}
        model = CompiledModel(**packages, conditions=bundle.manifest["conditions"])
    else:
        logger.info(
            f"  {variant}: not executed, {runtime} is not available here; its files match the manifest"
        )
        return
    for checked in check_variant(bundle, variant, model=model):
        latency = "" if checked.milliseconds is None else f", {checked.milliseconds:.1f} ms per call"
        logger.info(f"  {checked.what}: {checked.found}{latency}")


main = plain_verb(
    "verify_bundle",
    lambda options: verify(options.bundle),
    about=__doc__,
    options=[click.Argument(["bundle"], type=Path, metavar="DIR")],
)

if __name__ == "__main__":
    main.exit()
