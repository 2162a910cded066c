"""Compare Table 3's UNet and the half-width decoder with the model's own. SnapFusion Tables 1 and 5.

OUT/efficiency/RUNTIME-PRECISION-DEVICE.json   step, sampling loop, memory and parameters; the decoders

Only shapes matter here, so the UNets have random weights. Networks are measured in turns; each sampling loop
is executed once; memory is that of a process with one UNet.
"""

from datetime import UTC, datetime
from typing import Any

from jobs.cli.in_run import measure_in_run
from jobs.cli.job import Job
from jobs.cli.state import state_of
from jobs.cli.verb import recipe_verb
from jobs.runtime.versions import versions


def measure(job: Job) -> None:
    """Measure the run's efficiency, unless it is measured already."""
    from jobs.evaluation.efficiency import summary

    measure_in_run(_url(job), lambda: _measure(job), summary=summary)


def _measure(job: Job) -> dict[str, Any]:
    from jobs.evaluation.efficiency import measure_efficiency
    from jobs.evaluation.timing import load_measured_model

    settings = job.recipe.efficiency
    model = load_measured_model(job.recipe.model, settings=settings)
    return {
        "recipe": job.recipe.name,
        "model": job.recipe.model,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "settings": settings.to_values(),
        **measure_efficiency(settings, model=model),
    }


def _url(job: Job) -> str:
    return job.url(f"efficiency/{job.recipe.efficiency.name}.json")


def preview(job: Job) -> list[str]:
    """Describe what would be measured."""
    from jobs.evaluation.efficiency import LOOP_STEPS

    settings, url = job.recipe.efficiency, _url(job)
    loops = " and execute {} steps of one, {} of the other".format(*LOOP_STEPS.values())
    return [
        f"would take {settings.turns} turns of a step of {job.recipe.model}'s UNet and of Table 3's"
        f"{loops if settings.loop else ''}, by {settings.runtime} in {settings.precision} on "
        f"{settings.device}, into {url} ({state_of(url)})"
    ]


main = recipe_verb("measure_efficiency", measure, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
