"""Reads what a run has committed: its tables, the records of its trainings and its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from jobs.cli.job import Job
from jobs.cli.state import read_json, read_json_files
from jobs.reports.latency_breakdown import LatencyBreakdown, breakdown_of
from jobs.training.metrics import DecoderMetrics, StudentMetrics
from jobs.training.run_folder import METRICS
from pipelines.tables.table import Snapshot, is_table, open_table
from snapfusion.export.bundle import FORMAT_VERSION, MANIFEST


class RunMetrics(TypedDict):
    """The run's metrics.json: the numbers of the report as plain values."""

    recipe: str
    settings_hash: str
    versions: dict[str, str]
    tables: dict[str, dict[str, Any]]
    student: dict[str, Any] | None
    fewer_steps: dict[str, Any] | None
    decoder: DecoderMetrics | None
    mobile: Mapping[str, Any] | None
    oracle: dict[str, float] | None
    latency: list[dict[str, Any]]
    steps: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CommittedRun:
    """The committed parts of a run; None or empty where a part does not exist yet.

    Attributes:
        job: the report's.
        tables: LATENTS and PAIRS, by lower-case name.
        student: metrics of the step-distilled student.
        decoder: metrics of the half-width decoder.
        mobile: the bundle's manifest.
        latencies: one of each latency file with whole UNets.
    """

    job: Job
    tables: Mapping[str, Snapshot]
    student: StudentMetrics | None
    decoder: DecoderMetrics | None
    mobile: Mapping[str, Any] | None
    latencies: tuple[LatencyBreakdown, ...]

    @classmethod
    def read(cls, job: Job) -> CommittedRun:
        """Open the tables and read the records of the run."""
        mobile = read_json(job.url(f"mobile/{MANIFEST}"))
        # Bundles of version 1 hold the decoder alone and have no variants to show.
        current = mobile is not None and mobile.get("format") == FORMAT_VERSION
        return cls(
            job=job,
            tables={
                name: open_table(job.url(name)) for name in ("latents", "pairs") if is_table(job.url(name))
            },
            student=read_json(f"{job.url(job.recipe.distill.name)}/{METRICS}"),
            decoder=read_json(job.url(f"decoder/{METRICS}")),
            mobile=mobile if current else None,
            # A bare table, such as a phone's, has no whole UNets.
            latencies=tuple(
                breakdown_of(record) for record in read_json_files(job.url("latency")) if record.get("unets")
            ),
        )
