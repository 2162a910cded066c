"""What an evolution did, as a page: its course, what blocks were worth, the architecture after each round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jobs.reports.charts import Chart, Series
from jobs.reports.page import render_page
from snapfusion.evolution.search import BlockScore
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import block_count_table


def render_evolution(
    history: Mapping[str, Any], *, captions: Sequence[str] = (), pictures: Mapping[str, Sequence[np.ndarray]]
) -> str:
    """The page as text.

    Args:
        history: what `jobs.evolution.search.Evolution.evolve` returns.
        captions: of the pictures.
        pictures: by each round's whole UNet, uint8 [H,W,3], one a caption; none are shown if it is empty.
    """
    return render_page(
        "evolution.html.j2",
        history=history,
        charts=evolution_charts(history),
        rounds=[_round_row(told) for told in history["rounds"]],
        architectures=architectures_by_round(history),
        table=block_count_table(*architectures_by_round(history).values()),
        captions=captions,
        pictures=pictures,
    )


def evolution_charts(history: Mapping[str, Any]) -> list[Chart]:
    """CLIP over what a pass takes, round by round; and the values of the first round's blocks."""
    scored = [told for told in history["rounds"] if told["clip"] is not None]
    return [
        Chart(
            title="CLIP over the time of a pass, round by round",
            x_label="ms of a guided step, by the table",
            y_label="CLIP",
            series=(
                Series(
                    name="evolution",
                    x=[told["decision"]["before_ms"] for told in scored],
                    y=[told["clip"][0] for told in scored],
                ),
            ),
        ),
        Chart(
            title="Time of a pass after each round",
            x_label="round",
            y_label="ms",
            series=(
                Series(
                    name="by the table",
                    x=[told["number"] for told in history["rounds"]],
                    y=[told["decision"]["after_ms"] for told in history["rounds"]],
                ),
            ),
            limit=history["objective_ms"],
            limit_name="at most",
        ),
    ]


def architectures_by_round(history: Mapping[str, Any]) -> dict[str, Architecture]:
    """The first architecture, and that after each round that changed it, by the round's name."""
    changed = {
        f"round {told['number']}": Architecture.parse(told["decision"]["architecture"])
        for told in history["rounds"]
        if told["decision"]["action"] != "stop"
    }
    return {"origin": Architecture.parse(history["origin"]), **changed}


def _round_row(told: Mapping[str, Any]) -> dict[str, Any]:
    chosen = set(told["decision"]["blocks"])
    return {**told, "scores": list(_scores(told, chosen=chosen))}


def _scores(told: Mapping[str, Any], *, chosen: set[str]) -> Iterator[dict[str, Any]]:
    """The scores in the order of their values, the least first."""
    scores = sorted((BlockScore.parse(score) for score in told["scores"]), key=lambda score: score.value)
    for score in scores:
        yield {
            "block": score.block,
            "delta_clip": score.delta_clip,
            "delta_ms": score.delta_ms,
            "value": score.value,
            "chosen": score.block in chosen,
        }
