"""What a run has to show: gathered from its committed tables, decoder and bundle, for the report.

Each function takes one kind of commit; whatever a run has not made yet is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import torch

from jobs.cli.inputs import shards_url
from jobs.cli.job import Job
from jobs.cli.step_times import read_step
from jobs.evaluation.timing import ORIGIN
from jobs.reports.charts import Chart, Series
from jobs.reports.latency_breakdown import LatencyBreakdown, breakdown_of
from jobs.reports.run_page import (
    CaptionedImage,
    ComparedImage,
    ImageComparison,
    LineageNode,
    Measurement,
    RejectionExample,
    RejectionSummary,
    ReportContent,
    StepTiming,
    mobile_variants_of,
)
from jobs.reports.side_by_side import TEACHER_STEPS, sample_side_by_side
from jobs.runtime.versions import versions
from jobs.training.initial_weights import PROVENANCE
from jobs.training.run_folder import METRICS
from pipelines.loading.loader import held_out_rows
from pipelines.rejections import Rejected
from pipelines.sources import SourceError
from pipelines.sources.webdataset import Sample, list_shards, read_shard
from pipelines.stages.image import decode_image
from pipelines.storage.objects import exists, read_bytes
from pipelines.tables.manifest import total_rejected
from pipelines.tables.schemas import array_type, from_png
from pipelines.tables.table import Snapshot, is_table, open_table
from snapfusion.export.bundle import FORMAT_VERSION, IMAGES, MANIFEST
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.scenes import Scene, parse_caption
from snapfusion.models.bundle import to_uint8
from snapfusion.models.decoder import load_decoder
from snapfusion.models.load import ModelError, load
from snapfusion.settings import digest
from snapfusion.training.step_distillation import BRANCHES

VERBS = (
    "render_scenes",
    "encode_latents",
    "measure_latency",
    "train_efficient",
    "distill_steps",
    "generate_pairs",
    "distill_decoder",
    "compile_mobile",
)
_SCENES, _DRAWN, _COMPARED, _EXAMPLES = 8, 16, 6, 3
_SIDE = 256
"""Pictures of shards are shown at most this large, in pixels."""


def collect(job: Job) -> tuple[ReportContent, dict[str, Any]]:
    """The content of the page, and the figures as plain values for metrics.json."""
    tables = {name: open_table(job.url(name)) for name in ("latents", "pairs") if is_table(job.url(name))}
    student_place = job.url(job.recipe.distill.name)
    student = read_json(f"{student_place}/{METRICS}")
    fewer_steps, drawn = None, None
    if student and job.recipe.oracle_floor:
        fewer_steps, drawn = sample_side_by_side(student, place=student_place)
    decoder = read_json(job.url(f"decoder/{METRICS}"))
    mobile = read_json(job.url(f"mobile/{MANIFEST}"))
    if mobile and mobile.get("format") != FORMAT_VERSION:
        mobile = None  # an earlier release's, which had the decoder alone
    anatomies = _breakdowns(job)
    oracle = score_with_oracle(tables["pairs"]) if "pairs" in tables and job.recipe.oracle_floor else None
    timings = _timings(job, tables)
    lineage = _lineage(job, tables, student, decoder, mobile)
    content = ReportContent(
        recipe=job.recipe.name,
        settings_hash=job.recipe.digest(),
        settings_json=job.recipe.to_json(),
        versions=versions(),
        totals=_totals(tables, student, decoder),
        scenes=_scenes(job),
        teacher_images=_teacher_images(tables["pairs"], oracle) if "pairs" in tables else (),
        fewer_steps=fewer_steps,
        comparisons=_comparisons(job, tables["pairs"], decoder) if decoder else (),
        charts=(*_student_charts(student), *_decoder_charts(decoder)),
        measurements=(
            *_student_figures(drawn),
            *_speed_figures(student, anatomies),
            *_decoder_figures(decoder),
            *_oracle_figures(oracle, job),
        ),
        anatomies=anatomies,
        phone=_phone(job, mobile),
        artifacts=mobile_variants_of(mobile) if mobile else (),
        lineage=lineage,
        rejections=tuple(rejection for table in tables.values() for rejection in _rejections(table)),
        timings=timings,
    )
    metrics = {
        "recipe": job.recipe.name,
        "settings_hash": job.recipe.digest(),
        "versions": dict(content.versions),
        "tables": {name: _table_figures(table) for name, table in tables.items()},
        # Its curve is in its own metrics.json.
        "student": student and {key: value for key, value in student.items() if key != "curve"},
        "fewer_steps": drawn,
        "decoder": decoder,
        "mobile": mobile,
        "oracle": oracle and {key: value for key, value in oracle.items() if key != "notes"},
        "latency": [_latency_figures(anatomy) for anatomy in anatomies],
        "steps": [vars(timing) for timing in timings],
    }
    return content, metrics


def score_with_oracle(pairs: Snapshot) -> dict[str, Any] | None:
    """What the miniature's oracle reads in the teacher's images, held against their captions.

    Returns:
        images, mean_attributes_right and all_attributes_right in [0, 1], and a note by row id; None if no row
        has both an image and a caption that describes a scene.
    """
    oracle = load_oracle()
    right: list[float] = []
    notes: dict[str, str] = {}
    for unit in pairs.units:
        rows = pairs.read_unit(unit, ["id", "caption", "image"]).to_pylist()
        told = [
            (row, scene) for row in rows if row["image"] is not None and (scene := _scene(row["caption"]))
        ]
        if told:
            pixels = np.stack([from_png(row["image"]) for row, _ in told])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            scored = oracle.score(images, [scene for _, scene in told])
            right += scored.float().mean(dim=1).tolist()
            for (row, _), flags in zip(told, scored, strict=True):
                notes[row["id"]] = f"{int(flags.sum())} of {len(flags)} attributes right"
    if not right:
        return None
    return {
        "images": len(right),
        "mean_attributes_right": float(np.mean(right)),
        "all_attributes_right": float(np.mean([share == 1.0 for share in right])),
        "notes": notes,
    }


def _scene(caption: str) -> Scene | None:
    try:
        return parse_caption(caption)
    except ValueError:
        return None


def read_json(place: str) -> dict[str, Any] | None:
    return json.loads(read_bytes(place)) if exists(place) else None


def _breakdowns(job: Job) -> tuple[LatencyBreakdown, ...]:
    """Of each latency file that has UNets in it; a bare table, as of a phone, says nothing of one."""
    filesystem, folder = fsspec.core.url_to_fs(job.url("latency"))
    names = sorted(PurePosixPath(path).name for path in filesystem.glob(f"{folder}/*.json"))
    files = [json.loads(read_bytes(job.url(f"latency/{name}"))) for name in names]
    return tuple(breakdown_of(told) for told in files if told.get("unets"))


def _latency_figures(anatomy: LatencyBreakdown) -> dict[str, Any]:
    return {
        "device": anatomy.device,
        "how": anatomy.how,
        "date": anatomy.date,
        "unets": [vars(unet) for unet in anatomy.unets],
    }


def _totals(
    tables: Mapping[str, Snapshot], student: Mapping[str, Any] | None, decoder: Mapping[str, Any] | None
) -> tuple[tuple[str, str], ...]:
    totals = [(f"{table.num_rows:,}", f"rows of {name.upper()}") for name, table in tables.items()]
    if student:
        told = student["distillation"]
        totals.append((f"{told['steps']} steps", f"of the student, taught by {told['teacher_steps']}"))
    if decoder:
        totals.append((f"{decoder['psnr_db']:.1f} dB", "half-width decoder to the teacher's"))
        totals.append((f"{decoder['parameters']['ratio']:.2f}x", "fewer parameters"))
    return tuple(totals)


def _scenes(job: Job) -> tuple[CaptionedImage, ...]:
    try:
        shard = list_shards(shards_url(job))[0]
    except SourceError:
        return ()
    settings = job.recipe.latents
    size = min(_SIDE, load(job.recipe.model).image_size)
    pictures: list[CaptionedImage] = []
    for row in islice(read_shard(shard, settings.shards), 4 * _SCENES):
        if isinstance(row, Sample):
            with suppress(Rejected):
                image = decode_image(row.image, size=size, settings=settings.images)
                pictures.append(CaptionedImage(image=image, caption=row.caption))
    return tuple(pictures[:_SCENES])


def _teacher_images(pairs: Snapshot, oracle: Mapping[str, Any] | None) -> tuple[CaptionedImage, ...]:
    rows = pairs.read_unit(pairs.units[0], ["id", "caption", "image"]).to_pylist() if pairs.units else []
    notes = oracle["notes"] if oracle else {}
    shown = [row for row in rows if row["image"] is not None][:_DRAWN]
    return tuple(
        CaptionedImage(image=from_png(row["image"]), caption=row["caption"], note=notes.get(row["id"], ""))
        for row in shown
    )


@torch.inference_mode()
def _comparisons(job: Job, pairs: Snapshot, decoder: Mapping[str, Any]) -> tuple[ImageComparison, ...]:
    pinned = open_table(pairs.url, version=decoder["parents"]["pairs"]["version"])
    fraction = job.recipe.decoder.loader.held_out
    units = list(held_out_rows(pinned, ["caption", "latent"], fraction=fraction, limit=_COMPARED))
    teacher, half = load(job.recipe.model), load_decoder(job.url("decoder"))
    compared = []
    for rows in units:
        latents = array_type(rows.schema.field("latent")).unpack(rows.column("latent").to_pylist())
        for caption, values in zip(rows.column("caption").to_pylist(), latents, strict=True):
            latent = torch.from_numpy(values.astype(np.float32))[None]
            whole = _pixels(teacher.decode(latent))
            held = ComparedImage(name="Half width", image=_pixels(half.decode(latent)), reference=whole)
            compared.append(ImageComparison(caption=caption, name="Teacher", reference=whole, held=(held,)))
    return tuple(compared)


def _phone(job: Job, mobile: Mapping[str, Any] | None) -> tuple[ImageComparison, ...]:
    """What torch and the programs drew, as the bundle keeps it."""
    if mobile is None:
        return ()

    def picture(name: str, number: int) -> np.ndarray:
        return from_png(read_bytes(job.url(f"mobile/{IMAGES}/{name}-{number}.png")))

    compared = []
    for number, caption in enumerate(mobile["captions"][:_COMPARED]):
        reference = picture("torch", number)
        held = tuple(
            ComparedImage(name=name, image=picture(name, number), reference=reference)
            for name in mobile["variants"]
        )
        compared.append(ImageComparison(caption=caption, name="torch", reference=reference, held=held))
    return tuple(compared)


def _pixels(image: torch.Tensor) -> np.ndarray:
    return to_uint8(image[0]).permute(1, 2, 0).numpy()


def _student_charts(student: Mapping[str, Any] | None) -> tuple[Chart, ...]:
    """The distillation loss of each branch of Eq. 11, over the steps that took it."""
    if student is None:
        return ()
    series = []
    for branch in BRANCHES.values():
        points = [point for point in student["curve"] if f"{branch}/loss" in point]
        if points:
            steps, losses = ([point[key] for point in points] for key in ("step", f"{branch}/loss"))
            series.append(Series(name=branch, x=steps, y=losses))
    return (
        Chart(
            title="Student: distillation loss",
            x_label="step",
            y_label="loss (Eq. 9)",
            series=tuple(series),
            log_y=True,
        ),
    )


def _decoder_charts(decoder: Mapping[str, Any] | None) -> tuple[Chart, ...]:
    if decoder is None:
        return ()
    curves = {f"from {decoder['settings']['init']} channels": decoder["curve"]}
    if decoder["random_init"]:
        curves["from random weights"] = decoder["random_init"]["curve"]
    series = tuple(
        Series(name=name, x=[point["step"] for point in curve], y=[point["loss"] for point in curve])
        for name, curve in curves.items()
    )
    return (
        Chart(title="Decoder: loss of training", x_label="step", y_label="MSE", series=series, log_y=True),
    )


def _student_figures(drawn: Mapping[str, Any] | None) -> tuple[Measurement, ...]:
    if drawn is None:
        return ()
    gain = drawn["clip_gain"]
    figure = Measurement(
        name="the student's CLIP over that of its first weights",
        value=gain["value"],
        count=drawn["captions"],
        counted="held-out captions",
        seed=drawn["seed"],
        note=f"paired, 95 %: {gain['low']:.4f} to {gain['high']:.4f}; guidance {drawn['guidance']:g}",
    )
    return (figure,)


def _speed_figures(
    student: Mapping[str, Any] | None, anatomies: Sequence[LatencyBreakdown]
) -> Iterator[Measurement]:
    """What the student's steps take beside 50 of the origin's, where both UNets were timed."""
    if student is None:
        return
    steps, parameters = student["distillation"]["steps"], _parameters_of(student)
    for anatomy in anatomies:
        origin = next((unet for unet in anatomy.unets if unet.name == ORIGIN), None)
        mine = next((unet for unet in anatomy.unets if unet.parameters == parameters), None)
        if origin is None or mine is None:
            continue
        yield Measurement(
            name="UNet time of a picture: 50 steps of the origin over the student's",
            value=TEACHER_STEPS * origin.measured_ms / (steps * mine.measured_ms),
            unit="x",
            count=mine.turns,
            counted="turns of each UNet",
            note=(
                f"{TEACHER_STEPS} steps of {origin.measured_ms:.3g} ms over {steps} of {mine.measured_ms:.3g} ms, "
                f"guided; {anatomy.how}; 12.2x with 8 steps on an A100 in the paper"
            ),
        )


def _parameters_of(student: Mapping[str, Any]) -> int | None:
    """Of a student's UNet, if its first weights are where they were."""
    with suppress(ModelError):
        return sum(one.numel() for one in load(student["parents"]["student"]["source"]).unet.parameters())
    return None


