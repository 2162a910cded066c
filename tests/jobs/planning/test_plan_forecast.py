"""Arithmetic of the planner, with numbers that can be checked by hand."""

import pytest

from jobs.cli.job import Job
from jobs.planning.break_even import break_even
from jobs.planning.plan import Cluster
from jobs.planning.rates_and_prices import (
    Contention,
    NodeType,
    PriceList,
    Rate,
    Rates,
    StartupSeconds,
    StoragePrices,
)
from jobs.planning.settings import PlanSettings
from jobs.planning.workload import Counts, Workload
from jobs.recipes.miniature import mini
from jobs.training.costs import training_memory
from jobs.training.settings import TrainerSettings
from pipelines.costs.requests import TableWrites
from pipelines.costs.stage import DriverCost, StageCost, Work, WorkerGroup, local_cost, network_memory
from snapfusion.models.network_sizes import network_sizes
from snapfusion.settings import SettingsError
from snapfusion.training.settings import LoopSettings, StepDistillationSettings

STORAGE = StoragePrices(gb_month=0.02, put_1000=5.0, get_1000=0.5)
GPUS = NodeType(accelerator="A", accelerators=4, cores=8, memory_gib=40.0, on_demand=8.0, spot=2.0)
CORES = NodeType(cores=2, memory_gib=16.0, on_demand=1.0)


def rates(**changed) -> Rates:
    values = {
        "name": "r",
        "worker": "one",
        "date": "2020-01-01",
        "about": "made up",
        "rates": {
            "read": (Rate(seconds=0.5),),
            "pass": (Rate(seconds=1.0, gmacs=10.0),),
            "train": (Rate(seconds=3.0, gmacs=10.0), Rate(seconds=1.0, gmacs=2.0)),
            "update": (Rate(seconds=0.25),),
            "commit": (Rate(seconds=0.125),),
            "subset_distance": (Rate(seconds=4.0, gmacs=2.0),),
        },
        "driver_mib": 100.0,
        "starts": StartupSeconds(ray=7.0, job=5.0, training=20.0),
    }
    return Rates(**values | changed)


def stage(*groups: WorkerGroup, startup="job", **more) -> StageCost:
    return StageCost(name="s", verb="s", rows=1, groups=groups, startup=startup, **more)


def network(*works: Work, workers=1, **more) -> WorkerGroup:
    return WorkerGroup(name="network", works=works, workers=workers, on="accelerator", **more)


def cores(name: str, *, units: int) -> WorkerGroup:
    return WorkerGroup(name=name, works=(Work(kind="read", units=units),), workers=1)


def forecasts(*stages: StageCost, node=GPUS, nodes=1, given=None):
    """On spot nodes for tables, and others for trainings."""
    given, settings = given or rates(), PlanSettings()
    return Cluster(node=node, nodes=nodes, rates=given, settings=settings, storage=STORAGE).forecast(stages)


def test_workers_share_work_unless_it_is_replicated():
    work = network(Work(kind="pass", units=80), Work(kind="update", units=8, replicated=True))
    (one,) = forecasts(stage(work, startup="none"), nodes=2)
    assert (one.workers, one.work_seconds) == (8, 80 / 8 + 8 * 0.25)
    assert one.worker_hours == pytest.approx(8 * 12 / 3600)
    assert one.cost == pytest.approx(12 / 3600 * 2 * 2.0)


def test_a_stage_waits_for_its_slowest_group():
    (one,) = forecasts(stage(network(Work(kind="pass", units=40)), cores("readers", units=800)))
    assert (one.slowest, one.work_seconds) == ("readers", 800 * 0.5 / 8)
    assert one.worker_hours == pytest.approx(40 / 3600), "accelerators wait, they do not work"


