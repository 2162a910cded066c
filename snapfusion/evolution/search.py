"""Architecture evolving: which blocks go, and which are copied. SnapFusion Alg. 1.

A block is worth what the CLIP score loses without it for each millisecond that it takes. Scores are handed
in; this file only decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import NonNegativeInt

from snapfusion.evolution.latency import LatencyTable
from snapfusion.evolution.settings import RoundLimits
from snapfusion.models.architecture import Architecture, BlockKind
from snapfusion.settings import Settings

Action = Literal["remove", "copy", "stop"]


class EvolutionError(ValueError):
    """An objective that cannot be met, or scores that say nothing; the message says what can be done."""


class BlockScore(Settings):
    """What a block is worth: Alg. 1's A^- of it, evaluated.

    Attributes:
        block: its name.
        kind: of block.
        clip: mean CLIP score of what is drawn without it.
        delta_clip: what the score loses by that, over the captions that were drawn both ways; with its 95 %
            interval. Null where the UNet without it draws nothing that is a picture: then it stays.
        delta_ms: what a pass takes less without it, by the table.
        captions: behind the score.
    """

    block: str
    kind: BlockKind
    clip: float | None
    delta_clip: tuple[float, float, float] | None
    delta_ms: float
    captions: NonNegativeInt

    @property
    def value(self) -> float:
        """Delta CLIP over Delta Latency, per millisecond; infinite where a block cannot go or saves none."""
        if self.delta_clip is None or self.delta_ms <= 0.0:
            return float("inf")
        return self.delta_clip[0] / self.delta_ms


class Decision(Settings):
    """What a round decided.

    Attributes:
        action: "remove" while the objective is unmet, "copy" when it is met and growth is left, else "stop".
        blocks: that go, or are copied, in the order of their values.
        before_ms: of a pass, by the table.
        after_ms: likewise, of the new architecture.
        architecture: the new one.
    """

    action: Action
    blocks: tuple[str, ...]
    before_ms: float
    after_ms: float
    architecture: Architecture


def next_action(
    architecture: Architecture, *, table: LatencyTable, objective_ms: float, pace: RoundLimits, growths: int
) -> Action:
    """What Alg. 1 does next: S unmet, it removes; met, it copies while growth is left.

    Args:
        architecture: as it is.
        table: T, by which time is told.
        objective_ms: S, milliseconds of a pass.
        pace: how far a round goes.
        growths: rounds that have copied already.

    Raises:
        EvolutionError: if S cannot be reached by removing blocks.
        LatencyError: if the table does not hold the architecture's parts.
    """
    check_objective(architecture, table=table, objective_ms=objective_ms)
    if table.predict_ms(architecture) > objective_ms:
        return "remove"
    return "copy" if growths < pace.growths else "stop"


def decide(
    action: Action,
    architecture: Architecture,
    scores: Sequence[BlockScore],
    *,
    table: LatencyTable,
    objective_ms: float,
    pace: RoundLimits,
) -> Decision:
    """One round of Alg. 1: the blocks of the lowest value go, or those of the highest are copied.

    They go until a pass takes no more than S, or the group is full.

    Args:
        action: of this round (`next_action`).
        architecture: as it is.
        scores: of each of its blocks; "stop" needs none.
        table: T, by which time is told.
        objective_ms: S, milliseconds of a pass.
        pace: how far.

    Raises:
        EvolutionError: if every block that is left must stay.
        LatencyError: if the table does not hold the architecture's parts.
    """
    chosen: list[str] = []
    after = architecture
    if action == "remove":
        chosen, after = _remove_blocks(
            architecture, scores, table=table, objective_ms=objective_ms, pace=pace
        )
    elif action == "copy":
        chosen, after = _copy_blocks(architecture, scores, pace=pace)
    return Decision(
        action=action if chosen else "stop",
        blocks=tuple(chosen),
        before_ms=table.predict_ms(architecture),
        after_ms=table.predict_ms(after),
        architecture=after,
    )


def check_objective(architecture: Architecture, *, table: LatencyTable, objective_ms: float) -> None:
    """Whether an architecture can become fast enough.

    Raises:
        EvolutionError: if it takes longer without any block; says what it then takes.
        LatencyError: if the table does not hold its parts.
    """
    least = min_latency_ms(architecture, table=table)
    if least > objective_ms:
        raise EvolutionError(
            f"no architecture takes {objective_ms:g} ms on {table.setting.device}: without any block a pass "
            f"takes {least:.4g} ms of {table.predict_ms(architecture):.4g} ms; ask for more than that"
        )


def min_latency_ms(architecture: Architecture, *, table: LatencyTable) -> float:
    """Milliseconds of a pass without any block.

    Raises:
        LatencyError: if the table does not hold its parts.
    """
    for block in architecture.blocks:
        architecture = architecture.without(block.name)
    return table.predict_ms(architecture)


def _remove_blocks(
    architecture: Architecture,
    scores: Sequence[BlockScore],
    *,
    table: LatencyTable,
    objective_ms: float,
    pace: RoundLimits,
) -> tuple[list[str], Architecture]:
    worst = sorted((score for score in scores if score.value < float("inf")), key=lambda score: score.value)
    if not worst:
        raise EvolutionError(
            f"a pass takes {table.predict_ms(architecture):.4g} ms, more than {objective_ms:g}, and no block "
            "can go: without any of them nothing is drawn; train more robustly, or ask for less speed"
        )
    chosen: list[str] = []
    for score in worst[: pace.removed]:
        if table.predict_ms(architecture) <= objective_ms:
            break
        architecture = architecture.without(score.block)
        chosen.append(score.block)
    return chosen, architecture


def _copy_blocks(
    architecture: Architecture, scores: Sequence[BlockScore], *, pace: RoundLimits
) -> tuple[list[str], Architecture]:
    able = [score for score in scores if score.delta_clip is not None and score.delta_ms > 0.0]
    best = sorted(
        (score for score in able if architecture.can_copy(score.block)),
        key=lambda score: score.value,
        reverse=True,
    )
    chosen = [score.block for score in best[: pace.copied]]
    for name in chosen:
        architecture = architecture.with_copy(name)
    return chosen, architecture
