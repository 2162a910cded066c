"""Describing how a model is stored: its form, the files that are read, and what says its prediction type."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapfusion.models.bundled import BUNDLED
from snapfusion.models.checkpoint_file import CheckpointFile
from snapfusion.models.checksums import CHECKSUMS_FILE
from snapfusion.models.local_folder import MODEL_FOLDER, SCHEDULER_CONFIG
from snapfusion.models.locate import locate
from snapfusion.models.network_files import NETWORKS, PICKLE_SUFFIXES, read_json, weight_files
from snapfusion.models.scheduler_config import unused_fields
from snapfusion.models.single_file import has_averaged_weights, single_file_prediction_type
from snapfusion.models.source import ModelSource, parse_source
from snapfusion.models.tokenizer_files import has_vocabulary

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFETY_CHECKER: Final = "safety_checker"
"""The folder of a safety checker in a diffusers folder."""


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of weights that is read: its name in the model, its size, and the dtypes of its tensors."""

    name: str
    bytes: int
    dtypes: list[str]


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """How a model is stored.

    Attributes:
        form: such as "diffusers folder" or "single file".
        files: of weights that are read.
        unread_bytes: of other files of weights, and of averaged weights that are not read.
        averaged_weights: whether a single file has averaged weights beside the others.
        checksums: whether there are checksums; they have been verified then.
        prediction_type_from: what says the prediction type.
        scheduler: its class; None if the model has no scheduler configuration.
        unused_scheduler_fields: that have no effect, because they concern sampling.
        own_tokenizer: whether there is a tokenizer; CLIP's is used else.
        safety_checker: whether there is one.
    """

    form: str
    files: tuple[WeightFile, ...] = ()
    unread_bytes: int = 0
    averaged_weights: bool = False
    checksums: bool = False
    prediction_type_from: str
    scheduler: str | None = None
    unused_scheduler_fields: tuple[str, ...] = ()
    own_tokenizer: bool = False
    safety_checker: bool = False


def describe_stored(source: str) -> StoredModel:
    """Describe how a model is stored, from its configurations and the headers of its files.

    Args:
        source: as of `snapfusion.models.load.load`, of a model that loads.

    Raises:
        ModelError: if it cannot be read.
    """
    model = parse_source(source)
    path = locate(model.path, revision=model.revision, variant=model.variant)
    return (_stored_in_file if path.is_file() else _stored_in_folder)(path, model=model, source=source)


def has_safety_checker(folder: Path) -> bool:
    """Tell whether a diffusers folder has a safety checker; a single file has none."""
    return (folder / SAFETY_CHECKER / "config.json").is_file()


def _stored_in_file(path: Path, *, model: ModelSource, source: str) -> StoredModel:
    file = CheckpointFile(path, source=source)
    return StoredModel(
        form=f"single file{_where(model)}",
        files=(_weight_file(path, name=path.name, source=source),),
        averaged_weights=has_averaged_weights(file),
        prediction_type_from=single_file_prediction_type(path, model=model, source=source)[1],
    )


def _stored_in_folder(folder: Path, *, model: ModelSource, source: str) -> StoredModel:
    scheduler = read_json(folder / SCHEDULER_CONFIG, source=source)
    read = [
        path
        for name in NETWORKS
        for path in weight_files(folder / name, source=source, variant=model.variant)
    ]
    every = [
        path
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", *PICKLE_SUFFIXES) and path.parent.name != SAFETY_CHECKER
    ]
    stated = "prediction_type" in scheduler
    stated_by = SCHEDULER_CONFIG if stated else f"nothing; the default of {SCHEDULER_CONFIG}'s class"
    return StoredModel(
        form=_folder_form(folder, model=model),
        files=tuple(
            _weight_file(path, name=path.relative_to(folder).as_posix(), source=source) for path in read
        ),
        unread_bytes=sum(path.stat().st_size for path in every if path not in read),
        checksums=(folder / CHECKSUMS_FILE).is_file(),
        prediction_type_from=stated_by,
        scheduler=scheduler.get("_class_name"),
        unused_scheduler_fields=tuple(unused_fields(scheduler)),
        own_tokenizer=has_vocabulary(folder / "tokenizer"),
        safety_checker=has_safety_checker(folder),
    )


def _folder_form(folder: Path, *, model: ModelSource) -> str:
    if model.path in BUNDLED:
        return "bundled model"
    nested = folder.name == MODEL_FOLDER and folder == Path(model.path) / MODEL_FOLDER
    return f"{'run' if nested else 'diffusers'} folder{_where(model)}"


def _where(model: ModelSource) -> str:
    if "://" in model.path:
        return " from an object store"
    return "" if Path(model.path).exists() else " from a hub"


def _weight_file(path: Path, *, name: str, source: str) -> WeightFile:
    dtypes = [_DTYPES.get(dtype, dtype) for dtype in CheckpointFile(path, source=source).dtypes]
    return WeightFile(name=name, bytes=path.stat().st_size, dtypes=dtypes)
