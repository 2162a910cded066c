"""Settings of the actor pools."""

from collections.abc import Iterable

from pydantic import Field, ValidationInfo, field_validator

from snapfusion.settings import Settings

# A window has so many items that starting its actors anew is next to nothing: hours of a teacher's units.
_ITEMS_PER_ACTOR = 256
_LEAST_WINDOW = 1024


class Pool(Settings):
    """The actors of one stage.

    Attributes:
        actors: their number, or the least if there is `max_actors`.
        max_actors: the most; null for a fixed number. Such a pool grows while all of its actors work and CPUs
            and accelerators are free, those of nodes that join included, and shrinks when nodes leave. No row
            depends on it.
        cpus: logical CPUs of each; below 1, stages share a core.
        gpus: accelerators of each.
        labels: labels that a node must have to run them, as in {"role": "teacher"}; an autoscaler starts such
            a node. The values may be Ray's label expressions, such as "in(teacher,spare)".
    """

    actors: int = Field(1, ge=1)
    max_actors: int | None = Field(None, ge=1)
    cpus: float = Field(0.5, ge=0.0)
    gpus: float = Field(0.0, ge=0.0)
    labels: dict[str, str] = Field(default_factory=dict)

    @field_validator("max_actors")
    @classmethod
    def _at_least_actors(cls, max_actors: int | None, info: ValidationInfo) -> int | None:
        actors = info.data.get("actors")
        if max_actors is not None and actors is not None and max_actors < actors:
            raise ValueError(f"at least actors ({actors}) are accepted")
        return max_actors

    @property
    def most_actors(self) -> int:
        """The number of actors, or the most that there may be."""
        return self.max_actors or self.actors


def window_items(pools: Iterable[Pool]) -> int:
    """Number of items that Ray Data is given at once, of a job that runs these pools."""
    return max(_LEAST_WINDOW, _ITEMS_PER_ACTOR * max(pool.most_actors for pool in pools))
