"""Settings of the actor pools."""

from collections.abc import Iterable

from pydantic import Field

from snapfusion.settings import Settings

# A window has so many items that starting its actors anew is next to nothing: hours of a teacher's units.
_ITEMS_PER_ACTOR = 256
_LEAST_WINDOW = 1024


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


def window_items(pools: Iterable[Pool]) -> int:
    """Number of items that Ray Data is given at once, of a job that runs these pools."""
    return max(_LEAST_WINDOW, _ITEMS_PER_ACTOR * max(pool.actors for pool in pools))
