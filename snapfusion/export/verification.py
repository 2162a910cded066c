"""Is a bundle what it says it is? Its files, numbers and tokenizer, and what its programs draw here.

Needs nothing of what the bundle was made from: the test vectors in it are what torch computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from snapfusion.export.bundle import MODULES, MobileBundle
from snapfusion.export.loop import CompiledModel, RunModule, generate
from snapfusion.export.parity import Parity, ParityError, check_parity
from snapfusion.export.reference import Sample, samples_of
from snapfusion.export.sampler_coefficients import SamplerCoefficients
from snapfusion.export.vectors import Vectors
from snapfusion.models.tokenizer import tokenize

_STEP_TOLERANCE = 1e-5
"""Of the largest value: where a replayed step's sums in float32 may end up."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check that was passed.

    Attributes:
        what: was checked.
        found: in words.
        milliseconds: a call of the module took, the median; None where nothing was run.
    """

    what: str
    found: str
    milliseconds: float | None = None


def check_sampler_and_tokenizer(bundle: MobileBundle) -> Iterator[CheckResult]:
    """The sampler's coefficients and the tokenizer, by the test vectors.

    Raises:
        ParityError: if a step lands elsewhere, or a caption has other ids.
        BundleError: if the numbers do not belong together.
    """
    vectors, steps = bundle.vectors, bundle.steps
    yield CheckResult(what="sampler.json", found=_replay(vectors, steps))
    tokenizer = bundle.tokenizer
    for caption, ids in vectors.token_ids.items():
        if tokenize(tokenizer, [caption])[0].tolist() != list(ids):
            raise ParityError(f"tokenizer gives other ids than the test vectors for {caption[:60]!r}")
    yield CheckResult(
        what="tokenizer", found=f"{len(vectors.token_ids)} captions have the ids they should have"
    )


def _replay(vectors: Vectors, steps: SamplerCoefficients) -> str:
    """Each step's arithmetic over the UNet's stored outputs."""
    if len(steps.steps) != vectors.steps:
        raise ParityError(f"sampler.json has {len(steps.steps)} steps, the test vectors {vectors.steps}")
    w, worst = np.float32(vectors.guidance), 0.0
    z_t = vectors.arrays["noise"]
    for number, step in enumerate(steps.steps):
        uncond, cond = np.split(vectors.arrays[f"output-{number}"], 2)
        output = w * cond - (w - np.float32(1.0)) * uncond
        wanted = vectors.arrays[f"z-{number}"]
        landed = np.float32(step.from_z) * z_t + np.float32(step.from_output) * output
        error = float(np.abs(landed - wanted).max() / np.abs(wanted).max())
        if not error <= _STEP_TOLERANCE:
            raise ParityError(
                f"sampler.json: step {number} (t = {step.t}) lands {error:.2g} of the largest value away "
                "from the test vectors"
            )
        worst, z_t = max(worst, error), wanted
    return f"{len(steps.steps)} steps land where they should, within {worst:.1g} of the largest value"


def check_variant(bundle: MobileBundle, variant: str, *, opened: CompiledModel) -> Iterator[CheckResult]:
    """What a variant's programs compute, by the test vectors; held to the limits that the manifest states.

    Raises:
        ParityError: if a module or the image is below its limit.
    """
    vectors, told = bundle.vectors, bundle.manifest["variants"][variant]
    drawn = vectors.reference([step.t for step in bundle.steps.steps])
    for module in MODULES:
        samples = samples_of([drawn], module=module, conditions=opened.conditions)
        outputs, took = _run_timed(getattr(opened, module), samples)
        parity = check_parity(
            artifact=f"{variant}/{module}",
            outputs=outputs,
            references=[output for _, output in samples],
            **_limits(told["modules"][module]["parity"]),
        )
        yield CheckResult(what=f"{variant}/{module}", found=_format_parity(parity), milliseconds=took)
    image = generate(opened, ids=drawn.ids, noise=drawn.noise, steps=bundle.steps, w=vectors.guidance)
    parity = check_parity(
        artifact=f"the image of {variant}",
        outputs=[image],
        references=[drawn.image],
        **_limits(told["images"]),
    )
    yield CheckResult(what=f"{variant}, the image", found=_format_parity(parity))


def _run_timed(run: RunModule, samples: Sequence[Sample]) -> tuple[list[np.ndarray], float]:
    """What a module gives for each sample, and the median time in ms."""
    outputs, seconds = [], []
    for inputs, _ in samples:
        began = time.perf_counter()
        outputs.append(run(inputs))
        seconds.append(time.perf_counter() - began)
    return outputs, float(np.median(seconds)) * 1e3


def _limits(stated: Mapping[str, Any]) -> dict[str, Any]:
    return {"limit_db": stated["limit_db"], "override": stated["override"]}


def _format_parity(parity: Parity) -> str:
    if parity.psnr_db is None:
        return "as torch, bit for bit"
    below = f", accepted below the limit: {parity.override}" if parity.override else ""
    return f"{parity.psnr_db:.1f} dB to torch (limit {parity.limit_db:g}){below}"
