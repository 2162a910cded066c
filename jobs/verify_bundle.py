"""Verify a mobile bundle: its files, its sampler, its tokenizer, and the results of its programs.

ExecuTorch programs are executed anywhere; Core ML packages on a Mac, where they are also timed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.runtime.arguments import OneLineParser
from jobs.runtime.exit_codes import run_guarded

if TYPE_CHECKING:
    from snapfusion.export.bundle import MobileBundle


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `snapfusion verify-bundle`."""

    def work() -> None:
        parser = OneLineParser(prog="snapfusion verify-bundle", description=(__doc__ or "").split("\n\n")[0])
        parser.add_argument("bundle", metavar="DIR", help="a mobile bundle")
        verify(Path(parser.options(argv).bundle))

    return run_guarded("verify_bundle", work)


def verify(folder: Path) -> None:
    """Print each check; raises at the first that fails."""
    from snapfusion.export.bundle import open_bundle
    from snapfusion.export.verification import check_sampler_and_tokenizer

    bundle = open_bundle(folder)
    files = bundle.manifest["files"]
    size = sum(file["bytes"] for file in files.values()) / 2**20
    print(f"{folder}: {len(files)} files, {size:.1f} MiB, as in the manifest")
    for checked in check_sampler_and_tokenizer(bundle):
        print(f"  {checked.what}: {checked.found}")
    for name, variant in bundle.manifest["variants"].items():
        _verify_variant(bundle, name, runtime=variant["runtime"])


def _verify_variant(bundle: MobileBundle, variant: str, *, runtime: str) -> None:
    from snapfusion.export.bundle import COREML, EXECUTORCH, MODULES
    from snapfusion.export.coreml_package import open_packages
    from snapfusion.export.loop import CompiledModel
    from snapfusion.export.verification import check_variant

    if runtime == EXECUTORCH:
        model = bundle.programs(variant)
    elif runtime == COREML and sys.platform == "darwin":
        packages = {part: open_packages(bundle.files(variant, part)) for part in MODULES}
        model = CompiledModel(**packages, conditions=bundle.manifest["conditions"])
    else:
        print(f"  {variant}: not executed, {runtime} is not available here; its files match the manifest")
        return
    for checked in check_variant(bundle, variant, model=model):
        latency = "" if checked.milliseconds is None else f", {checked.milliseconds:.1f} ms per call"
        print(f"  {checked.what}: {checked.found}{latency}")
