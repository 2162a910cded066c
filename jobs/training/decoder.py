"""Distillation of the half-width decoder under Ray Train. SnapFusion Sec. 3.2 and B.2."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from jobs.evaluation.evaluation import absolute_source
from jobs.training.progress_channel import OnReport
from jobs.training.run_folder import RunFolder
from jobs.training.settings import DecoderSettings
from jobs.training.spec import Training
from jobs.training.student import check_held_out
from jobs.training.trainer import TrainingResult, run_trainings
from pipelines.loading.loader import BatchLoader, count_trainable
from pipelines.storage.objects import absolute_url
from pipelines.tables.leases import read_lease
from pipelines.tables.table import Snapshot, TableError, open_table
from snapfusion.metrics.decoder import decode_times, fidelity
from snapfusion.models.bundle import Bundle
from snapfusion.models.decoder import DecoderConfig, HalfDecoder
from snapfusion.models.load import load
from snapfusion.settings import digest
from snapfusion.training.decoder import DecoderObjective, TeacherImages, decoded_images, stored_images

_STUDENT, _RANDOM = "decoder", "decoder-from-random"


def distill_decoder(
    settings: DecoderSettings,
    *,
    pairs_url: str,
    out_url: str,
    teacher: str,
    pairs_version: int | None = None,
    on_report: OnReport = lambda figures: None,
) -> dict[str, Any]:
    """Train the decoder and publish its folder at `out_url`, all or nothing.

    A run that was killed resumes, with the version of PAIRS that it began with; a published folder is left as
    it is.

    Args:
        settings: of the distillation.
        pairs_url: URL of PAIRS.
        out_url: folder to publish.
        teacher: source of the teacher, which PAIRS were made with.
        pairs_version: of PAIRS; None continues with the version that the run began with, else the newest.
        on_report: receives progress reports.

    Returns:
        The metrics, as in metrics.json.

    Raises:
        TrainingError: if `out_url` holds or has begun a decoder of other settings, no row is held out, or
            training cannot end.
        TableError: if PAIRS do not fit the teacher, or store no images where the settings need them.
        TrainingFailed: if workers keep failing.
    """
    began, folder = time.monotonic(), RunFolder(url=absolute_url(out_url), kind="decoder")
    # Workers have another working directory.
    teacher = absolute_source(teacher)
    bundle = load(teacher)
    version = folder.pinned_version("pairs") if pairs_version is None else pairs_version
    pairs = open_table(pairs_url, version=version, kind="pairs")
    identity = _identity(settings, pairs=pairs, bundle=bundle)
    if (finished := folder.finished(identity)) is not None:
        return finished
    counts = _count_rows(settings, pairs=pairs)
    folder.begin(identity)
    arguments = {
        "settings": settings,
        "teacher": teacher,
        "pairs_url": pairs.url,
        "pairs_version": pairs.version,
        "counts": counts,
        "identity": identity,
    }
    with read_lease(pairs.url, version=pairs.version, purpose=f"the training {folder.url}"):
        trained = run_trainings(
            assemble, arguments, store_url=folder.store_url, settings=settings.trainer, on_report=on_report
        )
    decoder = HalfDecoder(DecoderConfig.half_of(bundle.vae))
    decoder.load_state_dict(trained[_STUDENT].weights)
    return folder.publish(
        identity,
        fill=lambda path: {
            "files": decoder.save(str(path)),
            "settings": settings.to_values(),
            "parents": {
                "pairs": pairs.lineage(),
                "teacher": {"source": teacher, "weights": bundle.fingerprint()},
            },
            "rows": {"pairs": pairs.num_rows, "trained_on": sum(counts)},
            "seconds": round(time.monotonic() - began, 1),
            **_metrics(trained, bundle=bundle),
        },
    )


def assemble(
    *,
    settings: DecoderSettings,
    teacher: str,
    pairs_url: str,
    pairs_version: int,
    counts: Sequence[int],
    identity: Mapping[str, Any],
    device: torch.device,
) -> Iterator[Training]:
    """Assemble the trainings, in a worker: the student's, and one from random weights to compare it with."""
    bundle = load(teacher, device=str(device))
    images = stored_images if settings.target == "stored" else decoded_images(bundle.decode)
    loader = BatchLoader(
        open_table(pairs_url, version=pairs_version),
        columns=["latent", "image"] if settings.target == "stored" else ["latent"],
        global_batch=settings.loop.global_batch,
        seed=settings.loop.seed,
        settings=settings.loader,
        counts=counts,
    )
    inits = {_STUDENT: settings.init}
    if settings.compare_random_init:
        inits[_RANDOM] = "random"
    for name, init in inits.items():
        student = HalfDecoder.from_vae(bundle.vae, init=init, seed=settings.loop.seed)
        evaluate = partial(_evaluate, student, bundle=bundle, loader=loader, images=images, settings=settings)
        yield Training(
            name=name,
            model=student,
            objective=DecoderObjective(images),
            loader=loader,
            settings=settings.loop,
            identity={**identity, "init": init},
            evaluate=partial(evaluate, with_times=name == _STUDENT),
        )


def _evaluate(
    student: HalfDecoder,
    *,
    bundle: Bundle,
    loader: BatchLoader,
    images: TeacherImages,
    settings: DecoderSettings,
    with_times: bool,
) -> dict[str, Any]:
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


def _metrics(trained: Mapping[str, TrainingResult], *, bundle: Bundle) -> dict[str, Any]:
    student, random = trained[_STUDENT], trained.get(_RANDOM)
    full = sum(
        parameter.numel()
        for part in (bundle.vae.decoder, bundle.vae.post_quant_conv)
        if part is not None
        for parameter in part.parameters()
    )
    half = HalfDecoder.from_vae(bundle.vae).num_parameters
    return {
        "psnr_db": student.evaluation["psnr_db"],
        "held_out_rows": student.evaluation["rows"],
        "parameters": {"teacher": full, "student": half, "ratio": full / half},
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


def _identity(settings: DecoderSettings, *, pairs: Snapshot, bundle: Bundle) -> dict[str, Any]:
    """Everything that determines the decoder's weights, float sums apart.

    Raises:
        TableError: if PAIRS were made with another VAE.
    """
    model, other = bundle.describe(), pairs.identity["model"]
    for part, expected, found in (
        ("VAE", model["weights"]["vae"], other["weights"]["vae"]),
        ("scaling factor", model["scaling_factor"], other["scaling_factor"]),
    ):
        if expected != found:
            raise TableError(
                f"{pairs.url} was made with another {part} ({str(found)[:12]}) than the teacher's "
                f"({str(expected)[:12]}): name the teacher that generated it, or generate new PAIRS"
            )
    return {
        "settings": {name: value for name, value in settings.to_values().items() if name != "trainer"},
        "teacher": model["weights"]["vae"],
        "pairs": {"identity": digest(pairs.identity), "version": pairs.version},
    }


def _count_rows(settings: DecoderSettings, *, pairs: Snapshot) -> list[int]:
    """The training rows of each unit of PAIRS that have what the settings need."""
    if settings.target == "stored" and not pairs.identity["generation"]["images"]:
        raise TableError(f"{pairs.url} stores no images: set decoder.target=online, or generate new PAIRS")
    held_out = settings.loader.held_out
    counts = count_trainable(pairs, held_out=held_out)
    check_held_out(pairs, held_out=held_out, num_rows=pairs.num_rows - sum(counts))
    return counts


def summary(metrics: Mapping[str, Any]) -> list[str]:
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
