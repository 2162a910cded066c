"""Train a v model with stochastic block skipping, so that it tolerates removed blocks. SnapFusion Eq. 5.

OUT/robust/   the model, in the layout of `jobs.training.student`
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli.in_run import train_in_run
from jobs.cli.job import Job, run
from jobs.cli.state import state_of
from jobs.runtime.exit_codes import exit_process
from jobs.training.run_folder import METRICS


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.train_robust`."""
    return run("train_robust", train_robust, preview=preview, about=__doc__, argv=argv)


def train_robust(job: Job) -> None:
    """Make the run's robust model, unless it is published already."""
    settings, url = job.recipe.robust, job.url("robust")
    model = job.resolve(settings.begin)
    metrics = train_in_run(job, settings.training, model=model, url=url, further=True)
    evaluation = metrics["evaluation"]
    print(f"  {url}/model: L_ori {evaluation['loss']:.5f} on {evaluation['rows']} held-out rows, all blocks")


def preview(job: Job) -> list[str]:
    """Describe what would be read and written."""
    settings, url = job.recipe.robust, job.url("robust")
    loop, skip = settings.training.loop, settings.training.skip
    return [
        f"would train {job.resolve(settings.begin)} on {job.url('latents')} for {loop.num_steps} steps of "
        f"{loop.global_batch} rows, each without a cross-attention block with probability {skip.attention:g} "
        f"and a ResNet block with {skip.resnet:g}, into {url} ({state_of(url, last=METRICS)})"
    ]


if __name__ == "__main__":
    exit_process(main())
