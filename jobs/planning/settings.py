"""Settings of the planner, which are no part of a recipe: they change no row and no weight."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from snapfusion.settings import Settings

Market = Literal["on_demand", "spot"]


class PlanSettings(Settings):
    """Settings of the planner: `--set plan.KEY=VALUE`.

    Attributes:
        rows: of the source; null takes the recipe's scenes, or the counts in the shards' sidecars.
        kept: fraction of them that is usable.
        captions: from which the teacher generates; null takes `captions.limit`, or those of LATENTS.
        steps: jobs to plan, in order; null takes those of `jobs.run_pipeline` or, if the recipe makes no
            student there, the recipe's schedule with what it reads, PAIRS, decoder and evaluation.
        rates: built-in rates by name, or a file's path or URL; null takes the probe in OUT/rates.json,
            and measures it first if it is missing.
        prices: a built-in price list by name, or a file's path or URL.
        node: a node type of that list; null is this machine, free of charge.
        nodes: numbers of nodes; wall time and cost are given for each, everything else for the last.
        tables_on: market of the nodes that write tables, whose lost units are computed again.
        trainings_on: market of the nodes that train.
        months: for which tables are stored.
        moment_bytes: of the optimizer's moments, per parameter: 8 for AdamW, as implemented. 2 plans with an
            8-bit optimizer, which is not implemented.
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
