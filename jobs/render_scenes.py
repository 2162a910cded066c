"""Render the miniature's captioned scenes into img2dataset shards.

The demo's stand-in for LAION: the same files, so every later step is the one that reads the real thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jobs.cli import Job, run
from jobs.exits import leave
from pipelines.schemas import to_png
from pipelines.sources.shards import Picture, write_shard
from snapfusion.mini.scenes import HELD_OUT, sample


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.render_scenes`."""
    return run("render_scenes", render_scenes, preview=preview, about=__doc__, argv=argv)


def render_scenes(job: Job) -> None:
    """Write the recipe's scenes as shards; those that are there already are left alone."""
    source = job.recipe.source
    for index, start in enumerate(range(0, source.scenes, source.scenes_per_shard)):
        stop = min(start + source.scenes_per_shard, source.scenes)
        pictures = _pictures(start, stop, seed=source.seed)
        write_shard(
            job.place("shards"),
            pictures,
            index=index,
            extension="png",
            rows_per_shard=source.scenes_per_shard,
        )
    print(f"  {source.scenes} scenes in {job.place('shards')}")


def _pictures(start: int, stop: int, *, seed: int) -> Iterator[Picture]:
    for index in range(start, stop):
        # Scenes that the miniature was not trained on.
        image, caption = sample(HELD_OUT + index, seed=seed)
        yield Picture(image=to_png(image), caption=caption, url=f"scene:{seed}/{index}")


def preview(job: Job) -> list[str]:
    """What would be written."""
    return [f"would render {job.recipe.source.scenes} scenes to {job.place('shards')}"]


if __name__ == "__main__":
    leave(main())
