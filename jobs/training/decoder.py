"""Distillation of the half-width decoder under Ray Train. SnapFusion Sec. 3.2."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.training.progress_channel import OnReport
from jobs.training.run_folder import RunFolder
from jobs.training.settings import DecoderSettings
from jobs.training.spec import Training, TrainingError
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
    """Train the decoder and publish its folder at `out_url`, whole or not at all.

    A run that was killed goes on where it stood, with the version of PAIRS that it began with; a folder that
    is published is left as it is.

    Args:
        settings: how.
        pairs_url: of the table PAIRS.
        out_url: of the folder to make.
        teacher: a source that `snapfusion.models.load` accepts; PAIRS must have been made with it.
        pairs_version: of the table; None takes what the run began with, or else the newest.
        on_report: told of the training's progress.

    Returns:
        The metrics, as in metrics.json.

    Raises:
        TrainingError: if `out_url` holds, or has begun, a decoder of other settings; or training cannot end.
        TableError: if PAIRS do not fit the teacher.
        LoaderError: if the rows lack what the settings ask for.
        TrainingFailed: if workers keep failing.
    """
    began = time.monotonic()
    # Workers stand in another folder, where a relative path means another place.
    out_url, teacher = (
        absolute_url(out_url),
        str(Path(teacher).absolute()) if Path(teacher).is_dir() else teacher,
    )
    result, bundle = RunFolder(url=out_url, kind="decoder"), load(teacher)
    pinned = result.pinned_version("pairs") if pairs_version is None else pairs_version
    pairs = open_table(pairs_url, version=pinned, kind="pairs")
    identity = _identity(settings, pairs=pairs, bundle=bundle)
    finished = result.finished(identity)
    if finished is not None:
        return finished
    counts = _count_rows(settings, pairs=pairs)
    result.begin(identity)
    arguments = {
        "settings": settings,
        "teacher": teacher,
        "pairs_url": pairs.url,
        "pairs_version": pairs.version,
        "counts": counts,
        "identity": identity,
    }
    with read_lease(pairs.url, version=pairs.version, purpose=f"the training {result.url}"):
        trained = run_trainings(
            assemble, arguments, store_url=result.store_url, settings=settings.trainer, on_report=on_report
        )
    metrics = {
        **_metrics(trained, settings=settings, bundle=bundle),
        "identity": identity,
        "settings": settings.to_values(),
        "settings_hash": digest(identity),
        "parents": {
            "pairs": pairs.lineage(),
            "teacher": {"source": teacher, "weights": bundle.fingerprint()},
        },
        "rows": {"pairs": pairs.num_rows, "trained_on": sum(counts)},
        "seconds": round(time.monotonic() - began, 1),
    }
    decoder = HalfDecoder(DecoderConfig.half_of(bundle.vae))
    decoder.load_state_dict(trained[_STUDENT].weights)
    return result.publish(lambda folder: {**metrics, "files": decoder.save(str(folder))})


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
    """The trainings, in a worker: the student's, and that of the one to compare it with."""
    bundle = load(teacher, device=str(device))
    images = stored_images if settings.target == "stored" else decoded_images(bundle.decode)
    loader = BatchLoader(
        open_table(pairs_url, version=pairs_version),
        columns=_columns(settings),
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
    """Fidelity on the held-out rows and, `with_times`, the time of both decoders."""
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


def _metrics(
    trained: Mapping[str, TrainingResult], *, settings: DecoderSettings, bundle: Bundle
) -> dict[str, Any]:
    """How good the decoder is."""
    student, other = trained[_STUDENT], trained.get(_RANDOM)
    full = sum(
        parameter.numel()
        for part in (bundle.vae.decoder, bundle.vae.post_quant_conv)
        if part is not None
        for parameter in part.parameters()
    )
    half = HalfDecoder.from_vae(bundle.vae).num_parameters
    compared = other and {
        "psnr_db": other.evaluation["psnr_db"],
        "gain_db": student.evaluation["psnr_db"] - other.evaluation["psnr_db"],
        "curve": other.curve,
    }
    return {
        "kind": "decoder",
        "psnr_db": student.evaluation["psnr_db"],
        "held_out_rows": student.evaluation["rows"],
        "parameters": {"teacher": full, "student": half, "ratio": full / half},
        "times": student.evaluation["times"],
        "curve": student.curve,
        "random_init": compared,
        "environment": student.environment,
    }


def _identity(settings: DecoderSettings, *, pairs: Snapshot, bundle: Bundle) -> dict[str, Any]:
    """Everything that decides the decoder's weights, float sums apart.

    Raises:
        TableError: if PAIRS were made with another VAE.
    """
    model = bundle.describe()
    for part, mine, theirs in (
        ("VAE", model["weights"]["vae"], pairs.identity["model"]["weights"]["vae"]),
        ("scaling factor", model["scaling_factor"], pairs.identity["model"]["scaling_factor"]),
    ):
        if mine != theirs:
            raise TableError(
                f"{pairs.url} was made with another {part} ({str(theirs)[:12]}) than the teacher's "
                f"({str(mine)[:12]}); give the teacher that drew it, or draw new PAIRS"
            )
    chosen = {name: value for name, value in settings.to_values().items() if name != "trainer"}
    return {
        "settings": chosen,
        "teacher": model["weights"]["vae"],
        "pairs": {"identity": digest(pairs.identity), "version": pairs.version},
    }


def _count_rows(settings: DecoderSettings, *, pairs: Snapshot) -> list[int]:
    """The rows of each unit to train on; a row that lacks what is asked for is found before workers start."""
    counts = count_trainable(pairs, held_out=settings.loader.held_out)
    loader = BatchLoader(
        pairs,
        columns=_columns(settings),
        global_batch=settings.loop.global_batch,
        seed=settings.loop.seed,
        settings=settings.loader,
        counts=counts,
    )
    if next(loader.held_out(rows=1, limit=1), None) is None:
        raise TrainingError(
            f"of {pairs.num_rows} rows none is held out for evaluation; raise loader.held_out "
            f"(now {settings.loader.held_out}), or draw more PAIRS"
        )
    return counts


def _columns(settings: DecoderSettings) -> list[str]:
    return ["latent", "image"] if settings.target == "stored" else ["latent"]


def summary(metrics: Mapping[str, Any]) -> list[str]:
    """The figures that matter, in words."""
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
