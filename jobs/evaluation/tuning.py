"""Chooses on separate captions what is then compared: each contender's guidance, and one of each family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.evaluation.curve_tables import EvaluatedCaptions
from jobs.evaluation.settings import Contender
from snapfusion.metrics.curves import Curve, metrics_at


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the tuning captions decide.

    Attributes:
        contenders: that are compared: all without a family, and the best of each family.
        best_w: guidance at which each contender has its lowest FID.
        families: the contender of each family.
        curves: of all contenders, on the tuning captions.
        costs: UNet passes and seconds of an image of each contender at its best guidance.
    """

    contenders: tuple[Contender, ...]
    best_w: dict[str, float]
    families: dict[str, str]
    curves: dict[str, Curve]
    costs: dict[str, dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """As JSON values: metrics of every contender at its best guidance, and the families' choice."""
        best = {
            name: {"w": w, **self.costs[name], **metrics_at(self.curves[name], w)}
            for name, w in self.best_w.items()
        }
        return {"best": best, "families": self.families}


def choose(contenders: Sequence[Contender], evaluated: EvaluatedCaptions) -> Choice:
    """Choose by FID on these captions; of equal ones the first."""
    lowest = {name: _lowest(curve) for name, curve in evaluated.curves.items()}
    families: dict[str, str] = {}
    for contender in contenders:
        if contender.family is not None:
            best = families.setdefault(contender.family, contender.name)
            if lowest[contender.name][0] < lowest[best][0]:
                families[contender.family] = contender.name
    return Choice(
        contenders=tuple(one for one in contenders if one.family is None or families[one.family] == one.name),
        best_w={name: w for name, (_, w) in lowest.items()},
        families=families,
        curves=dict(evaluated.curves),
        costs={one.name: evaluated.cost_of(one, w=lowest[one.name][1]) for one in contenders},
    )


def _lowest(curve: Curve) -> tuple[float, float]:
    """The lowest FID, and its guidance."""
    return min((curve.fid(index, curve.groups), point.w) for index, point in enumerate(curve.points))
