"""Names of the samplers of `snapfusion.sampling`; importable without torch."""

from typing import Literal, get_args

Solver = Literal["ddim", "euler", "dpm", "dpm++"]
SOLVERS: tuple[str, ...] = get_args(Solver)
