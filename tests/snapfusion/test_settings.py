"""Settings: rejected values, assignments to nested keys, and the digest."""

import hashlib
from typing import Literal

import pytest
from pydantic import Field, model_validator

from snapfusion.settings import Settings, SettingsError, digest


class Pool(Settings):
    size: int = Field(default=1, ge=1)
    gpus: float = 0.5
    name: str | None = None


class Recipe(Settings):
    seed: int = 0
    grids: tuple[int, ...] = (32, 16)
    mode: Literal["offline", "online"] = "offline"
    with_images: bool = True
    pool: Pool = Pool()
    spare: Pool | None = None


def test_assignment_changes_only_its_key():
    before = Recipe(seed=3)
    after = before.with_values(["pool.size=4", "mode=online"])
    assert after == Recipe(seed=3, pool=Pool(size=4), mode="online")
    assert before == Recipe(seed=3)


def test_last_of_two_assignments_wins():
    assert Recipe().with_values(["seed=1", "seed=2"]).seed == 2


def test_what_an_object_leaves_out_is_assigned_afterwards():
    recipe = Recipe(pool=Pool(name="x"))
    assert recipe.with_values(['pool={"size": 2}', "pool.gpus=2"]).pool == Pool(size=2, gpus=2.0)
    assert recipe.with_values(['spare={"size": 2}', "spare.name=y"]).spare == Pool(size=2, name="y")
    with pytest.raises(SettingsError, match=r"pool\.other: no such setting"):
        recipe.with_values(['pool={"size": 2}', "pool.other=1"])


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("grids=[8, 4, 2]", "grids", (8, 4, 2)),
        ("grids=[]", "grids", ()),
        ("pool.name=null", "pool.name", None),
        ('pool.name="null"', "pool.name", "null"),
        ("pool.name=a=b c", "pool.name", "a=b c"),
        ("pool.gpus=2", "pool.gpus", 2.0),
        ("with_images=false", "with_images", False),
        ('pool={"size": 2}', "pool", Pool(size=2)),
        ('spare={"gpus": 0.25}', "spare", Pool(gpus=0.25)),
    ],
)
def test_values_are_json_or_plain_text(assignment, path, value):
    reached = Recipe(pool=Pool(name="x")).with_values([assignment])
    for key in path.split("."):
        reached = getattr(reached, key)
    assert reached == value
    assert type(reached) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sed=1", r"sed: the recipe has no setting 'sed'; it has grids, mode, pool, seed, spare, with_"),
        ("pool.sizes=1", r"pool\.sizes: pool has no setting 'sizes'; it has gpus, name, size"),
        ("spare.size=1", r"spare\.size: spare has no setting 'size'; it has nothing below it"),
        ("seed.x=1", r"seed\.x: seed has no setting 'x'; it has nothing below it"),
        ("seed", r"'seed' is not of the form key=value"),
        ("=1", r"'=1' is not of the form key=value"),
        ("seed=1.0", r"seed: Input should be a valid integer.*given 1\.0"),
        ("seed=true", r"seed: Input should be a valid integer.*given True"),
        ("seed=one", r"seed: Input should be a valid integer.*given 'one'"),
        ("seed=null", r"seed: Input should be a valid integer.*given None"),
        ("pool.name=7", r"pool\.name: Input should be a valid string.*given 7"),
        ("pool.size=0", r"pool\.size: Input should be greater than or equal to 1.*given 0"),
        ("pool.gpus=NaN", r"pool\.gpus: Input should be a finite number"),
        ("mode=fast", r"mode: Input should be 'offline' or 'online'.*given 'fast'"),
        ("grids=[32, 1.5]", r"grids\.1: Input should be a valid integer.*given 1\.5"),
        ('pool={"sizes": 2}', r"pool\.sizes: no such setting"),
    ],
)
def test_error_names_the_path_and_the_value(assignment, message):
    with pytest.raises(SettingsError, match=f"^{message}"):
        Recipe().with_values([assignment])


def test_parse_rejects_unknown_and_missing_keys():
    class Needy(Settings):
        out: str

    with pytest.raises(SettingsError, match=r"^pool\.sizes: no such setting$"):
        Recipe.parse({"pool": {"sizes": 1}})
    with pytest.raises(SettingsError, match=r"^out: Field required$"):
        Needy.parse({})


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 1


def test_values_round_trip():
    recipe = Recipe(grids=(8,), spare=Pool(name="é"), pool=Pool(gpus=0.1))
    assert Recipe.parse(recipe.to_values()) == recipe
    assert recipe.with_values([]) == recipe


def test_digest_depends_on_values_alone():
    one = Recipe.parse({"seed": 5, "pool": {"size": 2, "gpus": 1}})
    other = Recipe.parse({"pool": {"gpus": 1.0, "size": 2}, "seed": 5})
    assert one.digest() == other.digest() == Recipe.parse({**one.to_values()}).digest()
    different = (one, Recipe(), Recipe(seed=1), Recipe(grids=(16, 32)))
    assert len({recipe.digest() for recipe in different}) == 4
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})


def test_digest_is_of_the_canonical_form():
    # Tables store it: if the canonical form changed, no committed run would match its settings.
    canonical = rb'{"a":"\u00e9","b":[1,null]}'
    assert digest({"b": [1, None], "a": "é"}) == hashlib.sha256(canonical).hexdigest()


def test_a_huge_value_is_refused_in_a_short_line():
    for text in ("[" * 100_000, "9" * 100_000, "x" * 100_000):
        with pytest.raises(SettingsError) as refused:
            Recipe().with_values([f"seed={text}"])
        assert len(str(refused.value)) < 400


def test_a_validators_message_stands_alone():
    """Not after pydantic's prefix, nor before the whole section."""

    class Bounds(Settings):
        low: int = 0
        high: int = 1

        @model_validator(mode="after")
        def _are_ordered(self) -> "Bounds":
            if self.low > self.high:
                raise ValueError(f"low {self.low} is above high {self.high}")
            return self

    with pytest.raises(SettingsError) as refused:
        Bounds().with_values(["low=2"])
    assert str(refused.value) == "Bounds: low 2 is above high 1"
    with pytest.raises(SettingsError, match=r"low: .* valid integer, given \{\}"):
        Bounds().with_values(["low={}"])