def _decoder_figures(decoder: Mapping[str, Any] | None) -> tuple[Measurement, ...]:
    if decoder is None:
        return ()
    rows, seed = decoder["held_out_rows"], decoder["settings"]["loop"]["seed"]
    pairs = {"count": rows, "counted": "held-out pairs", "seed": seed}
    figures = [
        Measurement(name="half-width decoder to the teacher's", value=decoder["psnr_db"], unit="dB", **pairs)
    ]
    if decoder["random_init"]:
        gain = decoder["random_init"]["gain_db"]
        note = "both trained for the same steps"
        figures.append(
            Measurement(name="gain over random weights", value=gain, unit="dB", note=note, **pairs)
        )
    ratio = decoder["parameters"]["ratio"]
    figures.append(
        Measurement(
            name="parameters, teacher's / half-width",
            value=ratio,
            count=1,
            counted="decoder",
            note="3.8 in the paper",
        )
    )
    figures += [
        Measurement(
            name=f"time, teacher's / half-width, batch of {time['batch']}",
            value=time["ratio"],
            count=time["repeats"],
            counted="turns",
            note=f"{time['student_ms']:.2f} ms an image; 3.2 on a phone in the paper",
        )
        for time in decoder["times"]
    ]
    return tuple(figures)


def _oracle_figures(oracle: Mapping[str, Any] | None, job: Job) -> tuple[Measurement, ...]:
    if oracle is None:
        return ()
    generation = job.recipe.pairs.generation
    told = {
        "unit": "%",
        "count": oracle["images"],
        "counted": "teacher images",
        "seed": generation.seed,
        "note": f"{generation.steps} steps at guidance {generation.guidance:g}",
    }
    return (
        Measurement(name="attributes right", value=100 * oracle["mean_attributes_right"], **told),
        Measurement(name="all attributes right", value=100 * oracle["all_attributes_right"], **told),
    )


