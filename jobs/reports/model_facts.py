"""Facts about a report's models that only their weights show."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from pydantic import TypeAdapter

from jobs.cli.state import read_json
from jobs.reports.input_states import model_state
from jobs.reports.run_records import CommittedRun
from jobs.training.metrics import METRICS
from snapfusion.settings import digest


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Identities and sizes of models.

    Attributes:
        identities: digest of the weights of the recipe's model and of the efficient one, by their source.
        student_parameters: of the student's UNet; None without a student, or if its initial weights no longer
            exist.
    """

    identities: Mapping[str, str]
    student_parameters: int | None


_FORM = TypeAdapter(ModelFacts)


def model_facts(run: CommittedRun) -> ModelFacts:
    """Kept, or read off the weights."""
    efficient = run.job.url("efficient")
    identified = [run.job.recipe.model]
    if read_json(f"{efficient}/{METRICS}") is not None:
        identified.append(efficient)
    initial = run.student and run.student["parents"]["student"]["source"]
    return run.cache.part(
        "models",
        _FORM,
        follows_from=[
            [[source, model_state(source)] for source in identified],
            initial and model_state(initial),
        ],
        compute=lambda: _read(identified, initial=initial),
    )


def _read(identified: list[str], *, initial: str | None) -> ModelFacts:
    # Imported here, because a report of kept parts does without torch.
    from snapfusion.models.errors import ModelError
    from snapfusion.models.load import load

    identities = {source: digest(load(source).fingerprint()) for source in identified}
    parameters = None
    if initial is not None:
        with suppress(ModelError):
            parameters = sum(one.numel() for one in load(initial).unet.parameters())
    return ModelFacts(identities=identities, student_parameters=parameters)
