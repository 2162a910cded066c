"""Exports a model as one file with LDM keys, and says how diffusers opens it."""

from collections.abc import Iterator
from pathlib import Path

import torch

from jobs.runtime.logs import logger
from pipelines.storage.objects import StorageError
from snapfusion.models.bundle import Bundle
from snapfusion.models.defaults import distilled_steps
from snapfusion.models.load import load
from snapfusion.models.local_folder import local_folder
from snapfusion.models.single_file_writer import SingleFile, check_new_file, write_single_file


def export_single_file(source: str, out: Path) -> None:
    """Write a model as the new file `out`, and print how to open it.

    Raises:
        ModelError: if a single file cannot hold the model, or `out` exists.
        StorageError: if `out` cannot be written.
    """
    check_new_file(out)
    bundle = load(source)
    try:
        written = write_single_file(bundle, out)
    except OSError as error:
        raise StorageError(f"--out {out} cannot be written: {error}") from error
    for line in _lines(bundle, written, source=source, out=out):
        logger.info(line)


def _lines(bundle: Bundle, written: SingleFile, *, source: str, out: Path) -> Iterator[str]:
    dtype = "float16, which changes no value" if written.dtype == torch.float16 else "float32"
    size = f"{written.bytes / 2**20:.1f} MiB"
    yield f"{out}: {written.tensors} tensors, {size} in {dtype}; diffusers' conversion reads them back equal"
    folder = local_folder(source)
    config = f', config="{folder or "FOLDER"}"'
    if written.published_sizes and folder is None:
        config = ""
    yield f'  StableDiffusionPipeline.from_single_file("{out}"{config})'
    kind = "v" if bundle.prediction_type == "v_prediction" else "eps"
    yield (
        f"  {distilled_steps(bundle)} steps of DDIM, trailing, for {kind}: the scheduler of that folder, or "
        f'DDIMScheduler(beta_schedule="scaled_linear", beta_start={bundle.schedule.beta_start}, '
        f"beta_end={bundle.schedule.beta_end}, "
        f'timestep_spacing="trailing", prediction_type="{bundle.prediction_type}", set_alpha_to_one=True, '
        "clip_sample=False)"
    )
