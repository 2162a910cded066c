"""Benchmark a mobile bundle's modules on this machine, and its model's in torch. SnapFusion Tables 1 and 4.

Each module runs in each runtime in a process of its own, on the bundle's test vectors.
"""

import json
from pathlib import Path

import click

from jobs.cli.verb import Options, plain_verb
from jobs.reports.benchmark_table import benchmark_lines
from jobs.runtime.logs import logger
from pipelines.storage.objects import StorageError, replace_object
from snapfusion.settings import SettingsError

MIN_REPEATS = 20
"""With fewer runs the 95th percentile would be a single run."""


OPTIONS = [
    click.Argument(["bundle"], type=Path),
    click.Option(["--model"], help="model of torch's rows (default: the one the bundle was made from)"),
    click.Option(["--decoder"], metavar="URL", help="half-width decoder of torch's rows (likewise)"),
    click.Option(["--variant"], multiple=True, metavar="NAME", help="repeatable (default: all)"),
    click.Option(
        ["--repeats"],
        type=click.IntRange(MIN_REPEATS),
        default=50,
        help="timed runs of each module",
    ),
    click.Option(
        ["--threads"],
        type=click.IntRange(1),
        default=1,
        help="threads of torch, ExecuTorch and ONNX Runtime",
    ),
    click.Option(["--json"], metavar="FILE", help="also write the results as JSON"),
]


def _benchmark(options: Options) -> None:
    if options.json and Path(options.json).is_dir():
        raise SettingsError(f"--json {options.json}: it is a folder; a file is accepted")
    # Imported here, so that --help and mistakes are answered at once.
    from jobs.evaluation.bundle_benchmark import BundleBenchmark
    from snapfusion.export.bundle import open_bundle
    from snapfusion.export.bundle_files import BundleError

    try:
        bundle = open_bundle(options.bundle)
    except BundleError as error:
        raise SettingsError(f"BUNDLE {error}") from None
    results = BundleBenchmark(
        bundle=bundle,
        model=options.model,
        decoder=options.decoder,
        variants=options.variant or None,
        repeats=options.repeats,
        threads=options.threads,
    ).measure()
    logger.info("\n".join(["", *benchmark_lines(results)]))
    if options.json:
        try:
            replace_object(options.json, f"{json.dumps(results, indent=1)}\n".encode())
        except StorageError as error:
            raise SettingsError(f"--json {error}") from error
        logger.info(f"\n{options.json}")


main = plain_verb("benchmark", _benchmark, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
