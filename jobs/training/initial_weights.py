"""Initial weights of another architecture: each block takes those that it has in a given model.

OUT/model/         the model
OUT/made_of.json   hashes of the weights and the architecture that it was made of; written last
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from jobs.training.metrics import PROVENANCE
from jobs.training.run_folder import check_identity
from jobs.training.sources import TABLE_3
from pipelines.storage.folders import publish_folder
from pipelines.storage.objects import exists
from pipelines.storage.records import read_record
from snapfusion.models.architecture import Architecture, ArchitectureError, efficient_architecture
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.unet import architecture_of, build_unet, inherit_weights

OWN_ARCHITECTURE = "own"
"""Name of the architecture that a model has already."""


def with_architecture(model: str, architecture: Architecture, *, url: str) -> str:
    """Publish `model` with a UNet of `architecture` at `url`, unless it is published already; returns `url`.

    Args:
        model: source of the weights.
        architecture: of the UNet; its blocks are those of the model's, or copies of them.
        url: folder to publish.

    Raises:
        UNetError: if a block of `architecture` has no weights in the model; names it.
        TrainingError: if `url` holds a model made of other weights, or of another architecture.
        StorageError: if it cannot be written.
    """
    bundle = load(model)
    provenance = {"weights": bundle.fingerprint(), "architecture": architecture.to_values()}
    if exists(f"{url}/{PROVENANCE}"):
        check_identity(read_record(f"{url}/{PROVENANCE}"), provenance, url=url, kind="model")
        return url
    unet = build_unet(architecture)
    inherit_weights(unet, bundle.unet)
    bundle = dataclasses.replace(bundle, unet=unet, distillation=None)
    with tempfile.TemporaryDirectory() as scratch:
        save(bundle, Path(scratch) / "model", dtype=torch.float32)
        (Path(scratch) / PROVENANCE).write_text(json.dumps(provenance, indent=1, sort_keys=True) + "\n")
        publish_folder(Path(scratch), url, last=PROVENANCE)
    return url


def named_architecture(name: str, *, own: Architecture) -> Architecture:
    """An architecture by its name: "own", "table-3", or the URL of a file.

    Args:
        name: of the architecture.
        own: the model's own.

    Raises:
        ArchitectureError: if Table 3 does not apply to the model's own, or the file is missing or malformed.
    """
    if name == OWN_ARCHITECTURE:
        return own
    if name == TABLE_3:
        return efficient_architecture(own)
    try:
        return Architecture.parse(read_record(name))
    except ValueError as error:
        raise ArchitectureError(
            f"{name} is no architecture ({error}); accepted are {OWN_ARCHITECTURE}, {TABLE_3} and the URL of "
            "an architecture file"
        ) from None


def own_architecture(model: str) -> Architecture:
    """The architecture of a model's UNet."""
    return architecture_of(load(model).unet)
