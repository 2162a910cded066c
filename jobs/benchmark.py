"""Benchmark a mobile bundle's modules on this machine, and its model's in torch. SnapFusion Tables 1 and 4.

Each module runs in each runtime in a process of its own, on the bundle's test vectors.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jobs.runtime.arguments import OneLineParser
from jobs.runtime.exit_codes import run_guarded
from snapfusion.settings import SettingsError

MIN_REPEATS = 20
"""With fewer runs the 95th percentile would be a single run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `snapfusion benchmark`."""
    return run_guarded("benchmark", lambda: _benchmark(_options(argv)))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="snapfusion benchmark", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a folder made by compile_mobile")
    parser.add_argument("--model", help="model of torch's rows (default: the one the bundle was made from)")
    parser.add_argument("--decoder", metavar="URL", help="half-width decoder of torch's rows (likewise)")
    parser.add_argument(
        "--variant", nargs="+", action="extend", metavar="NAME", help="variants of the bundle (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=50, help="timed runs of each module (default: 50)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and ExecuTorch (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    options = parser.options(argv)
    if options.repeats < MIN_REPEATS:
        raise SettingsError(
            f"--repeats {options.repeats}: at least {MIN_REPEATS} are needed for the 95th percentile"
        )
    if options.threads < 1:
        raise SettingsError(f"--threads {options.threads}: at least 1 is accepted")
    if options.json and Path(options.json).is_dir():
        raise SettingsError(f"--json {options.json}: it is a folder; a file is accepted")
    return options


def _benchmark(options: argparse.Namespace) -> None:
    # Imported here, so that --help and mistakes are answered at once.
    from jobs.evaluation.bundle_benchmark import BundleBenchmark
    from jobs.reports.benchmark_table import benchmark_lines
    from pipelines.storage.objects import StorageError, replace_object
    from snapfusion.export.bundle import BundleError, open_bundle

    try:
        bundle = open_bundle(options.bundle)
    except BundleError as error:
        raise SettingsError(f"BUNDLE {error}") from None
    results = BundleBenchmark(
        bundle=bundle,
        model=options.model,
        decoder=options.decoder,
        variants=tuple(options.variant) if options.variant else None,
        repeats=options.repeats,
        threads=options.threads,
    ).measure()
    print("\n".join(["", *benchmark_lines(results)]))
    if options.json:
        try:
            replace_object(options.json, f"{json.dumps(results, indent=1)}\n".encode())
        except StorageError as error:
            raise SettingsError(f"--json {error}") from None
        print(f"\n{options.json}")
