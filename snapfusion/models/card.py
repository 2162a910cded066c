"""The model card of a saved model: README.md, with the header that hubs for models read."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from snapfusion.models.bundle import Bundle
from snapfusion.models.cost import count_parameters
from snapfusion.models.defaults import default_guidance, distilled_steps
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.models.snapfusion_unet_v1 import BlockUNet
from snapfusion.models.source import parse_source
from snapfusion.solver_names import CONSISTENCY

CARD = "README.md"
LICENCE, SAMPLER = "## Licence", "## Sampler"
"""Headings of a card."""

FIGURES_ELSEWHERE = "What was measured stands in the records of its run, not here."

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Identifiers that hubs have for licences; another one is "other" with its name.
_LICENCES = {
    "apache-2.0": "apache-2.0",
    "creativeml openrail-m": "creativeml-openrail-m",
    "creativeml openrail++-m": "openrail++",
    "mit": "mit",
}
_REMAINS = "A model that was distilled from another remains under that model's licence."
_ROLES = {"teacher": "Teacher", "student": "Initial weights", "model": "Initial weights"}
_OBJECTIVES = {
    "velocity": "trained to predict v (SnapFusion Eq. 6)",
    "steps": "step distillation (Eq. 7-11)",
    "lcm": "latent consistency distillation (Luo et al. 2023)",
    "pcm": "phased consistency distillation (Wang et al. 2024)",
    "dmd2": "distribution matching distillation (Yin et al. 2024)",
}


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """The published model that a run begins with, as its recipe states it.

    Attributes:
        model: its source; a path on this machine is absolute.
        licence: of its weights, which holds for models distilled from it; None if it is not stated.
    """

    model: str
    licence: str | None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a training made a model from.

    Attributes:
        objective: "velocity" or "steps".
        models: of each model by its role in the training, its source and the SHA-256 of its UNet's weights.
        table: digest of the settings that made the table, and its version.
        base: the model that the run begins with; None if it is not known.
    """

    objective: str
    models: Mapping[str, tuple[str, str]]
    table: tuple[str, int]
    base: PublishedModel | None = None


def model_card(bundle: Bundle, *, provenance: Provenance | None = None) -> str:
    """Write the card, in Markdown, of a model that is saved.

    It says only what is recorded: what is not known is left out, or called unknown.

    Args:
        bundle: the model.
        provenance: of a trained model.
    """
    base = provenance.base if provenance else None
    steps = f" in {distilled_steps(bundle)} steps" if bundle.distillation else ""
    parts = [
        _header(base),
        f"# Text to image{steps}",
        f"{bundle.image_size} x {bundle.image_size} pixels; the UNet has {count_parameters(bundle.unet):,} "
        "parameters. Made by the open implementation of SnapFusion (Li et al., 2023).",
        "## Use",
        _use(bundle),
        SAMPLER,
        sampler_text(bundle),
        "## Lineage",
        "\n".join(f"- {line}" for line in _lineage(bundle, provenance)),
        LICENCE,
        licence_text(base.licence) if base else f"Not stated. {_REMAINS}",
        "## Limits",
        "No safety checker is part of this folder: generated images are not checked. The model has the "
        f"biases of those that it was made from and, with fewer steps, less detail. {FIGURES_ELSEWHERE}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(base: PublishedModel | None) -> str:
    values: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if base and _is_hub_id(base.model):
        values["base_model"] = parse_source(base.model).path
    values |= licence_fields(base.licence if base else None)
    values["tags"] = ["stable-diffusion", "snapfusion"]
    return header_text(values)


def header_text(values: Mapping[str, Any]) -> str:
    """The header of a card with these fields."""
    # JSON values are YAML.
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])


def licence_fields(licence: str | None) -> dict[str, str]:
    """The fields of the header that name a licence; none if it is not stated."""
    # "Apache-2.0 (the miniature of this repository)": the remark is not part of the name.
    name = (licence or "").partition(" (")[0].strip()
    if not name:
        return {}
    known = _LICENCES.get(name.lower(), "other")
    return {"license": known, "license_name": name} if known == "other" else {"license": known}


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(parse_source(source).path))


