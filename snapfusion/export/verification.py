"""Verifies a received bundle: its sampler, its tokenizer and the outputs of its programs on this machine.

Needs neither the model nor the settings that the bundle was made from: it contains test vectors by torch.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from snapfusion.export.bundle import MODULES, MobileBundle
from snapfusion.export.loop import CompiledModel, RunModule, generate, guided_output, next_latent
from snapfusion.export.parity import ParityError, check_parity
from snapfusion.export.reference import Sample, samples_of
from snapfusion.export.sampler_coefficients import SamplerCoefficients
from snapfusion.export.vectors import Vectors
from snapfusion.models.tokenizer import tokenize

_STEP_TOLERANCE = 1e-5
"""Of the largest value: rounding differences of a step computed in float32."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check that was passed.

    Attributes:
        what: was checked.
        found: the result in words.
        milliseconds: median time of a call of the module; None where nothing was run.
    """

    what: str
    found: str
    milliseconds: float | None = None


def check_sampler_and_tokenizer(bundle: MobileBundle) -> Iterator[CheckResult]:
    """Compare the sampler's coefficients and the tokenizer with the test vectors.

    Raises:
        ParityError: if a step or a caption's token ids differ.
        BundleError: if the sampler's coefficients are inconsistent.
    """
    vectors = bundle.vectors
    yield CheckResult(what="sampler.json", found=_check_steps(vectors, bundle.sampler))
    tokenizer = bundle.tokenizer
    for caption, ids in vectors.token_ids.items():
        if tokenize(tokenizer, [caption])[0].tolist() != list(ids):
            raise ParityError(f"tokenizer gives other ids than the test vectors for {caption[:60]!r}")
    yield CheckResult(what="tokenizer", found=f"{len(vectors.token_ids)} captions have the expected ids")


def _check_steps(vectors: Vectors, sampler: SamplerCoefficients) -> str:
    """Compute each step from the UNet's stored outputs."""
    num_steps = len(sampler.steps)
    if num_steps != vectors.num_steps:
        raise ParityError(f"sampler.json has {num_steps} steps, the test vectors {vectors.num_steps}")
    worst = 0.0
    stored_steps = vectors.reference([step.t for step in sampler.steps]).steps
    for index, (step, stored) in enumerate(zip(sampler.steps, stored_steps, strict=True)):
        if bool(step.from_noise) != (stored.fresh is not None):
            raise ParityError(
                f"sampler.json: step {index} (t = {step.t}) and the test vectors differ in noise"
            )
        output = guided_output(stored.outputs, w=vectors.guidance)
        # From the stored latent, so that rounding does not accumulate over the steps.
        z_next = next_latent(step, z_t=stored.z_t, output=output, fresh=stored.fresh)
        error = float(np.abs(z_next - stored.z_next).max() / np.abs(stored.z_next).max())
        # Negated, so that NaN is refused too.
        if not error <= _STEP_TOLERANCE:
            raise ParityError(
                f"sampler.json: step {index} (t = {step.t}) differs from the test vectors by {error:.2g} of "
                "the largest value"
            )
        worst = max(worst, error)
    return f"{num_steps} steps agree with the test vectors within {worst:.1g} of the largest value"


def check_variant(bundle: MobileBundle, variant: str, *, model: CompiledModel) -> Iterator[CheckResult]:
    """Compare a variant's programs with the test vectors, at the limits that the manifest states.

    Raises:
        ParityError: if a module or the image is below its limit.
    """
    vectors, sampler, entry = bundle.vectors, bundle.sampler, bundle.manifest["variants"][variant]
    reference = vectors.reference([step.t for step in sampler.steps])
    for module in MODULES:
        samples = samples_of([reference], module=module, conditions=model.conditions)
        outputs, median_ms = _run_timed(getattr(model, module), samples)
        expected, what = [output for _, output in samples], f"{variant}/{module}"
        found = _compare(what, outputs, expected, stated=entry["modules"][module]["parity"])
        yield CheckResult(what=what, found=found, milliseconds=median_ms)
    image = generate(
        model,
        ids=reference.ids,
        noise=reference.noise,
        sampler=sampler,
        w=vectors.guidance,
        fresh_noise=reference.fresh_noise,
    )
    found = _compare(f"the image of {variant}", [image], [reference.image], stated=entry["images"])
    yield CheckResult(what=f"{variant}, the image", found=found)


def _run_timed(run: RunModule, samples: Sequence[Sample]) -> tuple[list[np.ndarray], float]:
    """The module's output for each sample, and the median time in ms."""
    outputs, seconds = [], []
    for inputs, _ in samples:
        start = time.perf_counter()
        outputs.append(run(inputs))
        seconds.append(time.perf_counter() - start)
    return outputs, float(np.median(seconds)) * 1e3


def _compare(
    artifact: str, outputs: list[np.ndarray], references: list[np.ndarray], *, stated: Mapping[str, Any]
) -> str:
    """The parity in words, at the limit that the manifest states."""
    limits: dict[str, Any] = {"limit_db": stated["limit_db"], "override": stated["override"]}
    parity = check_parity(artifact=artifact, outputs=outputs, references=references, **limits)
    if parity.psnr_db is None:
        return "bit-identical to torch"
    below = f", accepted below the limit: {parity.override}" if parity.override else ""
    return f"{parity.psnr_db:.1f} dB to torch (limit {parity.limit_db:g}){below}"
