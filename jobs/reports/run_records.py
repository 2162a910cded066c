"""Reads what a run has committed: its tables, the records of its trainings and its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from pydantic import TypeAdapter

from jobs.cli.job import Job
from jobs.cli.state import read_json, read_json_files
from jobs.reports.latency_breakdown import LatencyBreakdown, breakdown_of
from jobs.reports.part_cache import PartCache
from jobs.training.metrics import METRICS, DecoderMetrics, StudentMetrics
from pipelines.tables.table import Snapshot, is_table, open_table
from snapfusion.export.layout import FORMAT_VERSIONS, MANIFEST

_LATENCIES = TypeAdapter(tuple[LatencyBreakdown, ...])


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
    other_weights: list[str]
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
        cache: of the parts that a model computes.
    """

    job: Job
    tables: Mapping[str, Snapshot]
    student: StudentMetrics | None
    decoder: DecoderMetrics | None
    mobile: Mapping[str, Any] | None
    latencies: tuple[LatencyBreakdown, ...]
    cache: PartCache

    @classmethod
    def read(cls, job: Job) -> CommittedRun:
        """Open the tables and read the records of the run."""
        cache = PartCache(job.url("report/cache"))
        mobile = read_json(job.url(f"mobile/{MANIFEST}"))
        # Bundles of version 1 hold the decoder alone and have no variants to show.
        # A bare table, such as a phone's, has no whole UNets.
        records = [record for record in read_json_files(job.url("latency")) if record.get("unets")]
        current = mobile is not None and mobile.get("format") in FORMAT_VERSIONS
        return cls(
            job=job,
            tables={
                name: open_table(job.url(name)) for name in ("latents", "pairs") if is_table(job.url(name))
            },
            student=read_json(f"{job.url(job.recipe.distill.name)}/{METRICS}"),
            decoder=read_json(job.url(f"decoder/{METRICS}")),
            mobile=mobile if current else None,
            latencies=cache.part(
                "latencies",
                _LATENCIES,
                follows_from=records,
                compute=lambda: tuple(map(breakdown_of, records)),
            ),
            cache=cache,
        )
