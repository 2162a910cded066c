"""A model with another architecture, at its first weights: each block keeps those it has in the model.

OUT/model/         the model
OUT/made_of.json   the weights and the architecture that it was made of; written last
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from jobs.training.run_folder import check_identity
from jobs.training.sources import TABLE_3
from pipelines.storage.folders import publish_folder
from pipelines.storage.objects import exists, read_bytes
from snapfusion.models.architecture import Architecture, ArchitectureError, efficient_architecture
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.unet import architecture_of, build_unet, inherit_weights
from snapfusion.settings import Settings

PROVENANCE = "made_of.json"
"""The file that says so."""


OWN_ARCHITECTURE = "own"
"""The name of the architecture that a model has."""


class _Provenance(Settings):
    """What a folder's model was made of, written last.

    Attributes:
        weights: SHA-256 of each network of the model that gave them.
        architecture: that the UNet was given.
    """

    weights: dict[str, str]
    architecture: Architecture


def with_architecture(model: str, architecture: Architecture, *, url: str) -> str:
    """Publish `model` with a UNet of `architecture` at `url`, unless it is there; returns `url`.

    Args:
        model: a source that `snapfusion.models.load` accepts.
        architecture: of the UNet; its blocks are those of the model's, or copies of them.
        url: of the folder to make.

    Raises:
        UNetError: if a block of `architecture` has no weights in the model; names it.
        TrainingError: if `url` holds a model made of other weights, or of another architecture.
        StorageError: if it cannot be written.
    """
    bundle = load(model)
    made = _Provenance(weights=bundle.fingerprint(), architecture=architecture).to_values()
    place = f"{url}/{PROVENANCE}"
    if exists(place):
        check_identity(json.loads(read_bytes(place)), made, url=url, kind="model")
        return url
    with tempfile.TemporaryDirectory() as scratch:
        save(_with_unet_of(bundle, architecture), Path(scratch) / "model", dtype=torch.float32)
        (Path(scratch) / PROVENANCE).write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
        publish_folder(Path(scratch), url, last=PROVENANCE)
    return url


def _with_unet_of(bundle: Bundle, architecture: Architecture) -> Bundle:
    unet = build_unet(architecture)
    inherit_weights(unet, bundle.unet)
    return dataclasses.replace(bundle, unet=unet, distillation=None)


def named_architecture(name: str, *, of: Architecture) -> Architecture:
    """The architecture of a name: "own", "table-3", or a file's URL.

    Args:
        name: which.
        of: the model's own.

    Raises:
        ArchitectureError: if Table 3 makes none of the model's own, or there is no such file, or it holds
            something else; says what.
    """
    if name == OWN_ARCHITECTURE:
        return of
    if name == TABLE_3:
        return efficient_architecture(of)
    try:
        return Architecture.parse(json.loads(read_bytes(name)))
    except ValueError as error:
        raise ArchitectureError(
            f"{name} is no architecture ({error}); {OWN_ARCHITECTURE}, {TABLE_3} and the URL of a file of one are accepted"
        ) from None


def own_architecture(model: str) -> Architecture:
    """The architecture of a model's UNet."""
    return architecture_of(load(model).unet)
