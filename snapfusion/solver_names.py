"""Names of the samplers in `snapfusion.solvers`."""

from __future__ import annotations

from typing import Literal, get_args

Solver = Literal["ddim", "euler", "dpm", "dpm++"]


SOLVERS: tuple[str, ...] = get_args(Solver)
