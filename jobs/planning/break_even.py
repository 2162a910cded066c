"""Computes from how many uses on precomputed teacher targets (TARGETS) are cheaper than online ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jobs.planning.rates_and_prices import NodeType, StoragePrices
from jobs.planning.workload import Workload
from jobs.training.settings import DistillSettings
from snapfusion.training.settings import BRANCHES


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Precomputed against online targets, for one student.

    Attributes:
        student: its name.
        teacher_seconds: of the teacher for a row, on one worker, averaged over both branches.
        student_seconds: of the student's forward and backward passes for a row, likewise.
        saved: fraction of a step's time that a table saves, by branch and "mixed".
        stored_bytes: of a row of TARGETS.
        pays_from: uses of each target from which the table is cheaper; None if it never is.
        used: uses of each target by this training.
    """

    student: str
    teacher_seconds: float
    student_seconds: float
    saved: Mapping[str, float]
    stored_bytes: float
    pays_from: float | None
    used: float

    @property
    def pays(self) -> bool:
        """Whether the table is cheaper for this training alone."""
        return self.pays_from is not None and self.used >= self.pays_from


def break_even(
    workload: Workload, student: DistillSettings, *, node: NodeType, storage: StoragePrices
) -> BreakEven:
    """Compare precomputed with online targets for one student of the run.

    Computing a target takes the teacher as long in a table as in the trainer. So a table that is used once
    saves only a difference in price: it pays where targets are used again, or computed on cheaper nodes.
    """
    settings, p = workload.settings, student.targets_settings.cfg_probability
    saved, teacher_mean, student_mean = dict[str, float](), 0.0, 0.0
    for guided, share in ((False, 1.0 - p), (True, p)):
        student_seconds = _row_seconds(workload, student, targets="table", guided=guided)
        online_seconds = _row_seconds(workload, student, targets="online", guided=guided)
        teacher_mean += share * (online_seconds - student_seconds)
        student_mean += share * student_seconds
        if share:
            saved[BRANCHES[guided]] = 1.0 - student_seconds / online_seconds
    # Where nothing has a price, a second is worth a second on either side.
    tables_price, training_price, stored_price = 1.0, 1.0, 0.0
    if node.on_demand:
        worker_seconds = (node.accelerators or node.cores) * 3600.0
        tables_price = node.price(settings.tables_on) / worker_seconds
        training_price = node.price(settings.trainings_on) / worker_seconds
        stored_price = workload.target_bytes / 1e9 * storage.gb_month * settings.months
    online = teacher_mean * training_price
    targets = workload.counts.latents * workload.job.recipe.targets.draws
    return BreakEven(
        student=student.name,
        teacher_seconds=teacher_mean,
        student_seconds=student_mean,
        saved={**saved, "mixed": teacher_mean / (teacher_mean + student_mean)},
        stored_bytes=workload.target_bytes,
        pays_from=(teacher_mean * tables_price + stored_price) / online if online else None,
        used=student.loop.num_steps * student.loop.global_batch / targets,
    )


def _row_seconds(
    workload: Workload, student: DistillSettings, *, targets: Literal["table", "online"], guided: bool
) -> float:
    """Seconds of one worker for a row of a step of one branch, without the update."""
    # A consistency distillation has a single branch, whatever `steps` says.
    steps = student.steps.model_copy(update={"cfg_probability": float(guided)})
    stage = workload.distillation(student.model_copy(update={"targets": targets, "steps": steps}))
    shared = (work for group in stage.groups for work in group.works if not work.replicated)
    return sum(map(workload.rates.seconds, shared)) / stage.rows
