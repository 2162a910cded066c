"""Distil the half-width decoder from the teacher's, on PAIRS. SnapFusion Sec. 3.2 and B.2.

OUT/decoder/config.json, decoder.safetensors   the decoder, for `snapfusion.models.decoder.load_decoder`
OUT/decoder/metrics.json                       parents, settings, training curve and evaluation
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli.job import Job, run
from jobs.cli.state import state_of
from jobs.runtime.cluster import connect
from jobs.runtime.exit_codes import exit_process
from jobs.training.decoder import distill_decoder, summary
from jobs.training.progress_channel import show_reports
from jobs.training.run_folder import METRICS
from pipelines.storage.objects import exists


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.distill_decoder`."""
    return run("distill_decoder", distill, preview=preview, about=__doc__, argv=argv)


def distill(job: Job) -> None:
    """Make the run's decoder, unless it is published already."""
    url = job.url("decoder")
    if not exists(f"{url}/{METRICS}"):
        connect(job.recipe.cluster)
    metrics = distill_decoder(
        job.recipe.decoder,
        pairs_url=job.url("pairs"),
        out_url=url,
        teacher=job.recipe.model,
        on_report=show_reports(),
    )
    for line in summary(metrics):
        print(f"  {line}")


def preview(job: Job) -> list[str]:
    """Describe what would be read and written."""
    loop, url = job.recipe.decoder.loop, job.url("decoder")
    return [
        f"would train a half-width decoder on {job.url('pairs')} for {loop.num_steps} steps of "
        f"{loop.global_batch} rows, into {url} ({state_of(url, last=METRICS)})"
    ]


if __name__ == "__main__":
    exit_process(main())
