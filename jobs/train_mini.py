"""Train the miniature from its seed: python -m jobs.train_mini --out DIR [--set key=value] [--dry-run].

DIR/checkpoints    a checkpoint of each stage, from which the same command resumes
DIR/base           the weights after the training on right captions
DIR/weights        the weights that `snapfusion/mini/weights` bundles
DIR/report.html    training curves and images
"""

import time
from pathlib import Path

import click

from jobs.cli.verb import DRY_RUN, Options, settings_verb
from jobs.runtime.logs import logger
from jobs.runtime.progress import StatusLine, format_duration
from snapfusion.mini.training.settings import MiniTraining


class _Progress:
    """Prints a stage's step, loss, rate and time left."""

    def __init__(self) -> None:
        self._line, self._stage = StatusLine(), ""

    def __call__(self, stage: str, step: int, steps: int, loss: float) -> None:
        if stage != self._stage:
            self._stage, self._started, self._first = stage, time.monotonic(), step
            return
        rate = (step - self._first) / (time.monotonic() - self._started)
        left = format_duration((steps - step) / rate)
        text = f"{stage}: step {step}/{steps}, loss {loss:.4f}, {rate:.1f} steps/s, {left} left"
        self._line.show(text, last=step == steps)


def _check_device(name: str) -> None:
    """Raise `ValueError` unless torch can allocate on the device."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {name!r} cannot be used ({reason}); cpu always can") from None


OPTIONS = [
    click.Option(["--out"], type=Path, required=True, help="folder for checkpoints/ and weights/"),
    click.Option(
        ["--base"],
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="folder of weights from right captions, whose UNets are trained further on noisy ones",
    ),
    click.Option(["--device"], default="cpu", help="torch device"),
    DRY_RUN,
]


def train_miniature(settings: MiniTraining, options: Options) -> None:
    """Train all networks, and write the page."""
    import torch

    from jobs.reports.mini_page import write_page
    from snapfusion.mini.training.recipe import train

    if options.dry_run:
        return
    _check_device(options.device)
    torch.set_num_threads(1)
    train(
        settings,
        folder=options.out,
        base=options.base,
        device=options.device,
        on_progress=_Progress(),
    )
    weights = options.out / "weights"
    page = write_page(weights, options.out / "report.html", figures={})
    logger.info(f"train_mini: weights in {weights}, their curves and images in {page}")


main = settings_verb("train_mini", MiniTraining(), train_miniature, about=__doc__, options=OPTIONS)

if __name__ == "__main__":
    main.exit()
