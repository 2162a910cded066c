"""Settings of the actor pools."""

from pydantic import Field

from snapfusion.settings import Settings


class Pool(Settings):
    """The actors of one stage.

    Attributes:
        actors: their number.
        cpus: logical CPUs of each; below 1, stages share a core.
        gpus: accelerators of each.
        labels: labels that a node must have to run them, as in {"role": "teacher"}; an autoscaler starts such
            a node. The values may be Ray's label expressions, such as "in(teacher,spare)".
    """

    actors: int = Field(1, ge=1)
    cpus: float = Field(0.5, ge=0.0)
    gpus: float = Field(0.0, ge=0.0)
    labels: dict[str, str] = Field(default_factory=dict)
