"""Render the miniature's captioned scenes into img2dataset shards.

They replace LAION in the demo: the files have the same form, so all later steps read them like real data.
"""

from jobs.cli.scenes import preview, render_scenes
from jobs.cli.verb import recipe_verb

main = recipe_verb("render_scenes", render_scenes, preview=preview, about=__doc__)

if __name__ == "__main__":
    main.exit()
