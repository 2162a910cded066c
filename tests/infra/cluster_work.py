"""The work of test_cluster_run on a cluster of labelled nodes: rows by two stages, and a training."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import ray
import torch
from synthetic_units import IDENTITY, SCHEMA, finished
from test_trainer import Regression, training

from jobs.runtime.cluster import connect
from jobs.runtime.progress import show_progress
from jobs.runtime.settings import ClusterSettings
from jobs.training.settings import TrainerSettings
from jobs.training.spec import Training
from jobs.training.trainer import run_trainings
from pipelines.ray_data.execution import PipelineStage, run_on_ray
from pipelines.ray_data.settings import Pool
from pipelines.stages.write import WriteUnit
from pipelines.tables.committer import commit_stream
from pipelines.tables.settings import Bounds
from pipelines.tables.table import create_table
from pipelines.tables.units import FinishedRows
from snapfusion.settings import digest


def role() -> str:
    """The role of the node that this runs on."""
    return str(ray.get_runtime_context().get_node_labels()["role"])


class Draw:
    """Makes rows whose unit states the role of its node."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, start: int) -> FinishedRows:
        time.sleep(0.2)
        rows = finished(start, start + 4, final=start + 4 == self.rows)
        return replace(rows, environment={"role": role()})


class Slowly(Regression):
    """Takes long enough for a step to be observed."""

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, step: int) -> torch.Tensor:
        time.sleep(1.0)
        return super().__call__(model, batch, step=step)


def program(device: torch.device) -> Iterator[Training]:
    """One training of a few slow steps."""
    yield replace(training(), objective=Slowly(), evaluate=lambda: {"role": role()})


def work(address: str, out: str, rows: int) -> None:
    """Fill a table and train, each on nodes of its own, and print the role of the training's node."""
    connect(ClusterSettings(address=address))
    table = create_table(f"{out}/table", schema=SCHEMA, identity=IDENTITY)
    teachers = Pool(labels={"role": "teacher"})
    writing = {"url": table.url, "schema": SCHEMA, "settings": digest(table.identity)}
    stages = [
        PipelineStage(build=Draw, arguments={"rows": rows}, pool=teachers),
        PipelineStage(build=WriteUnit, arguments=writing, pool=teachers),
    ]
    written = run_on_ray(range(0, rows, 4), stages)
    commit_stream(table, written, bounds=Bounds(), total=rows, on_progress=show_progress("generate_pairs"))
    settings = TrainerSettings(labels={"role": "trainer"}, cpus_per_worker=0.5, log_to=())
    trained = run_trainings(
        program, {}, store_url=f"{out}/training", settings=settings, on_report=lambda figures: None
    )
    print(f"trained on {trained['sums'].evaluation['role']}")


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
