"""Names of the samplers of `snapfusion.sampling`; importable without torch."""

from typing import Final, Literal, get_args

OwnSolver = Literal["ddim", "euler", "dpm", "dpm++"]
DiffusersSolver = Literal["dpm++singlestep", "unipc"]
Solver = Literal[OwnSolver, DiffusersSolver, "consistency"]
SOLVERS: tuple[str, ...] = get_args(Solver)
DIFFUSERS_SOLVERS: tuple[str, ...] = get_args(DiffusersSolver)
CONSISTENCY: Final = "consistency"
"""The sampler of consistency models, the only one that draws noise at each step."""
