"""What the planner is asked: it changes no row and no weight, so it is no part of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from snapfusion.settings import Settings

Market = Literal["on_demand", "spot"]


class PlanSettings(Settings):
    """How a run is planned: `--set plan.KEY=VALUE`.

    Attributes:
        rows: of the source; null takes the recipe's scenes, or what the shards' sidecars count.
        kept: fraction of them that is usable.
        captions: that the teacher draws; null takes `captions.limit`, or those of LATENTS.
        steps: jobs to plan, in their order; null takes what `jobs.run_pipeline` would do or, where it makes
            no student, the recipe's plan of distillation with what that reads, PAIRS, decoder and evaluation.
        rates: shipped rates by name, or a file's path or URL; null takes the probe in OUT/rates.json,
            and makes it first if it is not there.
        prices: a shipped price list by name, or a file's path or URL.
        node: a node type of that list; null is this machine, free of charge.
        nodes: how many nodes; wall time and cost are told for each number, all else for the last.
        tables_on: the market of the nodes that make tables, whose lost units are made again.
        trainings_on: the market of the nodes that train.
        months: that tables are kept.
        moment_bytes: of the optimizer's moments, a parameter: 8 for AdamW, as built here. 2 plans with one
            of 8 bits, which is not built here.
    """

    rows: PositiveInt | None = None
    kept: float = Field(1.0, gt=0.0, le=1.0)
    captions: PositiveInt | None = None
    steps: tuple[str, ...] | None = None
    rates: str | None = None
    prices: str = "example"
    node: str | None = None
    nodes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    tables_on: Market = "spot"
    trainings_on: Market = "on_demand"
    months: float = Field(1.0, ge=0.0)
    moment_bytes: PositiveFloat = 8.0
