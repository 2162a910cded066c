"""Render the miniature's captioned scenes into img2dataset shards.

They replace LAION in the demo: the files have the same form, so all later steps read them like real data.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli.job import run
from jobs.cli.scenes import preview, render_scenes
from jobs.runtime.exit_codes import exit_process


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.render_scenes`."""
    return run("render_scenes", render_scenes, preview=preview, about=__doc__, argv=argv)


if __name__ == "__main__":
    exit_process(main())
