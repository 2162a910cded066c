"""Prints what `jobs.check` finds about a model: lines of at most 80 columns, or JSON."""

import json
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from snapfusion.models.describe import ModelDescription, describe_model

_COLUMNS, _LABEL = 80, 16


def check_model(source: str, *, as_json: bool = False) -> str:
    """The text about a model.

    Args:
        source: as of `snapfusion.models.load.load`.
        as_json: whether the text is one JSON object.

    Raises:
        ModelError: if the model cannot be used.
        ChecksumError: if it does not match its checksums.
    """
    model = describe_model(source)
    if as_json:
        return json.dumps({**asdict(model), "next": next_command(model)}, indent=1)
    lines = [source, *(line for label, text in _rows(model) for line in _wrapped(label, text))]
    return "\n".join([*lines, f"next: {next_command(model)}"])


def next_command(model: ModelDescription) -> str:
    """The command that usually follows: a distilled model is compiled, any other one begins a pipeline."""
    path = Path(model.source)
    source = str(path.absolute()) if path.exists() else model.source
    if model.distillation is not None:
        return f"snapfusion compile-mobile {shlex.quote(source)} --dry-run"
    recipe = "mini" if model.stored.form == "bundled model" else {1: "own", 2: "sd2"}[model.version]
    return f"snapfusion run-pipeline --recipe {recipe} --set {shlex.quote(f'model={source}')} --dry-run"


def _rows(model: ModelDescription) -> Iterator[tuple[str, str]]:
    """Label and text of each line."""
    stored, costs = model.stored, model.costs
    sizes = "" if model.published_sizes else ", not of the published sizes"
    yield "form", stored.form
    yield "kind", f"Stable Diffusion {model.version}{sizes}{_steps(model)}"
    yield "predicts", f"{model.prediction_type} (said by {stored.prediction_type_from})"
    yield from _schedule_rows(model)
    yield "images", f"{model.image_size} px, latents {' x '.join(map(str, model.latent_shape))}"
    for name, cls in model.networks.items():
        yield name.replace("_", " "), f"{_millions(costs.parameters[name])} parameters, {cls}"
    tokenizer = "its own" if stored.own_tokenizer else "CLIP's, supplied by this package"
    length = model.tokens_per_caption
    yield "tokenizer", f"{tokenizer}: {model.tokens:,} tokens, {length} of a caption are read"
    yield from _merged_rows(model)
    yield from _file_rows(model)
    yield (
        "costs",
        (f"{costs.gmacs:.4g} GMACs a step, twice that with guidance; {costs.decoder_gmacs:.4g} for decoding"),
    )
    yield (
        "memory",
        (
            f"{_bytes(costs.float16_bytes)} of weights in float16, and {_bytes(costs.activation_bytes)} of "
            "activations for an image"
        ),
    )
    for note in model.notes:
        yield "note", note


def _schedule_rows(model: ModelDescription) -> Iterator[tuple[str, str]]:
    steps, first, last = model.schedule
    name = f", {model.stored.scheduler}" if model.stored.scheduler else ""
    yield "schedule", f"{steps} timesteps, scaled linear from {first} to {last}{name}"
    if model.stored.unused_scheduler_fields:
        yield "without effect", ", ".join(model.stored.unused_scheduler_fields)


def _steps(model: ModelDescription) -> str:
    record = model.distillation
    return "" if record is None else f", distilled for {record['steps']} steps"


def _merged_rows(model: ModelDescription) -> Iterator[tuple[str, str]]:
    for embedding in (record for record in model.merged if "embedding" in record):
        yield (
            "embedding",
            (f"{embedding['embedding']}: token {embedding['token']}, {embedding['vectors']} vectors"),
        )
    for lora in (record for record in model.merged if "lora" in record):
        ranks = ", ".join(map(str, lora["ranks"]))
        alphas = ", ".join(f"{alpha:g}" for alpha in lora["alphas"]) or "not said, taken as the rank"
        yield (
            "LoRA",
            (
                f"{lora['lora']} at weight {lora['weight']:g}: {lora['modules']} modules, rank {ranks}, "
                f"alpha {alphas}"
            ),
        )


def _file_rows(model: ModelDescription) -> Iterator[tuple[str, str]]:
    stored = model.stored
    if stored.files:
        dtypes = sorted({dtype for file in stored.files for dtype in file.dtypes})
        names = ", ".join(file.name for file in stored.files[:6]) + (", ..." if stored.files[6:] else "")
        total = _bytes(sum(file.bytes for file in stored.files))
        yield "reads", f"{total} of {', '.join(dtypes)} in {names}; every value is finite"
        checksums = "verified" if stored.checksums else "none, so that alterations cannot be noticed"
        yield "checksums", checksums
    if stored.unread_bytes:
        yield "does not read", f"{_bytes(stored.unread_bytes)} of other weights"
    if stored.averaged_weights:
        yield "averaged", "it has averaged weights too; ?ema=true reads these"
    if stored.safety_checker:
        yield "safety checker", "there; `generate` uses it"


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        f"  {label:{_LABEL}}{text}",
        _COLUMNS,
        subsequent_indent=" " * (_LABEL + 2),
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
