"""Types of the records of trainings, whose keys are those of metrics.json."""

from typing import Any, NotRequired, TypedDict

METRICS = "metrics.json"
"""The record in a training's folder, which is written last."""

PROVENANCE = "made_of.json"
"""The record in a folder of initial weights, which is written last."""

Curve = list[dict[str, float]]
"""Points of a training, each with "step" and the losses at it."""


class TrainingMetrics(TypedDict):
    """The record of any training; `identity` determines the weights, `settings` also have where it ran.

    `weight_files` are the SHA-256 of the published files of weights, by path in the folder; version 0.1 did
    not record them.
    """

    kind: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    settings_hash: str
    parents: dict[str, dict[str, Any]]
    curve: Curve
    environment: dict[str, Any]
    seconds: float
    weight_files: NotRequired[dict[str, str]]


class StudentMetrics(TrainingMetrics):
    """The record of a UNet's training; `distillation` is null unless steps were distilled."""

    weights: dict[str, str]
    distillation: dict[str, Any]
    evaluation: dict[str, Any]
    watch: list[dict[str, Any]]
    best: dict[str, Any] | None


class DecoderMetrics(TrainingMetrics):
    """The record of the half-width decoder's distillation."""

    files: dict[str, Any]
    psnr_db: float
    held_out_rows: int
    parameters: dict[str, float]
    rows: dict[str, int]
    times: list[dict[str, float]]
    random_init: dict[str, Any] | None
