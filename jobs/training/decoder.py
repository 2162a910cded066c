"""Distillation of the half-width decoder under Ray Train. SnapFusion Sec. 3.2 and B.2."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.training.metrics import DecoderMetrics
from jobs.training.progress_channel import OnReport
from jobs.training.settings import DecoderSettings
from jobs.training.spec import Training
from jobs.training.table_training import TableTraining, TrainingInputs, TrainingTable
from jobs.training.trainer import TrainingResult
from pipelines.loading.buckets import total_rows
from pipelines.loading.loader import BatchLoader
from pipelines.tables.table import Snapshot, TableError
from snapfusion.metrics.decoder import decode_times, fidelity
from snapfusion.models.bundle import Bundle
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.load import load
from snapfusion.training.decoder import DecoderObjective, decoded_images, stored_images

_STUDENT, _RANDOM = "decoder", "decoder-from-random"


def distill_decoder(
    settings: DecoderSettings,
    *,
    pairs_url: str,
    out_url: str,
    teacher: str,
    on_report: OnReport | None = None,
) -> DecoderMetrics:
    """Train the decoder and publish its folder at `out_url`, all or nothing.

    A run that was killed resumes, with the version of PAIRS that it began with; a published folder is left as
    it is.

    Args:
        settings: of the distillation.
        pairs_url: URL of PAIRS.
        out_url: folder to publish.
        teacher: source of the teacher, which PAIRS were made with.
        on_report: receives progress reports; None shows them.

    Returns:
        The metrics, as in metrics.json.

    Raises:
        TrainingError: if `out_url` holds or has begun a decoder of other settings, no row is held out, or
            training cannot end.
        TableError: if PAIRS do not fit the teacher, or store no images where the settings need them.
        TrainingFailed: if workers keep failing.
    """
    metrics: DecoderMetrics = TableTraining(
        kind="decoder",
        settings=settings,
        sources={"teacher": teacher},
        table=TrainingTable(role="pairs", kind="pairs", url=pairs_url),
        factory=assemble,
        check=partial(_check, settings),
        identity=lambda models: {"teacher": models["teacher"].describe()["weights"]["vae"]},
        publish=_publish,
    ).run(out_url, on_report=on_report)
    return metrics


def assemble(inputs: TrainingInputs[DecoderSettings], *, device: torch.device) -> Iterator[Training]:
    """Assemble the trainings, in a worker: the student's, and one from random weights to compare it with."""
    settings, bundle = inputs.settings, load(inputs.sources["teacher"], device=str(device))
    images = stored_images if settings.target == "stored" else decoded_images(bundle.decode)
    columns = ["latent", "image"] if settings.target == "stored" else ["latent"]
    loader = BatchLoader(columns=columns, **inputs.loading())

    def evaluate(student: HalfDecoder, *, with_times: bool) -> dict[str, Any]:
        """Fidelity on held-out rows and, `with_times`, the latency of both decoders."""
        student.eval()
        rows = loader.held_out(rows=settings.trainer.micro_batch, limit=settings.evaluation_rows)
        batches = [batch.to(bundle.device) for batch in rows]
        values = asdict(fidelity(student.decode, batches, teacher_images=images))
        if with_times:
            times = decode_times(
                teacher=bundle.decode,
                student=student.decode,
                latents=batches[0]["latent"],
                batches=settings.timing_batches,
                repeats=settings.timing_repeats,
            )
            values["times"] = [{**asdict(timed), "ratio": timed.ratio} for timed in times]
        return values

    inits = {_STUDENT: settings.init} | ({_RANDOM: "random"} if settings.compare_random_init else {})
    for name, init in inits.items():
        student = HalfDecoder.from_vae(bundle.vae, init=init, seed=settings.loop.seed)
        yield Training(
            name=name,
            model=student,
            objective=DecoderObjective(images),
            loader=loader,
            settings=settings.loop,
            identity={**inputs.identity, "init": init},
            evaluate=partial(evaluate, student, with_times=name == _STUDENT),
        )


def _check(settings: DecoderSettings, pairs: Snapshot, models: Mapping[str, Bundle]) -> None:
    """Refuse PAIRS of another VAE, or without the images that the settings need.

    Raises:
        TableError: naming what does not fit.
    """
    model, other = models["teacher"].describe(), pairs.identity["model"]
    for part, expected, found in (
        ("VAE", model["weights"]["vae"], other["weights"]["vae"]),
        ("scaling factor", model["scaling_factor"], other["scaling_factor"]),
    ):
        if expected != found:
            raise TableError(
                f"{pairs.url} was made with another {part} ({str(found)[:12]}) than the teacher's "
                f"({str(expected)[:12]}): name the teacher that generated it, or generate new PAIRS"
            )
    if settings.target == "stored" and not pairs.identity["generation"]["images"]:
        raise TableError(f"{pairs.url} stores no images: set decoder.target=online, or generate new PAIRS")


def _publish(
    path: Path,
    results: Mapping[str, TrainingResult],
    inputs: TrainingInputs[DecoderSettings],
    _checked: None,
) -> dict[str, Any]:
    """Write the decoder; returns its metrics."""
    student, random = results[_STUDENT], results.get(_RANDOM)
    vae, pairs = load(inputs.sources["teacher"]).vae, inputs.table
    decoder = HalfDecoder.from_vae(vae)
    decoder.load_state_dict(student.weights)
    parts = [part for part in (vae.decoder, vae.post_quant_conv) if part is not None]
    full = sum(parameter.numel() for part in parts for parameter in part.parameters())
    half = decoder.num_parameters
    return {
        "files": decoder.save(str(path)),
        "psnr_db": student.evaluation["psnr_db"],
        "held_out_rows": student.evaluation["rows"],
        "parameters": {"teacher": full, "student": half, "ratio": full / half},
        "rows": {"pairs": pairs.num_rows, "trained_on": sum(map(total_rows, inputs.counts))},
        "times": student.evaluation["times"],
        "curve": student.curve,
        "random_init": random
        and {
            "psnr_db": random.evaluation["psnr_db"],
            "gain_db": student.evaluation["psnr_db"] - random.evaluation["psnr_db"],
            "curve": random.curve,
        },
        "environment": student.environment,
    }


def summary(metrics: DecoderMetrics) -> list[str]:
    """Lines with the decoder's fidelity, size and latency."""
    parameters = metrics["parameters"]
    lines = [
        f"decoder: {metrics['psnr_db']:.2f} dB to the teacher's on {metrics['held_out_rows']} held-out rows, "
        f"{parameters['student']:,} parameters, {parameters['ratio']:.2f} times fewer"
    ]
    if metrics["random_init"]:
        lines.append(f"{metrics['random_init']['gain_db']:+.2f} dB over random weights at equal steps")
    lines += [
        f"batch of {time['batch']}: {time['student_ms']:.2f} ms an image, {time['ratio']:.2f} times faster"
        for time in metrics["times"]
    ]
    return lines