def test_the_driver_works_after_the_last_row():
    """Its works come one after the other; the cores of one node share those that can be shared."""
    works = (Work(kind="commit", units=8, replicated=True), Work(kind="subset_distance", units=12, gmacs=1.0))
    driver = DriverCost(works=works, max_cores=6, peak_bytes=3 * 2**20, core_bytes=2**20)
    part = network(Work(kind="pass", units=80))
    (one,) = forecasts(stage(part, startup="none", driver=driver), nodes=2)
    assert one.after_seconds == {"commit": 8 * 0.125, "subset_distance": 12 * 4.0 / 2 / 6}
    assert (one.driver_seconds, one.seconds) == (1.0 + 4.0, 80 / 8 + 5.0)
    assert one.cost == pytest.approx(15.0 / 3600 * 2 * 2.0)
    assert one.driver_bytes == (100 + 3 + 6) * 2**20


def test_a_local_stage_is_the_drivers():
    (one,) = forecasts(local_cost("render_scenes", "read", units=10, peak_bytes=2**20))
    assert (one.seconds, one.alone_seconds, one.driver_seconds) == (5.0, {"read": 5.0}, 5.0)
    assert one.driver_bytes == 101 * 2**20


def test_ray_starts_once():
    work = network(Work(kind="pass", units=1))
    local, training = stage(work, startup="none", local=True), stage(work, startup="training")
    found = forecasts(local, stage(work), stage(work), training)
    assert [one.start_seconds for one in found] == [0.0, 5.0 + 7.0, 5.0, 20.0]


def test_workers_are_limited_by_the_work():
    (one,) = forecasts(stage(network(Work(kind="pass", units=6), max_workers=3)), nodes=9)
    assert (one.workers, one.work_seconds) == (3, 2.0)


def test_trainings_stay_on_demand():
    work, given = network(Work(kind="pass", units=3600 * 4)), rates(starts=StartupSeconds())
    table, training = forecasts(stage(work), stage(work, startup="training"), given=given)
    assert (table.cost, training.cost) == pytest.approx((2.0, 8.0))


def test_workers_on_all_cores_contend():
    def found(workers: int):
        part = network(Work(kind="pass", units=12), workers=workers)
        given = rates(crowding=Contention(tables=1.5, trainings=2.0), starts=StartupSeconds())
        return forecasts(stage(part), stage(part, startup="training"), node=CORES, given=given)

    (alone, _), (table, training) = found(1), found(2)
    assert alone.work_seconds == 12.0
    assert (table.work_seconds, table.network_seconds) == (6.0 * 1.5, 2 * 9.0)
    assert training.work_seconds == 6.0 * 2.0


def test_groups_share_the_cores():
    groups = [cores(name, units=20) for name in ("readers", "writers")]
    (one,) = forecasts(stage(network(Work(kind="pass", units=10)), *groups, startup="none"), node=CORES)
    assert one.work_seconds == 30 / 2


def test_time_scales_from_the_nearest_network_size():
    given = rates()
    assert given.seconds(Work(kind="train", units=1, gmacs=20.0)) == 6.0
    assert given.seconds(Work(kind="train", units=2, gmacs=3.0)) == 2 * 1.5
    assert given.seconds(Work(kind="pass", units=1)) == 1.0
    with pytest.raises(SettingsError, match="r has no rate of 'decode', it has commit, pass, read"):
        given.seconds(Work(kind="decode", units=1, gmacs=1.0))


def test_several_rates_must_state_their_size():
    with pytest.raises(ValueError, match="gmacs"):
        rates(rates={"pass": (Rate(seconds=1.0), Rate(seconds=2.0, gmacs=1.0))})


def test_request_cost():
    writes = TableWrites(units=1000, commit_seconds=0.0)
    (one,) = forecasts(stage(network(Work(kind="pass", units=1)), writes=writes))
    requests = one.requests
    assert requests.put == 1000 + 1000 * 3
    assert one.request_cost == pytest.approx((requests.put + requests.list) * 0.005 + requests.get * 0.0005)


@pytest.mark.parametrize("lists", [Rates, PriceList])
def test_builtin_lists_can_be_read(lists):
    assert lists.builtin_names()
    for name in lists.builtin_names():
        found = lists.read(name)
        assert found.name == name
        assert "ASSUM" in found.about.upper()


