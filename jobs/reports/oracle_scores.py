"""Scores of teacher images by the miniature's oracle, against the scenes that their captions describe."""

from dataclasses import dataclass

import numpy as np
from pydantic import TypeAdapter

from jobs.reports.input_states import table_state
from jobs.reports.part_cache import PartCache
from pipelines.tables.schemas import from_png
from pipelines.tables.table import Snapshot
from snapfusion.mini.captions import knows_caption, normalized


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


_Scores = tuple[OracleScores | None, dict[str, str]]
_FORM: TypeAdapter[_Scores] = TypeAdapter(_Scores)


def score_with_oracle(pairs: Snapshot, *, cache: PartCache) -> tuple[OracleScores | None, dict[str, str]]:
    """Scores of the images of PAIRS, and a line for each image by row id.

    The scores are None if no row has both an image and a caption of a scene.
    """
    return cache.part("oracle", _FORM, follows_from=table_state(pairs), compute=lambda: _score(pairs))


def _score(pairs: Snapshot) -> _Scores:
    # Imported here, because a report of kept parts does without torch.
    import torch

    from snapfusion.mini.oracle import load_oracle
    from snapfusion.mini.scenes import parse_caption

    oracle = load_oracle()
    shares: list[float] = []
    notes: dict[str, str] = {}
    for unit in pairs.units:
        # Unit by unit: all images of a table need not fit in memory.
        rows = pairs.read_unit(unit, ["id", "caption", "image"]).to_pylist()
        rows = [row for row in rows if row["image"] and knows_caption(row["caption"])]
        if rows:
            pixels = np.stack([from_png(row["image"]) for row in rows])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            scores = oracle.score(images, [parse_caption(normalized(row["caption"])) for row in rows])
            shares += scores.float().mean(dim=1).tolist()
            for row, correct in zip(rows, scores, strict=True):
                notes[row["id"]] = f"{int(correct.sum())} of {len(correct)} attributes correct"
    if not shares:
        return None, notes
    mean, perfect = float(np.mean(shares)), float(np.mean([share == 1.0 for share in shares]))
    return OracleScores(images=len(shares), mean_attributes_right=mean, all_attributes_right=perfect), notes
