"""Parity check: an artifact whose outputs differ from torch's is not published."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from snapfusion.export.settings import PSNR_LIMIT_DB


class ParityError(ValueError):
    """An artifact whose outputs are not the reference's; names the artifact, the PSNR and the limit."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Agreement of an artifact with torch over `samples` inputs.

    Attributes:
        artifact: that was compared, for example "decoder.pte".
        samples: number of inputs.
        peak: max |reference| over all samples.
        psnr_db: of the worst sample, in decibels relative to that peak; None if every bit agrees.
        mean_psnr_db: of the squared error over all samples; None if every bit agrees.
        max_abs_error: the largest difference of any value.
        limit_db: the minimum required of `psnr_db`.
        override: why an artifact below the limit is accepted; None for one above it.
    """

    artifact: str
    samples: int
    peak: float
    psnr_db: float | None
    mean_psnr_db: float | None
    max_abs_error: float
    limit_db: float
    override: str | None = None


def psnr(output: np.ndarray, reference: np.ndarray, *, peak: float) -> float:
    """20 log10(peak / RMS difference) in decibels; infinite for equal arrays. Computed in float64."""
    difference = output.astype(np.float64) - reference.astype(np.float64)
    mean_square = float(np.mean(difference**2))
    return math.inf if mean_square == 0.0 else 20.0 * math.log10(peak) - 10.0 * math.log10(mean_square)


def check_parity(
    *,
    artifact: str,
    outputs: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    limit_db: float = PSNR_LIMIT_DB,
    override: str | None = None,
) -> Parity:
    """Compare an artifact's outputs with torch's sample by sample; the worst sample decides.

    Args:
        artifact: its name, for the message and the manifest.
        outputs: of the artifact, one array per sample.
        references: of torch in float32, of the same shapes.
        limit_db: minimum PSNR, with peak = max |reference|.
        override: why an artifact below the limit is accepted; non-finite outputs never are.

    Raises:
        ParityError: for a PSNR below the limit, a shape that differs, or an output that is not finite.
        ValueError: if there is nothing to compare, or the reference itself is not finite or all zero.
    """
    peak = find_peak(references, artifact=artifact)
    _check_outputs(outputs, references=references, artifact=artifact)
    psnrs = [psnr(*pair, peak=peak) for pair in zip(outputs, references, strict=True)]
    worst = min(psnrs)
    if worst < limit_db and not override:
        raise ParityError(
            f"{artifact} does not agree with torch: PSNR {worst:.2f} dB on sample {psnrs.index(worst)} of "
            f"{len(psnrs)}, and {limit_db:g} dB is the limit (peak {peak:.4g}); it is not published"
        )
    all_outputs, all_references = np.stack(outputs), np.stack(references)
    return Parity(
        artifact=artifact,
        samples=len(psnrs),
        peak=peak,
        psnr_db=_finite(worst),
        mean_psnr_db=_finite(psnr(all_outputs, all_references, peak=peak)),
        max_abs_error=float(np.abs(all_outputs - all_references).max()),
        limit_db=limit_db,
        override=override if worst < limit_db else None,
    )


def find_peak(references: Sequence[np.ndarray], *, artifact: str) -> float:
    """The largest magnitude of torch's outputs.

    Raises:
        ValueError: if there are none, or they are not finite or all zero.
    """
    if not references:
        raise ValueError(f"{artifact}: no samples to compare; give at least one")
    peak = float(np.abs(np.stack(references)).max())
    if not math.isfinite(peak) or peak == 0.0:
        raise ValueError(f"{artifact}: torch's own output peaks at {peak}; its weights are not usable")
    return peak


def _check_outputs(outputs: Sequence[np.ndarray], *, references: Sequence[np.ndarray], artifact: str) -> None:
    shapes, expected = ([array.shape for array in arrays] for arrays in (outputs, references))
    if shapes != expected:
        raise ParityError(f"{artifact} gives shapes {shapes[:3]}, torch {expected[:3]}")
    for sample, output in enumerate(outputs):
        if num_bad := int((~np.isfinite(output)).sum()):
            raise ParityError(f"{artifact} gives {num_bad} values that are not finite on sample {sample}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