def test_own_list_is_read_by_path(tmp_path):
    own = PriceList.read("example").model_copy(update={"name": "mine"})
    (tmp_path / "mine.json").write_text(own.to_json())
    assert PriceList.read(str(tmp_path / "mine.json")) == own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("[1]", "no prices .*object"),
        ("{", "no prices .*line 1"),
        ('{"name": "x"}', "no prices .*: Field required"),
    ],
)
def test_unusable_list_is_named(tmp_path, content, message):
    path = tmp_path / "list.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=f"^--set plan.prices={path}: .*{message}"):
        PriceList.read(str(path))


def break_even_of(steps: StepDistillationSettings, *, spot=None, stored=0.0):
    """Of targets that are used once; a pass takes one second, which costs 1 beside the price of `stored`."""
    recipe = mini()
    student = recipe.distill.model_copy(update={"steps": steps})
    latents = student.loop.num_steps * student.loop.global_batch // recipe.targets.draws
    work = Workload(
        job=Job(verb="plan", recipe=recipe, out="nowhere"),
        settings=PlanSettings(),
        sizes=network_sizes("mini"),
        counts=Counts(source=latents, latents=latents, captions=1),
        rates=rates(rates={"pass": (Rate(seconds=1.0),), "train": (Rate(seconds=3.0),)}),
    )
    node = NodeType(cores=1, memory_gib=1.0, on_demand=3600.0, spot=spot)
    storage = StoragePrices(gb_month=stored * 1e9 / work.target_bytes, put_1000=0.0, get_1000=0.0)
    return break_even(work, student, node=node, storage=storage)


def test_targets_pay_if_reused_or_cheaper():
    steps = StepDistillationSettings(cfg_probability=0.5, gamma=0.0)
    same = break_even_of(steps)
    # Vanilla: 2 passes of the teacher, and 3 of the student; guided: twice as many of both.
    assert same.saved == pytest.approx({"vanilla": 0.4, "guided": 0.4, "mixed": 0.4})
    assert same.teacher_seconds == 0.5 * 2 + 0.5 * 4
    assert (same.pays_from, same.pays) == (1.0, True)
    assert break_even_of(steps, spot=900.0).pays_from == 0.25
    stored = break_even_of(steps, stored=6.0)
    assert (stored.pays_from, stored.pays) == (pytest.approx(3.0), False)


def test_l_ori_reduces_the_teachers_share():
    found = break_even_of(StepDistillationSettings(cfg_probability=0.0, gamma=0.2))
    assert found.saved == pytest.approx({"vanilla": 0.25, "mixed": 0.25})


def memory(*, precision="bfloat16", ema=0.9, workers=1, rows=4, sharding="none", moment_bytes=8.0) -> float:
    return training_memory(
        parameters=100,
        loop=LoopSettings(num_steps=1, global_batch=8, learning_rate=1.0, precision=precision, ema_decay=ema),
        trainer=TrainerSettings(num_workers=workers, micro_batch=rows, sharding=sharding),
        row_bytes=50,
        frozen_bytes=47,
        moment_bytes=moment_bytes,
    )


def test_memory_of_a_trainer():
    # Two-byte copies of the weights beside the activations, or the optimizer's copy, whichever is more.
    networks, activations = 100 * (4 + 4 + 8 + 4) + 47, 100 * 2 + 4 * 50 * 1.2
    assert memory() == networks + activations
    assert memory(precision="float32") == networks + 4 * 50 * 2 * 1.2
    assert memory(rows=1) == networks + 400
    assert memory(ema=None, moment_bytes=2.0) == 100 * (4 + 4 + 2) + 47 + activations
    assert memory(workers=2) == networks + 400 + activations, "buckets for the exchange"
    assert memory(workers=4, sharding="fsdp") == 100 * (20 / 4 + 4) + 47 + activations


def test_memory_of_forward_passes_alone():
    assert network_memory(parameters=100, dtype="float32", batch_bytes=3 * 50) == 400 + 3 * 50 * 2 * 1.2
