"""Collects the content of a run's report, and its metrics.json, from what the run has committed."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from jobs.cli.job import Job
from jobs.cli.step_times import read_step
from jobs.cli.usage import has_page, usage_commands
from jobs.reports import image_samples
from jobs.reports.latency_breakdown import LatencyBreakdown
from jobs.reports.lineage_nodes import lineage_nodes
from jobs.reports.measurements import measurements, training_charts
from jobs.reports.model_facts import model_facts
from jobs.reports.oracle_scores import score_with_oracle
from jobs.reports.other_weights import other_weights
from jobs.reports.run_page import (
    RejectionExample,
    RejectionSummary,
    ReportContent,
    StepTiming,
    mobile_variants_of,
)
from jobs.reports.run_records import CommittedRun, RunMetrics
from jobs.reports.side_by_side import sample_side_by_side
from jobs.runtime.versions import versions
from pipelines.rejections import NOT_SHOWN
from pipelines.tables.manifest import total_rejected
from pipelines.tables.table import Snapshot
from snapfusion.export.web_page import PAGE_FOLDER
from snapfusion.mini.captions import knows_caption
from snapfusion.models.bundled import BUNDLED
from snapfusion.settings import digest

_VERBS = (
    *("render_scenes", "encode_latents", "measure_latency", "train_efficient"),
    *("distill_steps", "generate_pairs", "distill_decoder", "compile_mobile"),
)
_TABLE_OF_VERB = {"encode_latents": "latents", "generate_pairs": "pairs"}
_NUM_EXAMPLES = 3
"""Rejected rows that are shown for each reason."""


def collect(job: Job) -> tuple[ReportContent, RunMetrics]:
    """The content of the page, and the numbers as plain values for metrics.json."""
    run = CommittedRun.read(job)
    recipe, pairs, student = job.recipe, run.tables.get("pairs"), run.student
    step_comparison, side_by_side, oracle, notes = None, None, None, dict[str, str]()
    # Only recipes with a floor make images that the miniature's oracle can read.
    if student and recipe.oracle_floor:
        step_comparison, side_by_side = sample_side_by_side(
            student, url=job.url(recipe.distill.name), cache=run.cache
        )
    if pairs and recipe.oracle_floor:
        oracle, notes = score_with_oracle(pairs, cache=run.cache)
    models = model_facts(run)
    tables = {name: _table_metrics(table) for name, table in run.tables.items()}
    content = ReportContent(
        recipe=recipe.name,
        settings_hash=recipe.digest(),
        settings_json=recipe.to_json(),
        versions=versions(),
        totals=tuple(_totals(run)),
        scenes=image_samples.scene_samples(run),
        teacher_images=image_samples.teacher_images(pairs, notes) if pairs else (),
        step_comparison=step_comparison,
        decoder_comparisons=image_samples.decoder_comparisons(run),
        charts=tuple(training_charts(run)),
        measurements=tuple(measurements(run, side_by_side=side_by_side, oracle=oracle, models=models)),
        latencies=run.latencies,
        mobile_comparisons=image_samples.mobile_comparisons(run),
        mobile_variants=mobile_variants_of(run.mobile) if run.mobile else (),
        lineage=lineage_nodes(run, tables, models=models),
        rejections=tuple(summary for table in run.tables.values() for summary in _rejections(table)),
        timings=tuple(_timings(run)),
    )
    run.cache.remove_others()
    content = replace(content, other_weights=other_weights(run))
    if run.mobile:
        page = f"../mobile/{PAGE_FOLDER}/index.html" if has_page(job) else ""
        content = replace(content, usage=tuple(usage_commands(job)), page=page)
    if recipe.model in BUNDLED:
        content = replace(content, unknown_captions=_unknown_captions(content))
    metrics = RunMetrics(
        recipe=content.recipe,
        settings_hash=content.settings_hash,
        versions=dict(content.versions),
        tables=tables,
        # The curve stays in the student's own metrics.json.
        student=student and {key: value for key, value in student.items() if key != "curve"},
        fewer_steps=side_by_side,
        decoder=run.decoder,
        mobile=run.mobile,
        other_weights=list(content.other_weights),
        oracle=asdict(oracle) if oracle else None,
        latency=[_latency_metrics(latency) for latency in run.latencies],
        steps=[asdict(timing) for timing in content.timings],
    )
    return content, metrics


def _unknown_captions(content: ReportContent) -> frozenset[str]:
    """The captions on the page that the miniature does not know."""
    shown = (
        *(content.scenes, content.teacher_images),
        *(content.decoder_comparisons, content.mobile_comparisons),
    )
    return frozenset(item.caption for part in shown for item in part if not knows_caption(item.caption))


def _totals(run: CommittedRun) -> Iterator[tuple[str, str]]:
    for name, table in run.tables.items():
        yield f"{table.num_rows:,}", f"rows of {name.upper()}"
    if run.student:
        distillation = run.student["distillation"]
        yield f"{distillation['steps']} steps", f"student, distilled from {distillation['teacher_steps']}"
    if run.decoder:
        yield f"{run.decoder['psnr_db']:.1f} dB", "half-width decoder, relative to the teacher's"
        yield f"{run.decoder['parameters']['ratio']:.2f}x", "fewer parameters"


def _latency_metrics(latency: LatencyBreakdown) -> dict[str, Any]:
    return {
        "device": latency.device,
        "how": latency.runtime,
        "date": latency.date,
        "disturbed": latency.disturbed,
        "unets": [asdict(unet) for unet in latency.unets],
    }


def _table_metrics(table: Snapshot) -> dict[str, Any]:
    manifests = list(table.manifests().values())
    return {
        "url": table.url,
        "version": table.version,
        "identity": digest(table.identity),
        "units": len(table.units),
        "bytes": sum(unit.size for unit in table.units),
        "rows_read": sum(manifest.rows_read for manifest in manifests),
        "rows_written": table.num_rows,
        "rejected": total_rejected(manifests),
    }


def _rejections(table: Snapshot) -> Iterator[RejectionSummary]:
    by_reason = defaultdict[str, list[RejectionExample]](list)
    for row in table.rejected_rows():
        by_reason[row["reason"]].append(RejectionExample(id=row["id"], detail=row["detail"]))
    for reason, rows in sorted(by_reason.items()):
        yield RejectionSummary(
            table=str(table.identity["kind"]).upper(),
            reason=reason,
            count=len(rows),
            examples=() if reason in NOT_SHOWN else tuple(rows[:_NUM_EXAMPLES]),
        )


def _timings(run: CommittedRun) -> Iterator[StepTiming]:
    for verb in _VERBS:
        if step := read_step(run.job, verb):
            table = run.tables.get(_TABLE_OF_VERB.get(verb, ""))
            rows = table.num_rows if table else None
            yield StepTiming(step=verb, seconds=step.seconds, rows=rows, network_busy=step.network_busy)