def _lineage(
    job: Job,
    tables: Mapping[str, Snapshot],
    student: Mapping[str, Any] | None,
    decoder: Mapping[str, Any] | None,
    mobile: Mapping[str, Any] | None,
) -> tuple[LineageNode, ...]:
    weights = load(job.recipe.model).fingerprint()
    commits = [
        LineageNode(
            name="SHARDS",
            kind="shards",
            place=shards_url(job),
            identity=digest(job.recipe.source.to_values()),
        ),
        LineageNode(name="TEACHER", kind="model", place=job.recipe.model, identity=digest(weights)),
    ]
    parents = {"latents": ("SHARDS", "TEACHER"), "pairs": ("LATENTS", "TEACHER")}
    for name, table in tables.items():
        known = {commit.name for commit in commits}
        commits.append(
            LineageNode(
                name=name.upper(),
                kind="table",
                place=table.url,
                identity=digest(table.identity),
                version=table.version,
                parents=tuple(parent for parent in parents[name] if parent in known),
                **_counts(table),
            )
        )
    commits += _efficient_commits(job, known=commits)
    if student:
        commits += _student_commits(student, place=job.url(job.recipe.distill.name), known=commits)
    if decoder:
        commits.append(
            LineageNode(
                name="DECODER",
                kind="checkpoint",
                place=job.url("decoder"),
                identity=decoder["settings_hash"],
                parents=("PAIRS", "TEACHER"),
            )
        )
    if mobile:
        commits.append(_mobile_commit(mobile, place=job.url("mobile"), known=commits))
    return tuple(commits)


