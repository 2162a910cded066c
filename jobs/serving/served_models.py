"""Models that requests may name: what each accepts, and a generator for the options of a request."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from jobs.evaluation.generators import Generator, LoadedModel, LoadedPrograms
from jobs.serving.image_request import ImageRequest, Limits, ModelOptions
from snapfusion.mini.captions import known_captions
from snapfusion.models.defaults import (
    default_guidance,
    distilled_solver,
    distilled_steps,
    has_folded_guidance,
)
from snapfusion.settings import SettingsError
from snapfusion.solver_names import SOLVERS


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model in torch.

    Attributes:
        loaded: the model.
        limits: of requests.
    """

    loaded: LoadedModel
    limits: Limits

    @property
    def max_size(self) -> int:
        """Largest side of its images, in pixels."""
        return self.limits.size or 2 * self.loaded.image_size

    def facts(self) -> dict[str, Any]:
        """What a request may choose for it, as JSON."""
        bundle = self.loaded.bundle
        folded = has_folded_guidance(bundle)
        return {
            "name": self.loaded.source,
            "runtime": "torch",
            "image_size": self.loaded.image_size,
            "granularity": bundle.granularity,
            "max_size": self.max_size,
            "steps": distilled_steps(bundle),
            "max_steps": self.limits.steps,
            "sampler": distilled_solver(bundle),
            "samplers": list(SOLVERS),
            "guidance": default_guidance(bundle),
            "guidance_range": None if folded else (bundle.distillation or {}).get("cfg_range"),
            "guidance_is_fixed": folded,
            "known_captions": known_captions(vocabulary_size=bundle.tokenizer.vocab_size),
        }

    def generator(self, options: ModelOptions, request: ImageRequest) -> Generator:
        """A generator for a request.

        Raises:
            SettingsError: if the model does not accept an option, or it is above a limit.
        """
        if options.steps is not None and options.steps > self.limits.steps:
            raise SettingsError(f"steps {options.steps}: 1 to {self.limits.steps} is accepted")
        if request.size is not None and request.size > self.max_size:
            raise SettingsError(f"size {request.size}: at most {self.max_size} is accepted")
        if has_folded_guidance(self.loaded.bundle) and options.guidance not in (None, 1.0):
            raise SettingsError(
                f"guidance {options.guidance:g}: its teacher's guidance is in the weights of this student, "
                "which was distilled to be used at 1; leave guidance out"
            )
        return self.loaded.generator(
            SimpleNamespace(
                steps=options.steps,
                sampler=options.sampler,
                guidance=options.guidance,
                size=request.size,
                negative=request.negative,
                image=None,
            )
        )


@dataclass(frozen=True, kw_only=True)
class ServedPrograms:
    """A variant of a mobile bundle, whose programs run on this machine."""

    loaded: LoadedPrograms

    def facts(self) -> dict[str, Any]:
        """As of `ServedModel.facts`."""
        loaded, manifest = self.loaded, self.loaded.bundle.manifest
        folded, sampler = loaded.folded_guidance, loaded.bundle.sampler
        return {
            "name": loaded.source,
            "runtime": f"{manifest['variants'][loaded.variant]['runtime']}, {loaded.variant}",
            "image_size": manifest["image_size"],
            "granularity": None,
            "max_size": None,
            "steps": len(sampler.steps),
            "max_steps": None,
            "sampler": sampler.solver,
            "samplers": [sampler.solver],
            "guidance": sampler.guidance if folded is None else folded,
            "guidance_range": None if folded else (manifest.get("distillation") or {}).get("cfg_range"),
            "guidance_is_fixed": folded is not None,
            "known_captions": manifest.get("known_captions"),
        }

    def generator(self, options: ModelOptions, request: ImageRequest) -> Generator:
        """As of `ServedModel.generator`."""
        for name, value in (("steps", options.steps), ("sampler", options.sampler), ("size", request.size)):
            if value is not None:
                raise SettingsError(f"{name} {value}: a bundle has its own, compiled into it; leave it out")
        return self.loaded.generator(SimpleNamespace(guidance=options.guidance, negative=request.negative))


Served = ServedModel | ServedPrograms
