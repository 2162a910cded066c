"""The model card of a mobile bundle: contents, licences and limits."""

from collections.abc import Mapping
from typing import Any

from snapfusion.export.bundle import LICENCE, ONNX_RUNTIME, SAMPLER, TOKENIZER, VECTORS
from snapfusion.export.settings import Licence
from snapfusion.export.web_page import PAGE_FOLDER


def model_card(manifest: Mapping[str, Any], *, licence: Licence) -> str:
    """The card in Markdown of the bundle that `manifest` describes."""
    identity = manifest["identity"]
    size, steps = manifest["image_size"], identity["steps"]
    parts = [
        f"# {identity['parents']['model']['source']}, compiled for phones",
        f"Text to image, {size} x {size} pixels, in {steps} steps at guidance "
        f"{identity['settings']['guidance']:g}. Made by the open implementation of SnapFusion "
        "(Li et al., 2023) whose version is in `manifest.json`.",
        "## Contents",
        _table(manifest),
        "PSNR is that of the worst caption's image against torch in float32, peak = max |reference|. The "
        "manifest has the captions, and the figures of each module.",
        f"`{SAMPLER}` has the coefficients of the steps, `{TOKENIZER}/` the tokenizer, and `{VECTORS}/` test "
        "vectors for an application's own sampling loop." + _page(manifest),
        "## Licences",
        f"- Weights: {licence.weights}" + (f" (its text is in `{LICENCE}`)" if licence.text else ""),
        f"- Data: {licence.data}",
        "A model that was distilled from another remains under that model's licence. Licences of the RAIL "
        "family restrict the use of the model, and these restrictions must be passed on with it.",
        "## Limits",
        _safety(manifest),
        "The model has its teacher's biases and, with fewer steps, less detail. Agreement with torch was "
        "measured on the captions in `manifest.json` only.",
    ]
    if overridden := _overridden(manifest):
        parts += ["## Accepted below the limit", *overridden]
    return "\n\n".join(parts) + "\n"


def _table(manifest: Mapping[str, Any]) -> str:
    lines = ["| variant | weights | bytes | images, PSNR |", "|---|---|---|---|"]
    for name, variant in manifest["variants"].items():
        size = sum(module["bytes"] for module in variant["modules"].values())
        psnr_db = variant["images"]["psnr_db"]
        agreement = "equal" if psnr_db is None else f"{psnr_db:.1f} dB"
        lines.append(f"| `{name}` | {variant['weights']} | {size:,} | {agreement} |")
    return "\n".join(lines)


def _page(manifest: Mapping[str, Any]) -> str:
    if all(variant["runtime"] != ONNX_RUNTIME for variant in manifest["variants"].values()):
        return ""
    return (
        f" `{PAGE_FOLDER}/` is a page that draws in a browser: `snapfusion serve --bundle DIR`, or a static "
        "host."
    )


def _safety(manifest: Mapping[str, Any]) -> str:
    if name := manifest["safety_checker"]:
        return f"`{name}` takes the image and returns one number: an image above 0 must not be shown."
    return (
        "No safety checker is part of this bundle: generated images are not checked. An application that "
        "shows images to others needs one."
    )


def _overridden(manifest: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, variant in manifest["variants"].items():
        parities = {module: record["parity"] for module, record in variant["modules"].items()}
        for what, parity in {**parities, "images": variant["images"]}.items():
            if reason := parity["override"]:
                psnr = f"{parity['psnr_db']:.1f} dB, limit {parity['limit_db']:g} dB"
                lines.append(f"- `{name}`, {what}: {psnr}. Reason given: {reason}")
    return lines