def _mobile_commit(mobile: Mapping[str, Any], *, place: str, known: Sequence[LineageNode]) -> LineageNode:
    """The bundle, made of those commits whose settings its parents name."""
    made_of = {parent["settings_hash"] for parent in mobile["identity"]["parents"].values() if parent}
    return LineageNode(
        name="MOBILE",
        kind="bundle",
        place=place,
        identity=mobile["settings_hash"],
        parents=tuple(commit.name for commit in known if commit.identity in made_of),
    )


def _efficient_commits(job: Job, *, known: Sequence[LineageNode]) -> list[LineageNode]:
    """The efficient model, and before it the one that gave it its weights, unless that is known."""
    made = read_json(job.url(f"efficient/{METRICS}"))
    made_of = read_json(job.url(f"efficient-first/{PROVENANCE}"))
    if made is None or made_of is None:
        return []
    names = {commit.identity: commit.name for commit in known}
    origin = digest(made_of["weights"])
    commits = []
    if origin not in names:
        names[origin] = "TEACHER OF STEPS"
        place = job.resolve(job.recipe.efficient.begin)
        commits.append(LineageNode(name=names[origin], kind="model", place=place, identity=origin))
    parents = ("LATENTS", names[origin]) if "LATENTS" in names.values() else (names[origin],)
    place = job.url("efficient")
    weights = load(place).fingerprint()
    return [
        *commits,
        LineageNode(
            name="EFFICIENT", kind="checkpoint", place=place, identity=digest(weights), parents=parents
        ),
    ]


