"""Times generation in bfloat16, eager and compiled, beside the fastest product of matrices."""

from pathlib import Path
from typing import Any

import torch

from jobs.gpu_check.settings import CheckSize
from jobs.planning.timings import median_seconds
from pipelines.stages.generate import GeneratePairs
from pipelines.stages.settings import Device, Generation
from snapfusion.models.network_sizes import network_sizes
from snapfusion.noise import noise_key

_GUIDANCE = 7.5
_SECONDS = 1.0
_CAPTION = "a picture of something"


def measure_generation(size: CheckSize, folder: Path) -> dict[str, Any]:
    """Images a second, and the operations of UNet and decoder in them as a share of the peak.

    The peak is that of a product of square matrices in the same dtype on the same device.
    """
    del folder
    settings = Generation(steps=size.steps, guidance=_GUIDANCE, batch_size=size.rows)
    device = Device(kind=size.device, dtype="bfloat16")
    stage, sizes = (
        GeneratePairs(model=size.model, settings=settings, device=device),
        network_sizes(size.model),
    )
    token_ids = stage.bundle.tokenize([_CAPTION] * size.rows)
    keys = [noise_key("gpu check", row) for row in range(size.rows)]
    macs = 1e9 * size.rows * (2 * size.steps * sizes.unet.gmacs + sizes.decoder_gmacs)
    peak = _peak(size)

    def measured() -> dict[str, Any]:
        seconds = median_seconds(lambda: stage.generate_batch(token_ids, keys), least=_SECONDS)
        return {
            "seconds_an_image": seconds / size.rows,
            "images_a_second": size.rows / seconds,
            "tflops": 2.0 * macs / seconds / 1e12,
            "share_of_peak": 2.0 * macs / seconds / peak,
        }

    eager, latents = measured(), stage.generate_batch(token_ids, keys)[0]
    result = {"steps": size.steps, "batch": size.rows, "peak_tflops": peak / 1e12, "eager": eager}
    stage.bundle.unet = torch.compile(stage.bundle.unet, dynamic=False)
    try:
        compiled = measured()
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return {**result, "compiled": {"skipped": f"torch.compile does not work here: {reason}"}}
    difference = (stage.generate_batch(token_ids, keys)[0].float() - latents.float()).abs().max()
    return {
        **result,
        "compiled": {**compiled, "largest_difference": float(difference)},
        "largest_latent": float(latents.float().abs().max()),
    }


def _peak(size: CheckSize) -> float:
    """Operations a second of a product of square bfloat16 matrices."""
    side, device = size.product_side, torch.device(size.device)
    matrix = torch.randn(side, side, device=device).bfloat16()

    def multiply() -> None:
        for _ in range(10):
            torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 10 * 2.0 * side**3 / median_seconds(multiply, least=_SECONDS)
