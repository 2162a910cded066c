"""Render the miniature's captioned scenes into img2dataset shards.

They replace LAION in the demo: the files have the same form, so all later steps read them like real data.
"""

from functools import partial

from jobs.cli.job import run
from jobs.cli.scenes import preview, render_scenes
from jobs.runtime.exit_codes import exit_process

main = partial(run, "render_scenes", render_scenes, preview=preview, about=__doc__)

if __name__ == "__main__":
    exit_process(main())
