"""The model card of a mobile bundle: what it is, what it draws by, and who may use it how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snapfusion.export.bundle import LICENCE, SAMPLER, TOKENIZER, VECTORS
from snapfusion.export.settings import Licence


def model_card(manifest: Mapping[str, Any], *, licence: Licence) -> str:
    """The card of the bundle that `manifest` describes, in Markdown."""
    identity = manifest["identity"]
    size, steps = manifest["image_size"], identity["steps"]
    parts = [
        f"# {identity['parents']['model']['source']}, compiled for phones",
        f"Text to image, {size} x {size} pixels, in {steps} steps at guidance "
        f"{identity['settings']['guidance']:g}. Made by the open implementation of SnapFusion "
        "(Li et al., 2023) that `manifest.json` names with its version.",
        "## What is here",
        _table(manifest),
        "PSNR is of the worst caption's image to torch's in float32, peak = max |reference|. The manifest "
        "has the captions, and the figures of each module and how they were found.",
        f"`{SAMPLER}` has the steps as numbers, `{TOKENIZER}/` the tokenizer, `{VECTORS}/` what an "
        "application can hold its own loop to.",
        "## Licences",
        f"- Weights: {licence.weights}" + (f" (its text is in `{LICENCE}`)" if licence.text else ""),
        f"- Data: {licence.data}",
        "What was distilled from a model remains under that model's licence. One of the RAIL family "
        "restricts what the model may be used for, and these restrictions must be handed on with it.",
        "## Limits",
        _safety(manifest),
        "It draws what its teacher draws, with the teacher's biases, and in fewer steps with less detail. "
        "Agreement with torch was measured on the captions in `manifest.json` and no others.",
    ]
    if overridden := _overridden(manifest):
        parts += ["## Accepted below the limit", *overridden]
    return "\n\n".join(parts) + "\n"


def _table(manifest: Mapping[str, Any]) -> str:
    lines = ["| variant | weights | bytes | images, PSNR |", "|---|---|---|---|"]
    for name, told in manifest["variants"].items():
        size = sum(module["bytes"] for module in told["modules"].values())
        lines.append(f"| `{name}` | {told['weights']} | {size:,} | {_decibels(told['images'])} |")
    return "\n".join(lines)


def _decibels(parity: Mapping[str, Any]) -> str:
    return "equal" if parity["psnr_db"] is None else f"{parity['psnr_db']:.1f} dB"


def _safety(manifest: Mapping[str, Any]) -> str:
    if name := manifest["safety_checker"]:
        return f"`{name}` takes the image and gives one number: above 0 it is not to be shown."
    return (
        "No safety checker is part of this bundle: nothing looks at what was drawn. An application that "
        "shows pictures to others needs one."
    )


def _overridden(manifest: Mapping[str, Any]) -> list[str]:
    return [
        f"- `{name}`, {what}: {parity['psnr_db']:.1f} dB, limit {parity['limit_db']:g} dB. Reason given: "
        f"{parity['override']}"
        for name, told in manifest["variants"].items()
        for what, parity in (
            *((module, each["parity"]) for module, each in told["modules"].items()),
            ("images", told["images"]),
        )
        if parity["override"]
    ]
