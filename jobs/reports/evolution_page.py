"""Renders an evolution as a page: progress, value of each block, architecture after each round."""

from collections.abc import Mapping, Sequence

import numpy as np

from jobs.evolution.search import EvolutionHistory
from jobs.reports.charts import Chart, Series
from jobs.reports.page import render_page
from snapfusion.models.architecture import Architecture
from snapfusion.models.cost import block_count_table


def render_evolution(
    history: EvolutionHistory, *, captions: Sequence[str] = (), images: Mapping[str, Sequence[np.ndarray]]
) -> str:
    """The page as text.

    Args:
        history: of the evolution.
        captions: of the images.
        images: of each round's UNet, by round, uint8 [H,W,3], one per caption; empty shows none.
    """
    architectures = architectures_by_round(history)
    return render_page(
        "evolution.html.j2",
        history=history,
        charts=evolution_charts(history),
        rounds=[
            {**dict(record), "scores": sorted(record.scores, key=lambda score: score.value)}
            for record in history.rounds
        ],
        architectures=architectures,
        table=block_count_table(*architectures.values()),
        captions=captions,
        images=images,
    )


def evolution_charts(history: EvolutionHistory) -> list[Chart]:
    """CLIP over the latency of a pass, and that latency after each round."""
    scored = [(record.decision.before_ms, record.clip[0]) for record in history.rounds if record.clip]
    clip = Series(name="evolution", x=[ms for ms, _ in scored], y=[score for _, score in scored])
    latency = Series(
        name="by the table",
        x=[record.number for record in history.rounds],
        y=[record.decision.after_ms for record in history.rounds],
    )
    return [
        Chart(
            title="CLIP over latency, round by round",
            x_label="ms of a guided step, by the table",
            y_label="CLIP",
            series=(clip,),
        ),
        Chart(
            title="Latency after each round",
            x_label="round",
            y_label="ms",
            series=(latency,),
            limit=history.objective_ms,
            limit_name="objective",
        ),
    ]


def architectures_by_round(history: EvolutionHistory) -> dict[str, Architecture]:
    """The original architecture, and the one after each round that changed it, by name of the round."""
    changed = {
        f"round {record.number}": record.decision.architecture
        for record in history.rounds
        if record.decision.action != "stop"
    }
    return {"origin": history.origin, **changed}
