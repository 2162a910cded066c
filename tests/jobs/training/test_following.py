"""A training that follows a growing table reads the batches that it would read of the finished one."""

import itertools
import threading
import time
from dataclasses import replace

import pytest
from conftest import ray_train_locally, tiny_bundle
from in_process import in_process
from memory_table import MemoryTable
from student_inputs import VPRED, encode
from synthetic_units import IDENTITY as OF_UNITS
from synthetic_units import SCHEMA, finished, without_first_row

from jobs.deletion.lineage import RunFiles, pinned_versions
from jobs.training.follower import Follower, TableStalled, check_followed, save_sources, saved_sources
from jobs.training.run_folder import begin
from jobs.training.settings import ValidationSettings
from jobs.training.spec import TrainingError
from jobs.training.velocity import finetune_vpred
from pipelines.datasets.latents import encode_latents
from pipelines.datasets.settings import LatentsSettings
from pipelines.loading.followed import FollowedUnits, FollowingStopped
from pipelines.loading.following import FollowingLoader
from pipelines.loading.loader import BatchLoader, is_held_out
from pipelines.loading.settings import LoaderSettings
from pipelines.sources.webdataset import list_shards
from pipelines.stages.settings import ImageSettings
from pipelines.stages.write import WriteUnit
from pipelines.tables.commits import commit_units, replace_units
from pipelines.tables.settings import Bounds
from pipelines.tables.table import TableError, create_table, open_table
from snapfusion.models.save import save
from snapfusion.settings import digest

IDENTITY = {**OF_UNITS, "images": {"buckets": None}}
PLANNED = ["s/b", "s/a", "s/empty", "s/rejected", "s/c"]
SPANS = {"s/b": 22, "s/a": 9, "s/empty": 0, "s/rejected": 1, "s/c": 13, "s/unplanned": 8}
"""Rows of each shard, of which each fifth is rejected: of one shard all."""
ARRIVAL = (3, 0, 12, 1, 7, 2, 15, 6, 11, 9, 13, 4, 16, 8, 5, 14, 10)
LOADER = LoaderSettings(window_units=2, held_out=0.2)


def units():
    """All units, shard by shard."""
    for source, rows in SPANS.items():
        for start in range(0, max(rows, 1), 4):
            stop = min(start + 4, rows)
            made = finished(start, stop, final=stop == rows)
            name = f"{source.replace('/', '-')}-{start:06d}-{stop:06d}"
            ids = [id_.replace("s/", f"{source}/") for id_ in made.columns["id"]]
            yield replace(
                made,
                unit=replace(made.unit, name=name, source=source),
                columns={**made.columns, "id": ids},
                rejections=[replace(one, source=source) for one in made.rejections],
            )


def new_table(folder, identity=IDENTITY):
    return create_table(str(folder / "latents"), schema=SCHEMA, identity=identity)


def grow(url, numbers):
    """Commit some of the units, each on its own, in this order."""
    table, made = open_table(url), list(units())
    write = WriteUnit(url=table.url, schema=SCHEMA, settings=digest(table.identity))
    for number in numbers:
        commit_units(url, [write(made[number])])


def follower(url, *, seconds=20.0, loader=LOADER):
    return Follower(url, sources=PLANNED, loader=loader, seconds=seconds)


def loader_of(folder, url, *, settings=LOADER):
    made = FollowedUnits(str(folder), table_url=url)
    options = {"columns": ("latent",), "global_batch": 6, "seed": 0, "settings": settings}
    return FollowingLoader(open_table(url), units=made, **options)


