"""The `snapfusion` command: one picture from a caption, or any of the jobs."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jobs.exits import guarded, leave
from snapfusion.settings import SettingsError

if TYPE_CHECKING:
    from snapfusion.models.bundle import Bundle

VERBS = (
    "run_pipeline",
    "render_scenes",
    "encode_latents",
    "generate_pairs",
    "compute_targets",
    "finetune_vpred",
    "train_robust",
    "evolve_unet",
    "compare_chance",
    "train_efficient",
    "distill_steps",
    "distill_plan",
    "distill_decoder",
    "compile_mobile",
    "evaluate",
    "ablate",
    "report",
    "verify_table",
    "measure_latency",
    "measure_efficiency",
    "train_mini",
    "measure_mini",
    "measure_robustness",
)

SAMPLERS = ("ddim", "euler", "dpm", "dpm++")
"""Those of `snapfusion.solvers`, which takes seconds to import."""


class _OneLine(argparse.ArgumentParser):
    """Says a mistake in one line that begins with the option."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message.removeprefix("argument "))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `snapfusion`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0].replace("-", "_") if arguments else ""
    if verb in VERBS:
        entry = importlib.import_module(f"jobs.{verb}")
        return int(entry.main(arguments[1:]))
    return guarded("snapfusion", lambda: _generate(arguments))


def entry() -> None:
    """What the installed command calls."""
    leave(main())


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(
        prog="snapfusion",
        description="Draw a caption, or run a job.",
        epilog=f"jobs, each with its own --help: {', '.join(VERBS)}",
    )
    parser.add_argument("verb", choices=["generate"], metavar="generate")
    parser.add_argument("caption", help='for example "a large red circle at the top on a white background"')
    parser.add_argument("--model", default="mini", help="mini, mini-v, a folder, its URL or a hub id")
    parser.add_argument("--steps", type=int, help="default: those that it was distilled for, else 50")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="default: ddim")
    parser.add_argument("--guidance", type=float, default=2.5, help="w of Eq. 3; 1 is none (default: 2.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("-n", type=int, default=1, help="how many pictures, side by side (default: 1)")
    parser.add_argument("--out", default="picture.png", help="a PNG file (default: picture.png)")
    return parser


def _generate(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    _check(options)
    # Imported here, so that --help and a mistake answer at once.
    from jobs.picture import departure, draw, own_steps, save_pictures

    bundle = _load(options.model)
    steps = own_steps(bundle) if options.steps is None else options.steps
    if steps > bundle.schedule.num_steps:
        raise SettingsError(f"--steps {steps}: 1 to {bundle.schedule.num_steps} is accepted by this model")
    asked = {"steps": steps, "solver": options.sampler, "guidance": options.guidance}
    if told := departure(bundle, **asked):
        print(f"{options.model}: {told}")
    began = time.monotonic()
    pictures = draw(bundle, [options.caption], seed=options.seed, count=options.n, **asked)
    took = time.monotonic() - began
    try:
        factor = save_pictures(pictures, Path(options.out))
    except OSError as error:
        raise SettingsError(f"--out {options.out}: {error.strerror or error}") from None
    shown = f", shown {factor} times larger" if factor > 1 else ""
    by = f"{steps} steps of {options.sampler}"
    print(f"{options.out}: {options.n} of {bundle.image_size} px{shown}, {by}, {took:.1f} s after loading")


def _check(options: argparse.Namespace) -> None:
    """Refuse what no model can draw."""
    for option, given in (("-n", options.n), ("--steps", options.steps)):
        if given is not None and given < 1:
            raise SettingsError(f"{option} {given}: at least 1 is accepted")
    if not 1.0 <= options.guidance < math.inf:
        raise SettingsError(f"--guidance {options.guidance}: 1.0 and more is accepted")


def _load(source: str) -> Bundle:
    from snapfusion.models.load import load

    try:
        return load(source)
    except ValueError as error:
        raise SettingsError(f"--model {source}: {str(error).removeprefix(f'{source}: ')}") from None


if __name__ == "__main__":
    leave(main())
