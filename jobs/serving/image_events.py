"""Generates the images of a request one after the other, and tells what happens."""

import base64
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jobs.evaluation.generators import Generator
from jobs.evaluation.image_files import GeneratedImage, png_of
from jobs.evaluation.images import caption_warnings
from jobs.serving.generation_queue import Emit, Event
from jobs.serving.image_request import ImageRequest
from jobs.serving.served_models import Served
from snapfusion.export.parity import psnr


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """One image of a request.

    Attributes:
        number: in the request, from 0.
        model: that generates it.
        generator: of the model, with the options of the request.
    """

    number: int
    model: Served
    generator: Generator

    @property
    def about(self) -> Event:
        """What all its events have."""
        return {"number": self.number, "model": self.model.loaded.source}


def generate_side_by_side(tasks: Sequence[ImageTask], request: ImageRequest, emit: Emit) -> None:
    """Generate all images from the same noise; emit each step, each image or failure, and the end.

    Each image is compared with the first one, if both have the same size.
    """
    first: tuple[int, np.ndarray] | None = None
    for task in tasks:
        try:
            image, facts = _generate(task, request, emit)
        # NaN and infinite values; what torch and ExecuTorch raise, as where memory is short.
        except (ArithmeticError, RuntimeError, MemoryError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            emit({"event": "failed", **task.about, "error": f"{task.model.loaded.source}: {reason}"})
            continue
        difference = None if first is None else _difference(image.pixels, first[1], number=first[0])
        first = first or (task.number, image.pixels)
        png = base64.b64encode(png_of(image)).decode()
        emit({"event": "image", **task.about, **facts, "difference": difference, "png": png})
    emit({"event": "done"})


def _generate(task: ImageTask, request: ImageRequest, emit: Emit) -> tuple[GeneratedImage, Event]:
    """The image and what is to be known of it."""
    generator, origin = task.generator, task.generator.origin

    def on_step(step: int) -> None:
        emit({"event": "step", **task.about, "step": step, "steps": origin.steps})

    began = time.perf_counter()
    (image,) = generator.images(request.caption, seed=request.seed, count=1, on_step=on_step)
    seconds = time.perf_counter() - began
    notes = [*([generator.note] if generator.note else [])]
    notes += caption_warnings(task.model.loaded.tokenizer, request.caption)
    return image, {
        "seconds": round(seconds, 4),
        "steps": origin.steps,
        "sampler": origin.sampler,
        "guidance": origin.guidance,
        "size": len(image.pixels),
        "flagged": image.flagged,
        "notes": notes,
        "parameters": image.parameters(),
    }


def _difference(pixels: np.ndarray, reference: np.ndarray, *, number: int) -> Event | None:
    """Largest difference of two images and their PSNR, None if they are equal; None for other sizes."""
    if pixels.shape != reference.shape:
        return None
    decibels = psnr(pixels, reference, peak=255.0)
    largest = int(np.abs(pixels.astype(np.int16) - reference).max())
    return {"to": number, "largest": largest, "psnr_db": None if math.isinf(decibels) else decibels}