def ids(loader, *, start=0, count=20, rank=0, world=1, before_each=lambda: None):
    batches, read = loader.batches(start, rank=rank, world=world), []
    try:
        for _ in range(count):
            before_each()
            read.append(next(batches).ids)
    finally:
        batches.close()
    return read


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The finished table, and the records of a training that began on it."""
    folder = tmp_path_factory.mktemp("complete")
    url = new_table(folder).url
    grow(url, range(len(ARRIVAL)))
    with follower(url).recording(str(folder / "followed")) as known:
        known.wait_for(10**6)
    return folder / "followed", url


def test_arrival_is_of_all_units():
    assert sorted(ARRIVAL) == list(range(len(list(units()))))


@pytest.mark.parametrize(("lanes", "world"), [(1, 1), (2, 2)])
def test_batches_are_those_of_the_finished_table(tmp_path, complete, lanes, world):
    settings = LOADER.model_copy(update={"lanes": lanes, "window_units": 2 * lanes})
    expected = [ids(loader_of(*complete, settings=settings), rank=rank, world=world) for rank in range(world)]
    url, folder = new_table(tmp_path).url, str(tmp_path / "followed")
    arrivals = threading.Thread(target=grow, args=(url, ARRIVAL))
    with follower(url, loader=settings).recording(folder) as known:
        arrivals.start()
        read = [
            ids(loader_of(folder, url, settings=settings), rank=rank, world=world) for rank in range(world)
        ]
        evaluated = [batch.ids for batch in loader_of(folder, url).held_out(rows=3)]
        arrivals.join()
    assert read == expected
    assert evaluated == [batch.ids for batch in loader_of(*complete).held_out(rows=3)]
    assert known.lineage == {**open_table(url).lineage(), "version": known.lineage["version"]}
    # The records depend on the arrival, which the batches do not.
    assert len(known) == len(ARRIVAL) - 2


def test_each_batch_is_yielded_as_soon_as_its_span_is_there(tmp_path, complete):
    url, folder = new_table(tmp_path).url, str(tmp_path / "followed")
    planned = FollowedUnits(str(complete[0]), table_url=url)
    planned.refresh()
    # Numbers of units whose spans together have 6, 12, ... rows, and no span more.
    spans = range(0, len(planned) + 2, 2)
    needed = [next(n for n in spans if n and planned.ends[n - 1] >= 6 * (batch + 1)) for batch in range(4)]
    steps = iter([(0, 0), *itertools.pairwise(needed)])
    grow(url, range(needed[0]))
    with follower(url).recording(folder):
        read = ids(loader_of(folder, url), count=4, before_each=lambda: grow(url, range(*next(steps))))
    assert read == ids(loader_of(*complete), count=4)


def test_rest_of_a_span_is_recorded_by_itself(tmp_path):
    url = new_table(tmp_path).url
    grow(url, range(3))
    with follower(url, seconds=5.0).recording(str(tmp_path / "followed")) as known:
        known.wait_for(3)
        assert len(known) == 3, "a span of two units, and a part of the next"
        grow(url, [3])
        known.wait_for(4)


def test_epoch_has_each_planned_row_and_later_ones_are_as_of_any_table(complete):
    url = complete[1]
    rows = [row for row in open_table(url).read(["id"])["id"].to_pylist() if "unplanned" not in row]
    trained = sorted(row for row in rows if not is_held_out(row, fraction=LOADER.held_out))
    loader = loader_of(*complete)
    read = list(itertools.chain(*ids(loader, count=4 * len(trained) // 6)))
    epochs = [read[at : at + len(trained)] for at in range(0, 3 * len(trained), len(trained))]
    assert [sorted(epoch) for epoch in epochs] == [trained] * 3
    planned = [unit for unit in open_table(url).units if "unplanned" not in unit.unit]
    table = MemoryTable({unit.unit: open_table(url).read_unit(unit) for unit in planned})
    usual = BatchLoader(table, columns=("latent",), global_batch=6, seed=0, settings=LOADER)
    order = list(itertools.chain(*ids(usual, count=4 * len(trained) // 6)))
    assert order[len(trained) : 3 * len(trained)] == epochs[1] + epochs[2]
    assert order[: len(trained)] != epochs[0]


def test_resumes_at_any_position(complete):
    expected = ids(loader_of(*complete), count=24)
    for start in range(1, 22, 3):
        assert ids(loader_of(*complete), start=start, count=2) == expected[start : start + 2]


def test_table_that_never_grows_is_given_up(tmp_path):
    url = str(tmp_path / "latents")
    with pytest.raises(TableStalled, match=r"latents does not exist after 0.3 s .*s/b from row 0 on"):
        follower(url, seconds=0.3).wait_for_rows()
    new_table(tmp_path)
    with pytest.raises(TableStalled, match="has not grown"):
        follower(url, seconds=0.3).wait_for_rows()


def test_stalled_training_resumes_with_the_same_batches(tmp_path, complete):
    url, folder = new_table(tmp_path).url, str(tmp_path / "followed")
    grow(url, range(4))  # and of the first shard two are missing
    follower(url).wait_for_rows()
    read = []

    def stop(world):
        ids(loader_of(folder, url), world=world, before_each=lambda: read.append(world))

    def run():
        with follower(url, seconds=0.5).recording(folder):
            with pytest.raises(FollowingStopped, match="has not grown"):
                stop(world=2)
            stop(world=1)

    with pytest.raises(TableStalled, match=r"s/b from row 16 on; go on with the job"):
        run()
    # All ranks stop at the same batch.
    assert read.count(1) == read.count(2) > 1
    grow(url, range(4, len(ARRIVAL)))
    with follower(url).recording(folder):
        assert ids(loader_of(folder, url)) == ids(loader_of(*complete))


def test_nobody_waits_no_training_is_stopped(tmp_path):
    url, folder = new_table(tmp_path).url, str(tmp_path / "followed")
    grow(url, range(2))
    with follower(url, seconds=0.3).recording(folder) as known:
        known.wait_for(2)
        time.sleep(1.5)
        assert not (tmp_path / "followed" / "stopped.json").exists()


def test_closed_batches_end_their_wait(tmp_path):
    url, folder = new_table(tmp_path).url, str(tmp_path / "followed")
    grow(url, range(4))
    with follower(url).recording(folder):
        began = time.monotonic()
        assert len(ids(loader_of(folder, url), count=1)) == 1
        assert time.monotonic() - began < 30


def test_replaced_unit_stops_the_training(tmp_path):
    url, folder = new_table(tmp_path).url, str(tmp_path / "followed")
    grow(url, range(3))
    with follower(url).recording(folder) as known:
        known.wait_for(2)
    replace_units(url, [without_first_row(open_table(url).units[0])])
    with pytest.raises(TableError, match="replaced while"), follower(url).recording(folder) as known:
        known.wait_for(4)


def test_table_without_held_out_rows_is_refused_before_its_last_units_are_read(tmp_path):
    url, folder = new_table(tmp_path).url, str(tmp_path / "followed")
    grow(url, range(len(ARRIVAL)))
    loader = LOADER.model_copy(update={"held_out": 0.0})
    with (
        pytest.raises(TrainingError, match=r"held out for evaluation: raise loader.held_out \(now 0.0\)"),
        follower(url, loader=loader).recording(folder) as known,
    ):
        known.wait_for(20)


def test_table_of_several_shapes_is_refused(tmp_path):
    identity = {**IDENTITY, "images": {"buckets": {"steps": 3}}}
    with pytest.raises(TrainingError, match="several shapes"):
        check_followed(new_table(tmp_path, identity))


def test_sources_are_those_that_a_training_was_begun_with(tmp_path):
    key = save_sources(str(tmp_path), PLANNED)
    assert save_sources(str(tmp_path), [*PLANNED, "s/later"]) != key
    assert saved_sources(str(tmp_path), key) == PLANNED


def test_files_of_an_unfinished_training_stay(tmp_path):
    """The versions that it was begun with and that has its last units are in use."""
    table = new_table(tmp_path)
    begin(f"{tmp_path}/vpred.training", {"latents": table.lineage()}, kind="student")
    grow(table.url, range(len(ARRIVAL)))
    newest = open_table(table.url)
    with follower(table.url).recording(f"{tmp_path}/vpred.training/followed") as known:
        known.wait_for(10**6)
    pinned = pinned_versions(RunFiles(str(tmp_path)), {"latents": newest})
    assert set(pinned["latents"]) == {table.version, newest.version}


def test_stalled_and_resumed_training_has_the_weights_of_one_on_the_finished_table(tmp_path):
    model = str(tmp_path / "tiny")
    save(tiny_bundle(), tmp_path / "tiny")
    encode(tmp_path, model=model, side=16, rows=24, wide=1)
    shards, growing = list_shards(str(tmp_path / "shards")), str(tmp_path / "growing")
    usual = VPRED.model_copy(update={"validation": ValidationSettings(), "follow_seconds": 0.5})
    follows = usual.with_values(["follow=true", "loader.window_units=1"])

    def encode_rows(rows):
        images, bounds = ImageSettings(min_side=8), Bounds(max_rows=rows)
        settings = LatentsSettings(rows_per_unit=6, images=images, bounds=bounds)
        encode_latents(settings, model=model, shards=shards, source="web", url=growing, run=in_process)

    def trained(url, out, settings=follows):
        sources = [f"web/{shard.name}" for shard in shards]
        with ray_train_locally():
            metrics = finetune_vpred(
                settings,
                model=model,
                latents_url=url,
                out_url=str(tmp_path / out),
                table_sources=lambda: sources,
            )
        return {name: metrics[name] for name in ("weights", "curve", "evaluation", "parents", "identity")}

    with pytest.raises(TableStalled, match="does not exist"):
        trained(growing, "grown")
    encode_rows(12)
    with pytest.raises(TableStalled, match="has not grown"):
        trained(growing, "grown")
    encode_rows(12)
    resumed, expected = trained(growing, "grown"), trained(str(tmp_path / "latents"), "finished")
    for name in ("weights", "curve", "evaluation"):
        assert resumed[name] == expected[name]
    assert resumed["parents"]["latents"] == open_table(growing).lineage()
    # What was begun so is finished so, with or without the option.
    assert trained(growing, "grown", settings=usual.with_values(["loader.window_units=1"])) == resumed
