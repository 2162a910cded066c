"""Tests of the miniature's scenes as shards."""

import tarfile

from jobs.cli.job import Job
from jobs.cli.scenes import render_scenes
from jobs.recipes.registry import recipe_named
from snapfusion.mini.scenes import parse_caption


def rendered(out, *, recipe, noise=""):
    """Caption and image of each scene."""
    settings = ["source.scenes=200", "source.scenes_per_shard=200", *([noise] if noise else [])]
    render_scenes(Job(verb="render_scenes", recipe=recipe_named(recipe).with_values(settings), out=str(out)))
    [path] = (out / "shards").glob("*.tar")
    with tarfile.open(path) as shard:
        contents = {member.name: shard.extractfile(member).read() for member in shard}
    keys = [name.removesuffix(".txt") for name in contents if name.endswith(".txt")]
    return [(contents[f"{key}.txt"].decode(), contents[f"{key}.png"]) for key in keys]


def is_complete(caption):
    try:
        parse_caption(caption)
    except ValueError:
        return False
    return True


def test_noisy_captions_have_the_images_of_the_right_ones(tmp_path):
    """The ablations train on captions like those of the miniature's own training; the demo on right ones."""
    noise = 'source.caption_noise={"wrong_word": 0.0, "missing_word": 0.0}'
    right = rendered(tmp_path / "right", recipe="ablation", noise=noise)
    noisy = rendered(tmp_path / "noisy", recipe="ablation")
    assert [image for _, image in noisy] == [image for _, image in right]
    captions = [caption for caption, _ in noisy]
    changed = [one for one, (caption, _) in zip(captions, right, strict=True) if one != caption]
    incomplete = [caption for caption in captions if not is_complete(caption)]
    # 12 % with a wrong word and 12 % without one, of 200.
    assert 12 <= len(incomplete) <= 38
    assert 12 <= len(changed) - len(incomplete) <= 38
    assert all(is_complete(caption) for caption, _ in rendered(tmp_path / "mini", recipe="mini"))