def _student_commits(
    student: Mapping[str, Any], *, place: str, known: Sequence[LineageNode]
) -> list[LineageNode]:
    """The student, and before it the models that it was made from and that are not known yet."""
    names = {commit.identity: commit.name for commit in known}
    commits, parents = [], []
    for role, name in (("teacher", "TEACHER OF STEPS"), ("student", "FIRST WEIGHTS")):
        model = student["parents"][role]
        identity = digest(model["weights"])
        if identity not in names:
            names[identity] = name
            commits.append(LineageNode(name=name, kind="model", place=model["source"], identity=identity))
        parents.append(names[identity])
    data = "LATENTS" if student["settings"]["targets"] == "online" else "TARGETS"
    made_from = (data, *parents) if data in names.values() else tuple(parents)
    return [
        *commits,
        LineageNode(
            name="STUDENT",
            kind="checkpoint",
            place=place,
            identity=student["settings_hash"],
            parents=tuple(dict.fromkeys(made_from)),
        ),
    ]


def _counts(table: Snapshot) -> dict[str, Any]:
    known = list(table.manifests().values())
    return {
        "rows_read": sum(account.rows_read for account in known),
        "rows_written": table.num_rows,
        "rejected": total_rejected(known),
    }


def _table_figures(table: Snapshot) -> dict[str, Any]:
    return {
        "url": table.url,
        "version": table.version,
        "identity": digest(table.identity),
        "units": len(table.units),
        "bytes": sum(unit.size for unit in table.units),
        **_counts(table),
    }


def _rejections(table: Snapshot) -> Sequence[RejectionSummary]:
    name = str(table.identity["kind"]).upper()
    by_reason: dict[str, list[RejectionExample]] = {}
    for row in table.rejected_rows():
        by_reason.setdefault(row["reason"], []).append(RejectionExample(id=row["id"], detail=row["detail"]))
    return [
        RejectionSummary(table=name, reason=reason, count=len(rows), examples=tuple(rows[:_EXAMPLES]))
        for reason, rows in sorted(by_reason.items())
    ]


def _timings(job: Job, tables: Mapping[str, Snapshot]) -> tuple[StepTiming, ...]:
    rows = {"encode_latents": "latents", "generate_pairs": "pairs"}
    timings = []
    for verb in VERBS:
        step = read_step(job, verb)
        if step:
            table = tables.get(rows.get(verb, ""))
            timings.append(
                StepTiming(step=verb, seconds=step.seconds, rows=table.num_rows if table else None)
            )
    return tuple(timings)
