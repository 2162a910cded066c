"""Local folders of models, and what their configurations say; importable without torch."""

from pathlib import Path
from typing import Final, get_args

from snapfusion.models.bundled import BUNDLED
from snapfusion.models.source import parse_source
from snapfusion.prediction_types import PredictionType
from snapfusion.records import parse_record

INDEX_FILE = "model_index.json"
MODEL_FOLDER = "model"
"""The folder of the model in a run folder."""
SCHEDULER_CONFIG: Final = "scheduler/scheduler_config.json"
"""The file in a diffusers folder."""


def local_folder(path: str) -> Path | None:
    """Return the folder of a bundled model, a diffusers folder or that in a run folder; None for others.

    Args:
        path: as of `snapfusion.models.load.load`, without options.
    """
    if path in BUNDLED:
        return BUNDLED[path]
    folder = Path(path)
    if not folder.is_dir():
        return None
    nested = folder / MODEL_FOLDER
    return nested if (nested / INDEX_FILE).is_file() and not (folder / INDEX_FILE).is_file() else folder


def stated_prediction_type(source: str) -> PredictionType | None:
    """Read the prediction type that the scheduler of a local folder states.

    Args:
        source: as of `snapfusion.models.load.load`.

    Returns:
        None if it is no local folder, or if its scheduler cannot be read or states none.
    """
    try:
        folder = local_folder(parse_source(source).path)
        if folder is None:
            return None
        stated = parse_record((folder / SCHEDULER_CONFIG).read_bytes(), name=SCHEDULER_CONFIG).get(
            "prediction_type"
        )
    except (OSError, ValueError):
        return None
    return next((kind for kind in get_args(PredictionType) if kind == stated), None)
