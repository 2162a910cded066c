"""Parsing the source of a model: a name, path, URL or hub id, and options after a question mark."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import parse_qsl, quote, urlencode

from snapfusion.models.errors import ModelError
from snapfusion.prediction_types import PREDICTION_TYPES, PredictionType

_NAMES = ("variant", "revision", "prediction_type", "ema", "size", "lora", "embedding")
_REPEATABLE = ("lora", "embedding")
_FILE_OF_TOKEN = ".safetensors:"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file and the weight at which it is merged."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A file of a textual inversion and the token it is for; None for the token that the file names."""

    path: str
    token: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model and how to read it.

    Attributes:
        path: a bundled or random model's name, a folder, a file, a URL or a hub id.
        variant: of the weights in a diffusers folder, such as "fp16" or "non_ema".
        revision: branch, tag or commit on a hub.
        prediction_type: "epsilon" or "v_prediction", of a single file that does not say it.
        ema: of a single file that has both: whether to read the averaged weights.
        size: side of the images in pixels, of a single file of another size than its kind's.
        loras: merged into the weights in this order.
        embeddings: textual inversions, added to the text encoder in this order.
    """

    path: str
    variant: str | None = None
    revision: str | None = None
    prediction_type: PredictionType | None = None
    ema: bool = False
    size: int | None = None
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()


def parse_source(source: str) -> ModelSource:
    """Parse a source such as "base.safetensors?lora=style.safetensors:0.8&ema=true".

    A question mark that no known option follows belongs to the path.

    Raises:
        ModelError: if an option is unknown, repeated or has an invalid value.
    """
    path, mark, query = source.partition("?")
    # A "+" is a letter here, not a space: file names contain it.
    pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True) if mark else []
    if not any(name in _NAMES for name, _ in pairs):
        return ModelSource(path=source)
    options: dict[str, list[str]] = {}
    for name, value in pairs:
        if name not in _NAMES:
            raise ModelError(f"{source}: there is no option {name!r}; {', '.join(_NAMES)} are accepted")
        if not value or (name in options and name not in _REPEATABLE):
            raise ModelError(f"{source}: option {name} {'is repeated' if value else 'is empty'}")
        options.setdefault(name, []).append(value)
    choices = {"prediction_type": PREDICTION_TYPES, "ema": ("true", "false")}
    for name, accepted in choices.items():
        if _one(options, name) not in (None, *accepted):
            raise ModelError(
                f"{source}: {name} is {_one(options, name)!r}; {' or '.join(accepted)} is accepted"
            )
    size = _one(options, "size")
    if size is not None and not (size.isdecimal() and int(size)):
        raise ModelError(f"{source}: size is {size!r}; a number of pixels is accepted")
    return ModelSource(
        path=path,
        variant=_one(options, "variant"),
        revision=_one(options, "revision"),
        prediction_type=cast("PredictionType | None", _one(options, "prediction_type")),
        ema=_one(options, "ema") == "true",
        size=int(size) if size else None,
        loras=tuple(_lora(value) for value in options.get("lora", ())),
        embeddings=tuple(_embedding(value) for value in options.get("embedding", ())),
    )


def source_paths(source: str) -> tuple[str, ...]:
    """The paths of a model, its LoRAs and textual inversions; the text itself if it is no valid source."""
    try:
        model = parse_source(source)
    except ModelError:
        return (source,)
    loras, embeddings = (file.path for file in model.loras), (file.path for file in model.embeddings)
    return model.path, *loras, *embeddings


def absolute_source(source: str) -> str:
    """Make the paths in a source that exist here absolute: workers have another working directory."""
    model = parse_source(source)
    if model.path == source:
        return _absolute(source)
    pairs = parse_qsl(source.partition("?")[2].replace("+", "%2B"))
    options = [(name, _absolute_option(value, name=name)) for name, value in pairs]
    return f"{_absolute(model.path)}?{urlencode(options, safe='/:', quote_via=quote)}"


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if "://" not in path and Path(path).exists() else path


def _absolute_option(value: str, *, name: str) -> str:
    if name not in _REPEATABLE:
        return value
    path = (_lora(value) if name == "lora" else _embedding(value)).path
    return _absolute(path) + value.removeprefix(path)


def _one(options: dict[str, list[str]], name: str) -> str | None:
    return options[name][0] if name in options else None


def _lora(value: str) -> Lora:
    """Parse PATH or PATH:WEIGHT; a colon that no number follows belongs to the path."""
    path, _, weight = value.rpartition(":")
    try:
        return Lora(path=path, weight=float(weight)) if path else Lora(path=value)
    except ValueError:
        return Lora(path=value)


def _embedding(value: str) -> Embedding:
    """Parse FILE or FILE:TOKEN; the token follows the colon after ".safetensors"."""
    path, mark, token = value.rpartition(_FILE_OF_TOKEN)
    return Embedding(path=path + _FILE_OF_TOKEN[:-1], token=token) if mark else Embedding(path=value)
