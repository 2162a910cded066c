"""Charts and measurements of the report, from the records of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from jobs.evaluation.settings import ORIGIN
from jobs.reports.charts import Chart, Series
from jobs.reports.metric_names import scorer_name
from jobs.reports.model_facts import ModelFacts
from jobs.reports.oracle_scores import OracleScores
from jobs.reports.run_page import Measurement
from jobs.reports.run_records import CommittedRun
from jobs.reports.side_by_side import TEACHER_STEPS
from jobs.training.metrics import DecoderMetrics, StudentMetrics
from snapfusion.training.settings import BRANCHES


def training_charts(run: CommittedRun) -> Iterator[Chart]:
    """Loss curves: the student's for each branch of Eq. 11, and the decoder's for each initialisation."""
    if run.student:
        curve = run.student["curve"]
        series = [Series.of(branch, curve, x="step", y=f"{branch}/loss") for branch in BRANCHES.values()]
        yield Chart(
            title="Student: distillation loss",
            x_label="step",
            y_label="loss (Eq. 9)",
            # A branch that no step took has no curve.
            series=tuple(one for one in series if one.x),
            log_y=True,
        )
    if run.decoder:
        decoder = run.decoder
        curves = {f"from {decoder['settings']['init']} channels": decoder["curve"]}
        if decoder["random_init"]:
            curves["from random weights"] = decoder["random_init"]["curve"]
        yield Chart(
            title="Decoder: training loss",
            x_label="step",
            y_label="MSE",
            series=tuple(Series.of(name, curve, x="step", y="loss") for name, curve in curves.items()),
            log_y=True,
        )


def measurements(
    run: CommittedRun,
    *,
    side_by_side: Mapping[str, Any] | None,
    oracle: OracleScores | None,
    models: ModelFacts,
) -> Iterator[Measurement]:
    """The rows of the table of measurements, for the parts that exist."""
    if side_by_side:
        gain = side_by_side["clip_gain"]
        yield Measurement(
            name="CLIP of the student above that of its initial weights",
            value=gain["value"],
            count=side_by_side["captions"],
            counted="held-out captions",
            seed=side_by_side["seed"],
            note=f"paired, 95 %: {gain['low']:.4f} to {gain['high']:.4f}; "
            f"guidance {side_by_side['guidance']:g}; by {scorer_name(side_by_side['scorer'])}",
        )
    if run.student:
        yield from _speedups(run, run.student, parameters=models.student_parameters)
    if run.decoder:
        yield from _decoder_measurements(run.decoder)
    if oracle:
        generation = run.job.recipe.pairs.generation
        for name, share in (
            ("attributes correct", oracle.mean_attributes_right),
            ("all attributes correct", oracle.all_attributes_right),
        ):
            yield Measurement(
                name=name,
                value=100 * share,
                unit="%",
                count=oracle.images,
                counted="teacher images",
                seed=generation.seed,
                note=f"{generation.steps} steps at guidance {generation.guidance_text}",
            )


def _speedups(run: CommittedRun, student: StudentMetrics, *, parameters: int | None) -> Iterator[Measurement]:
    """UNet time of 50 steps of the original model over the student's, where their timing was undisturbed."""
    steps = student["distillation"]["steps"]
    for latency in run.latencies:
        if latency.disturbed:
            continue
        origin = next((unet for unet in latency.unets if unet.name == ORIGIN), None)
        # A latency file names architectures and no students: the student's is found by its size.
        own = next((unet for unet in latency.unets if unet.parameters == parameters), None)
        if origin and own:
            yield Measurement(
                name="UNet time per image: 50 steps of the original model over the student's",
                value=TEACHER_STEPS * origin.measured_ms / (steps * own.measured_ms),
                unit="x",
                count=own.turns,
                counted="turns of each UNet",
                note=f"{TEACHER_STEPS} steps of "
                f"{origin.measured_ms:.3g} ms over {steps} of {own.measured_ms:.3g} ms, guided; "
                f"{latency.runtime}; 12.2x with 8 steps on an A100 in the paper",
            )


def _decoder_measurements(decoder: DecoderMetrics) -> Iterator[Measurement]:
    pairs: dict[str, Any] = {
        "count": decoder["held_out_rows"],
        "counted": "held-out pairs",
        "seed": decoder["settings"]["loop"]["seed"],
    }
    yield Measurement(name="PSNR of the half-width decoder", value=decoder["psnr_db"], unit="dB", **pairs)
    if decoder["random_init"]:
        yield Measurement(
            name="gain over random initialisation",
            value=decoder["random_init"]["gain_db"],
            unit="dB",
            note="both trained for the same steps",
            **pairs,
        )
    yield Measurement(
        name="parameters, teacher's / half-width",
        value=decoder["parameters"]["ratio"],
        count=1,
        counted="decoder",
        note="3.8 in the paper",
    )
    for time in decoder["times"]:
        yield Measurement(
            name=f"time, teacher's / half-width, batch of {time['batch']}",
            value=time["ratio"],
            count=int(time["repeats"]),
            counted="turns",
            note=f"{time['student_ms']:.2f} ms per image; 3.2 on a phone in the paper",
        )
