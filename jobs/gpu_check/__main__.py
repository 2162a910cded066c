"""Check one CUDA device in about five minutes: tests, generation, training, sharding, rates for the planner.

OUT/PART.json    the result of each part, which a second run does not repeat; OUT/PART.log its lines
OUT/rates.json   rates of the device, for --set plan.rates
OUT/gpu.md       all results as a page; of a CUDA device it is written to docs/gpu.md, too
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from jobs.cli.verb import Options, plain_verb
from jobs.gpu_check.settings import PARTS, SIZES, CheckSize, PartName, SizeName
from jobs.runtime.logs import logger
from snapfusion.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

_DOCUMENT = Path("docs/gpu.md")


def check(options: Options) -> None:
    """Run the parts, and write the page."""
    from jobs.gpu_check.commands import RATES
    from jobs.gpu_check.page import page
    from jobs.gpu_check.runner import CheckFailed, run_parts

    size, parts = (
        SIZES[cast("SizeName", options.size)],
        cast("Sequence[PartName]", options.part or list(PARTS)),
    )
    device, folder = _device(size), Path(options.out) / size.name
    logger.info("\n".join(_needs(size, parts, device=device, folder=folder)))
    failed = run_parts(parts, size, folder)
    text = page(size, folder, device=device)
    (folder / "gpu.md").write_text(text, encoding="utf-8")
    if size.device == "cuda" and _DOCUMENT.parent.is_dir():
        _DOCUMENT.write_text(text, encoding="utf-8")
    if (rates := folder / "rates" / RATES).exists():
        (folder / RATES).write_bytes(rates.read_bytes())
    if failed:
        raise CheckFailed(f"failed: {', '.join(failed)}; run it again when mended, what is done is kept")
    logger.info(f"\n{folder / 'gpu.md'}")


def _device(size: CheckSize) -> str:
    """The device's name.

    Raises:
        SettingsError: if there is none that can be checked.
    """
    import torch

    from jobs.evaluation.settings import TimingSettings
    from jobs.evaluation.timing import setting_of

    if size.device == "cpu":
        return setting_of(TimingSettings()).device
    if not torch.cuda.is_available():
        raise SettingsError(
            f"--size {size.name} needs a CUDA device of {size.least_gib:g} GiB, and torch finds none here; "
            "run it where there is one, or with --size mini, which does the same parts on the CPU"
        )
    properties = torch.cuda.get_device_properties(0)
    if (gib := properties.total_memory / 2**30) < 0.9 * size.least_gib:
        raise SettingsError(
            f"--size {size.name} needs a CUDA device of {size.least_gib:g} GiB, and {properties.name} has "
            f"{gib:.1f}: take another one, or --size mini"
        )
    return f"{properties.name} of {gib:.0f} GiB, the first of {torch.cuda.device_count()}"


def _needs(size: CheckSize, parts: "Sequence[PartName]", *, device: str, folder: Path) -> list[str]:
    return [
        f"needs {size.disk_gb:g} GB of disk in {folder} and about {size.minutes} minutes; no network",
        f"device: {device}; model {size.model}",
        *(f"  {name}: {PARTS[name]}" for name in parts),
    ]


main = plain_verb(
    "gpu_check",
    check,
    about=__doc__,
    options=[
        click.Option(
            ["--size"], type=click.Choice(list(SIZES)), default="sd15", help="mini does the same on the CPU"
        ),
        click.Option(["--out"], default="runs/gpu-check", help="folder of the results"),
        click.Option(
            ["--part"], type=click.Choice(list(PARTS)), multiple=True, help="repeatable; all without it"
        ),
    ],
)

if __name__ == "__main__":
    main.exit()
