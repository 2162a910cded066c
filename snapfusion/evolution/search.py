"""Architecture evolution: which blocks to remove, and which to copy. SnapFusion Alg. 1.

The value of a block is the CLIP score lost without it per millisecond that it takes. This module only
decides; scores are its input.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Literal

from pydantic import NonNegativeInt

from snapfusion.evolution.latency import LatencyTable
from snapfusion.evolution.settings import RoundLimits
from snapfusion.models.architecture import Architecture, BlockKind
from snapfusion.settings import Settings

Action = Literal["remove", "copy", "stop"]


class EvolutionError(ValueError):
    """A latency objective that cannot be met."""


class BlockScore(Settings):
    """The evaluation of a UNet without one block: A^- of Alg. 1.

    Attributes:
        block: its name.
        kind: of block.
        clip: mean CLIP score without the block.
        delta_clip: loss of CLIP score without the block, over the captions sampled both ways, with its 95 %
            interval. Null if the UNet without the block generates no valid image: then it must stay.
        delta_ms: latency saved without the block, by the table.
        captions: number of captions behind the score.
    """

    block: str
    kind: BlockKind
    clip: float | None
    delta_clip: tuple[float, float, float] | None
    delta_ms: float
    captions: NonNegativeInt

    @property
    def value(self) -> float:
        """Delta CLIP over Delta Latency, per millisecond; infinite if the block must stay or saves none."""
        if self.delta_clip is None or self.delta_ms <= 0.0:
            return float("inf")
        return self.delta_clip[0] / self.delta_ms


class Decision(Settings):
    """The decision of a round.

    Attributes:
        action: "remove" while the objective is unmet, "copy" when it is met and growth is left, else "stop".
        blocks: the removed or copied blocks, in the order of their values.
        before_ms: latency of a pass before, by the table.
        after_ms: latency of a pass of the new architecture.
        architecture: the new one.
    """

    action: Action
    blocks: tuple[str, ...]
    before_ms: float
    after_ms: float
    architecture: Architecture


def next_action(
    architecture: Architecture, *, table: LatencyTable, objective_ms: float, limits: RoundLimits, growths: int
) -> Action:
    """Choose the next action of Alg. 1: remove while S is unmet, then copy while growth is left.

    Args:
        architecture: the current one.
        table: T, which predicts the latency.
        objective_ms: S, milliseconds of a pass.
        limits: of a round.
        growths: number of rounds that have copied already.

    Raises:
        EvolutionError: if S cannot be reached by removing blocks.
        LatencyError: if the table lacks a part of the architecture.
    """
    check_objective(architecture, table=table, objective_ms=objective_ms)
    if table.predict_ms(architecture) > objective_ms:
        return "remove"
    return "copy" if growths < limits.growths else "stop"


def decide(
    action: Action,
    architecture: Architecture,
    scores: Sequence[BlockScore],
    *,
    table: LatencyTable,
    objective_ms: float,
    limits: RoundLimits,
) -> Decision:
    """Take one round of Alg. 1: remove the blocks of lowest value, or copy those of highest.

    Removal ends when a pass takes at most S, or at the limit of the round.

    Args:
        action: of this round (`next_action`).
        architecture: the current one.
        scores: of each of its blocks; unused by "stop".
        table: T, which predicts the latency.
        objective_ms: S, milliseconds of a pass.
        limits: of the round.

    Raises:
        EvolutionError: if no block can be removed.
        LatencyError: if the table lacks a part of the architecture.
    """
    chosen: list[str] = []
    after = architecture
    if action == "remove":
        removable = _ranked(scores)[: limits.removed]
        if not removable:
            raise EvolutionError(
                f"a pass takes {table.predict_ms(architecture):.4g} ms, more than {objective_ms:g}, and no "
                "block can be removed: without any of them no valid image is generated; train more robustly, "
                "or raise the objective"
            )
        for name in removable:
            if table.predict_ms(after) <= objective_ms:
                break
            after = after.without(name)
            chosen.append(name)
    elif action == "copy":
        ranked = _ranked(scores, reverse=True)
        chosen = [name for name in ranked if architecture.can_copy(name)][: limits.copied]
        for name in chosen:
            after = after.with_copy(name)
    return Decision(
        action=action if chosen else "stop",
        blocks=tuple(chosen),
        before_ms=table.predict_ms(architecture),
        after_ms=table.predict_ms(after),
        architecture=after,
    )


def check_objective(architecture: Architecture, *, table: LatencyTable, objective_ms: float) -> None:
    """Check that an architecture can become fast enough.

    Raises:
        EvolutionError: if it takes longer even without any block.
        LatencyError: if the table lacks a part of it.
    """
    fastest = min_latency_ms(architecture, table=table)
    if fastest > objective_ms:
        raise EvolutionError(
            f"no architecture takes {objective_ms:g} ms on {table.setup.device}: without any block a pass "
            f"takes {fastest:.4g} ms of {table.predict_ms(architecture):.4g} ms; raise the objective"
        )


def min_latency_ms(architecture: Architecture, *, table: LatencyTable) -> float:
    """Predict the milliseconds of a pass without any block.

    Raises:
        LatencyError: if the table lacks a part of the architecture.
    """
    for block in architecture.blocks:
        architecture = architecture.without(block.name)
    return table.predict_ms(architecture)


def _ranked(scores: Sequence[BlockScore], *, reverse: bool = False) -> list[str]:
    """The blocks by their value, lowest first, without those that must stay."""
    finite = [score for score in scores if score.value < float("inf")]
    return [score.block for score in sorted(finite, key=attrgetter("value"), reverse=reverse)]
