"""Names of the samplers of `snapfusion.sampling`; importable without torch."""

from typing import Literal, get_args

OwnSolver = Literal["ddim", "euler", "dpm", "dpm++"]
DiffusersSolver = Literal["dpm++singlestep", "unipc"]
Solver = Literal[OwnSolver, DiffusersSolver]
SOLVERS: tuple[str, ...] = get_args(Solver)
DIFFUSERS_SOLVERS: tuple[str, ...] = get_args(DiffusersSolver)
