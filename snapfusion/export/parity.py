"""The gate: an artifact that does not agree with torch is not published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from snapfusion.export.settings import PSNR_LIMIT_DB


class ParityError(ValueError):
    """An artifact whose outputs are not the reference's; the message names it, the figure and the limit."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How well an artifact agrees with torch, over `samples` inputs.

    Attributes:
        artifact: what was compared, for example "decoder.pte".
        samples: how many inputs.
        peak: max |reference| over all samples.
        psnr_db: of the worst sample, in decibels to that peak; None if every bit agrees.
        mean_psnr_db: of the squared error over all samples; None if every bit agrees.
        max_abs_error: the largest difference of any value.
        limit_db: what `psnr_db` was held to.
        override: why it is accepted although it is below; None where it is not.
    """

    artifact: str
    samples: int
    peak: float
    psnr_db: float | None
    mean_psnr_db: float | None
    max_abs_error: float
    limit_db: float
    override: str | None = None

    def to_values(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest."""
        return asdict(self)


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
    """Hold an artifact's outputs to torch's, sample by sample; the worst decides.

    Args:
        artifact: its name, for the message and the manifest.
        outputs: one array a sample, from the artifact.
        references: as many, of the same shapes, from torch in float32.
        limit_db: the lowest PSNR that is accepted, with peak = max |reference|.
        override: why an artifact below the limit is to be accepted all the same; what is not finite never is.

    Raises:
        ParityError: for a PSNR below the limit, a shape that differs, or an output that is not finite.
        ValueError: if there is nothing to compare, or the reference itself is not finite or all zero.
    """
    peak = _peak(references, artifact=artifact)
    _check_outputs(outputs, references=references, artifact=artifact)
    figures = [psnr(*pair, peak=peak) for pair in zip(outputs, references, strict=True)]
    worst = min(figures)
    if worst < limit_db and not override:
        raise ParityError(
            f"{artifact} does not agree with torch: PSNR {worst:.2f} dB on sample {figures.index(worst)} of "
            f"{len(figures)}, and {limit_db:g} dB is the limit (peak {peak:.4g}); it is not published"
        )
    differences = [
        np.abs(output - reference).max() for output, reference in zip(outputs, references, strict=True)
    ]
    return Parity(
        artifact=artifact,
        samples=len(figures),
        peak=peak,
        psnr_db=_finite(worst),
        mean_psnr_db=_finite(psnr(np.stack(outputs), np.stack(references), peak=peak)),
        max_abs_error=float(max(differences)),
        limit_db=limit_db,
        override=override if worst < limit_db else None,
    )


def _peak(references: Sequence[np.ndarray], *, artifact: str) -> float:
    if not references:
        raise ValueError(f"{artifact}: no samples to compare on; give at least one")
    peak = float(np.abs(np.stack(references)).max())
    if not math.isfinite(peak) or peak == 0.0:
        raise ValueError(f"{artifact}: torch's own output peaks at {peak}; its weights are not usable")
    return peak


def _check_outputs(outputs: Sequence[np.ndarray], *, references: Sequence[np.ndarray], artifact: str) -> None:
    given = [output.shape for output in outputs]
    if given != [reference.shape for reference in references]:
        raise ParityError(f"{artifact} gives shapes {given[:3]}, torch {[r.shape for r in references[:3]]}")
    for sample, output in enumerate(outputs):
        if not np.isfinite(output).all():
            bad = int((~np.isfinite(output)).sum())
            raise ParityError(
                f"{artifact} gives {bad} values that are not finite on sample {sample}; it is not published"
            )


def _finite(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