def _use(bundle: Bundle) -> str:
    own = isinstance(bundle.unet, BlockUNet)
    trust = ", trust_remote_code=True" if own else ""
    lines = [
        "```python",
        "import torch",
        "from diffusers import StableDiffusionPipeline",
        "",
        f'pipeline = StableDiffusionPipeline.from_pretrained("FOLDER", torch_dtype=torch.float32{trust})',
        f'pipeline("CAPTION", num_inference_steps={distilled_steps(bundle)}, '
        f'guidance_scale={default_guidance(bundle):g}).images[0].save("image.png")',
        "```",
        "",
        f"Saved with diffusers {version('diffusers')} and transformers {version('transformers')}. Where "
        "SnapFusion on Ray is installed: `snapfusion generate CAPTION --model FOLDER`.",
    ]
    if own:
        lines.append(
            "No class of diffusers can hold the UNet: `trust_remote_code=True` executes its source, "
            f"`unet/{BlockUNet.__module__.rpartition('.')[2]}.py`."
        )
    return "\n".join(lines)


def _lineage(bundle: Bundle, provenance: Provenance | None) -> Iterator[str]:
    if provenance is None:
        yield "What it was trained on is not recorded here."
    else:
        if provenance.base:
            yield f"Begins with: {_name(provenance.base.model)}"
        yield f"Training: {_OBJECTIVES[provenance.objective]}"
        for role, (source, weights) in provenance.models.items():
            yield f"{_ROLES[role]}: {_name(source)}, UNet weights SHA-256 `{weights}`"
        identity, number = provenance.table
        yield f"Data: version {number} of the table whose settings have the SHA-256 `{identity}`"
    if record := bundle.distillation:
        yield from _distillation(record)
    for merged in bundle.merged:
        yield "Merged: " + ", ".join(f"{key} `{value}`" for key, value in merged.items())


def _distillation(record: Mapping[str, Any]) -> Iterator[str]:
    of = f" of {record['teacher_steps']} DDIM steps of the teacher" if "teacher_steps" in record else ""
    sampler = "DDIM" if record.get("sampler", "ddim") == "ddim" else record["sampler"]
    yield f"Distilled for {record['steps']} {sampler} steps{of}"
    if cfg_range := record.get("teacher_guidance", record.get("cfg_range")):
        yield f"Guidance in distillation: {cfg_range['low']:g} to {cfg_range['high']:g}"


def sampler_text(bundle: Bundle) -> str:
    """How a model is sampled: steps, timesteps, prediction type, guidance."""
    steps, record = distilled_steps(bundle), bundle.distillation or {}
    times = f", at t = {', '.join(map(str, record['timesteps']))}" if "timesteps" in record else ""
    kind = {"v_prediction": "v", "epsilon": "eps"}[bundle.prediction_type]
    stock = '`DDIMScheduler` with `timestep_spacing="trailing"` and `set_alpha_to_one=True`'
    if (sampler := record.get("sampler", "DDIM")) == CONSISTENCY:
        stock = "`LCMScheduler`, as in `scheduler/`, from noise of its own generator"
    lines = [
        f"{sampler} in {steps} steps{times}; the last one ends at the clean image. In diffusers this is "
        f"{stock}. The UNet predicts {kind}.",
        f"Guidance scale {default_guidance(bundle):g}",
    ]
    if cfg_range := record.get("cfg_range"):
        lines[-1] += f", within {cfg_range['low']:g} to {cfg_range['high']:g}, which it was distilled for"
    if has_guidance_embedding(bundle.unet):
        lines[-1] += "; it is an input of the UNet, which runs once a step"
    return f"{lines[0]} {lines[1]}."


def licence_text(licence: str | None) -> str:
    """What a card says about the licence of the weights."""
    if not (licence or "").strip():
        return (
            "That of the weights is not stated: write it here, and set `mobile.licence.weights` for what is "
            f"made next. {_REMAINS}"
        )
    return f"Weights: {licence}. {_REMAINS}"


def _name(source: str) -> str:
    """Name a model without the folders of the machine that it was read on."""
    path = parse_source(source).path
    if _is_hub_id(source) or "://" in path:
        return f"`{path}`"
    parts = PurePosixPath(path).parts
    # A run folder holds its model as model/.
    return f"`{'/'.join(parts[-2:] if parts[-1] == 'model' else parts[-1:])}`"
