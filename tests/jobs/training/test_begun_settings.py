"""A training goes on with the arithmetic and the order of rows that it was begun with."""

from jobs.training.settings import DistillSettings, VpredSettings
from pipelines.loading.settings import LoaderSettings

SETTINGS = DistillSettings(loader=LoaderSettings(held_out=0.1, lanes=256))


def test_one_begun_without_lanes_goes_on_without():
    begun = SETTINGS.model_copy(update={"loader": LoaderSettings(held_out=0.1)}).identity()
    assert "lanes" not in begun["loader"]
    assert SETTINGS.as_begun(begun).identity() == begun


def test_one_begun_with_lanes_keeps_them():
    assert SETTINGS.identity()["loader"]["lanes"] == 256
    assert SETTINGS.as_begun(SETTINGS.identity()) == SETTINGS


def test_one_of_version_0_1_has_its_arithmetic():
    begun = SETTINGS.as_begun({"loop": {}, "loader": {}}).identity()
    assert "arithmetic" not in begun["loop"]
    assert "lanes" not in begun["loader"]


def test_one_begun_without_following_goes_on_without():
    begun = VpredSettings().identity()
    assert {"follow", "follow_seconds"}.isdisjoint(begun)
    follows = VpredSettings(follow=True)
    assert follows.as_begun(begun).identity() == begun
    assert VpredSettings().as_begun(follows.identity()) == follows
