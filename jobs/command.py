"""The `snapfusion` command: one picture from a caption, or any of the jobs."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.exits import guarded, leave
from snapfusion.settings import SettingsError

VERBS = (
    "run_pipeline",
    "render_scenes",
    "encode_latents",
    "generate_pairs",
    "compute_targets",
    "finetune_vpred",
    "distill_steps",
    "distill_plan",
    "distill_decoder",
    "compile_mobile",
    "evaluate",
    "report",
    "verify_table",
    "train_mini",
    "measure_mini",
)


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
    parser = argparse.ArgumentParser(
        prog="snapfusion",
        description="Draw a caption, or run a job.",
        epilog=f"jobs, each with its own --help: {', '.join(VERBS)}",
    )
    parser.add_argument("verb", choices=["generate"], metavar="generate")
    parser.add_argument("caption", help='for example "a large red circle at the top on a white background"')
    parser.add_argument("--model", default="mini", help="mini, a diffusers folder, its URL or a hub id")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default: 50)")
    parser.add_argument("--guidance", type=float, default=2.5, help="w of Eq. 3; 1 is none (default: 2.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("-n", type=int, default=1, help="how many pictures, side by side (default: 1)")
    parser.add_argument("--out", default="picture.png", help="a PNG file (default: picture.png)")
    return parser


def _generate(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    for option, given, least in (("-n", options.n, 1), ("--guidance", options.guidance, 1.0)):
        if not given >= least:
            raise SettingsError(f"{option} {given}: at least {least} is accepted")
    if not 1 <= options.steps <= 1000:
        raise SettingsError(f"--steps {options.steps}: 1 to 1000 is accepted")
    # Imported here, so that --help and a mistake answer at once.
    from jobs.picture import draw, save_pictures
    from snapfusion.models.load import load

    bundle = load(options.model)
    began = time.monotonic()
    pictures = draw(
        bundle,
        options.caption,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        count=options.n,
    )
    took = time.monotonic() - began
    try:
        factor = save_pictures(pictures, Path(options.out))
    except OSError as error:
        raise SettingsError(f"--out {options.out}: {error.strerror or error}") from None
    shown = f", shown {factor} times larger" if factor > 1 else ""
    print(f"{options.out}: {options.n} of {bundle.image_size} px{shown}, {took:.1f} s after loading")


if __name__ == "__main__":
    leave(main())
