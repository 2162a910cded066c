"""Scores of teacher images by the miniature's oracle, against the scenes that their captions describe."""

from dataclasses import dataclass

import numpy as np
import torch

from pipelines.tables.schemas import from_png
from pipelines.tables.table import Snapshot
from snapfusion.mini.oracle import load_oracle
from snapfusion.mini.scenes import Scene, parse_caption


@dataclass(frozen=True, kw_only=True)
class OracleScores:
    """Scores over all images whose caption describes a scene.

    Attributes:
        images: their number.
        mean_attributes_right: share of attributes that the oracle finds, in [0, 1].
        all_attributes_right: share of images in which it finds every attribute, in [0, 1].
    """

    images: int
    mean_attributes_right: float
    all_attributes_right: float


def score_with_oracle(pairs: Snapshot) -> tuple[OracleScores | None, dict[str, str]]:
    """Scores of the images of PAIRS, and a line for each image by row id.

    The scores are None if no row has both an image and a caption of a scene.
    """
    oracle = load_oracle()
    shares: list[float] = []
    notes: dict[str, str] = {}
    for unit in pairs.units:
        # Unit by unit: all images of a table need not fit in memory.
        rows = pairs.read_unit(unit, ["id", "caption", "image"]).to_pylist()
        scenes = [(row, scene) for row in rows if row["image"] and (scene := _scene(row["caption"]))]
        if scenes:
            pixels = np.stack([from_png(row["image"]) for row, _ in scenes])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            scores = oracle.score(images, [scene for _, scene in scenes])
            shares += scores.float().mean(dim=1).tolist()
            for (row, _), correct in zip(scenes, scores, strict=True):
                notes[row["id"]] = f"{int(correct.sum())} of {len(correct)} attributes correct"
    if not shares:
        return None, notes
    mean, perfect = float(np.mean(shares)), float(np.mean([share == 1.0 for share in shares]))
    return OracleScores(images=len(shares), mean_attributes_right=mean, all_attributes_right=perfect), notes


def _scene(caption: str) -> Scene | None:
    try:
        return parse_caption(caption)
    except ValueError:
        return None
