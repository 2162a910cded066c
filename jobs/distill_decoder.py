"""Distil the half-width decoder from the teacher's, on PAIRS. SnapFusion Sec. 3.2 and B.2.

The folder it leaves is loaded by `snapfusion.models.decoder.load_decoder`:

config.json, decoder.safetensors     the decoder
metrics.json                         what it was made of and from, how it was trained, and how good it is
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.runtime.exit_codes import exit_process
from jobs.training.decoder import distill_decoder, summary
from jobs.training.progress_channel import show_reports
from jobs.training.run_folder import METRICS, RunFolder
from pipelines.storage.objects import exists

if TYPE_CHECKING:
    from jobs.cli.job import Job


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.distill_decoder`."""
    # Recipes are made of this module's settings, so the command line is above it.
    from jobs.cli.job import run

    return run("distill_decoder", distill, preview=preview, about=__doc__, argv=argv)


def distill(job: Job) -> None:
    """Make the run's decoder; one that is there already is left as it is."""
    from jobs.runtime.cluster import connect

    place = job.url("decoder")
    if not exists(f"{place}/{METRICS}"):
        connect(job.recipe.cluster)
    metrics = distill_decoder(
        job.recipe.decoder,
        pairs_url=job.url("pairs"),
        out_url=place,
        teacher=job.recipe.model,
        on_report=show_reports(),
    )
    for line in summary(metrics):
        print(f"  {line}")


def read_metrics(url: str) -> dict[str, Any]:
    """What a decoder's folder says of it.

    Raises:
        TrainingError: if there is no finished decoder.
    """
    return RunFolder(url=url, kind="decoder").read()


def preview(job: Job) -> list[str]:
    """What would be read and written."""
    loop, place = job.recipe.decoder.loop, job.url("decoder")
    held = "which is there already" if exists(f"{place}/{METRICS}") else "which is not there yet"
    return [
        f"would train a half-width decoder on {job.url('pairs')} for {loop.num_steps} steps of "
        f"{loop.global_batch} rows, into {place} ({held})"
    ]


if __name__ == "__main__":
    exit_process(main())
