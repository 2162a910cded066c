"""The planner's arithmetic, by numbers that can be checked in the head."""

import pytest

from jobs.planning.break_even import UnitPrices, break_even
from jobs.planning.builtin_lists import list_names
from jobs.planning.forecast import Cluster, PeakMemory, PlannedStage, Work, WorkerGroup, forecast
from jobs.planning.memory import network_memory, training_memory
from jobs.planning.prices import NodeType, StoragePrices, price_list
from jobs.planning.rates import Contention, Rate, RateError, Rates, StartupSeconds, given_rates
from jobs.planning.requests import TableWrites
from jobs.planning.sizes import NetworkSize
from snapfusion.settings import SettingsError
from snapfusion.training.settings import StepDistillationSettings

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
        },
        "starts": StartupSeconds(ray=7.0, job=5.0, training=20.0),
    }
    return Rates(**values | changed)


def stage(*parts: WorkerGroup, start="job", **more) -> PlannedStage:
    return PlannedStage(name="s", verb="s", rows=1, parts=parts, start=start, **more)


def network(*works: Work, workers=1, most=None) -> WorkerGroup:
    return WorkerGroup(name="network", works=works, workers=workers, on="accelerator", most=most)


def told(*stages: PlannedStage, node=GPUS, nodes=1, given=None, market="spot"):
    return forecast(
        stages,
        cluster=Cluster(name="n", node=node, nodes=nodes),
        rates=given or rates(),
        markets={"tables": market, "training": "on_demand"},
        storage=STORAGE,
    )


def test_workers_share_what_is_shared_and_each_do_what_each_does():
    work = network(Work(kind="pass", units=80), Work(kind="update", units=8, each=True))
    (one,) = told(stage(work, start="none"), nodes=2)
    assert one.workers == 8
    assert one.work_seconds == 80 / 8 + 8 * 0.25
    assert one.worker_hours == pytest.approx(8 * 12 / 3600)
    assert one.cost == pytest.approx(12 / 3600 * 2 * 2.0)


def test_a_stage_waits_for_its_slowest_part():
    readers = WorkerGroup(name="readers", works=(Work(kind="read", units=800),), workers=1, on="core")
    (one,) = told(stage(network(Work(kind="pass", units=40)), readers))
    assert (one.slowest, one.work_seconds) == ("readers", 800 * 0.5 / 8)
    assert one.worker_hours == pytest.approx(40 / 3600), "accelerators wait, they do not work"


def test_ray_starts_once_and_local_steps_without_it():
    local = PlannedStage(name="l", verb="l", rows=0, parts=(network(Work(kind="pass", units=1)),), local=True)
    work = network(Work(kind="pass", units=1))
    starts = [
        one.start_seconds for one in told(local, stage(work), stage(work), stage(work, start="training"))
    ]
    assert starts == [0.0, 5.0 + 7.0, 5.0, 20.0]


def test_no_more_workers_than_there_is_work_for():
    (one,) = told(stage(network(Work(kind="pass", units=6), most=3)), nodes=9)
    assert (one.workers, one.work_seconds) == (3, 2.0)


def test_trainings_stay_on_demand():
    work = network(Work(kind="pass", units=3600 * 4))
    table, training = told(stage(work), stage(work, start="training"), given=rates(starts=StartupSeconds()))
    assert (table.cost, training.cost) == pytest.approx((2.0, 8.0))


def test_on_cores_the_recipes_workers_crowd_each_other():
    def found(workers: int):
        part = network(Work(kind="pass", units=12), workers=workers)
        given = rates(crowding=Contention(tables=1.5, trainings=2.0), starts=StartupSeconds())
        return told(stage(part), stage(part, start="training"), node=CORES, given=given)

    (alone, _), (table, training) = found(1), found(2)
    assert alone.work_seconds == 12.0
    assert table.work_seconds == 6.0 * 1.5
    assert table.network_seconds == 2 * 9.0
    assert training.work_seconds == 6.0 * 2.0


def test_parts_that_share_the_cores_take_at_least_what_they_take_together():
    readers = WorkerGroup(name="readers", works=(Work(kind="read", units=20),), workers=1, on="core")
    writers = WorkerGroup(name="writers", works=(Work(kind="read", units=20),), workers=1, on="core")
    (one,) = told(stage(network(Work(kind="pass", units=10)), readers, writers, start="none"), node=CORES)
    assert one.work_seconds == 30 / 2


def test_another_networks_time_is_in_proportion_to_the_nearest_in_size():
    given = rates()
    assert given.seconds("train", 20.0) == 6.0
    assert given.seconds("train", 3.0) == 1.5
    assert given.seconds("pass") == 1.0
    with pytest.raises(RateError, match="r has no rate of 'decode', it has pass, read"):
        given.seconds("decode", 1.0)


def test_of_two_rates_each_states_its_size():
    with pytest.raises(ValueError, match="each states its network's gmacs"):
        rates(rates={"pass": (Rate(seconds=1.0), Rate(seconds=2.0, gmacs=1.0))})


def test_requests_cost_what_the_list_says():
    writing = TableWrites(units=1000, commit_seconds=0.0, rejects=False)
    (one,) = told(stage(network(Work(kind="pass", units=1)), writing=writing))
    asked = one.requests
    assert asked.put == 1000 + 1000 * 3
    assert one.request_cost == pytest.approx((asked.put + asked.list) * 0.005 + asked.get * 0.0005)


@pytest.mark.parametrize("kind", ["rates", "prices"])
def test_what_is_shipped_can_be_read(kind):
    assert list_names(kind)
    for name in list_names(kind):
        found = price_list(name) if kind == "prices" else given_rates(name)
        assert found.name == name
        assert "ASSUM" in found.about.upper(), "nothing here is a quotation or a measurement of ours"


def test_a_list_of_ones_own_is_read_by_its_path(tmp_path):
    own = price_list("example").model_copy(update={"name": "mine"})
    (tmp_path / "mine.json").write_text(own.to_json())
    assert price_list(str(tmp_path / "mine.json")) == own


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file; a path, a URL or example is accepted"),
        ("[1]", "it is no object of JSON"),
        ("{", "it is no JSON"),
        ('{"name": "x"}', "date: Field required"),
    ],
)
def test_a_list_that_is_none_is_named(tmp_path, content, said):
    place = tmp_path / "list.json"
    if content is not None:
        place.write_text(content)
    with pytest.raises(SettingsError, match=f"^--set plan.prices={place}: .*{said}"):
        price_list(str(place))


def test_targets_pay_when_they_are_used_again_or_made_on_cheaper_nodes():
    steps = StepDistillationSettings(cfg_probability=0.5, gamma=0.0)

    def found(**prices):
        return break_even(
            "s",
            steps,
            student=NetworkSize(parameters=1, gmacs=10.0),
            teacher=NetworkSize(parameters=1, gmacs=10.0),
            rates=rates(),
            prices=UnitPrices(**{"making": 1.0, "training": 1.0, "stored": 0.0} | prices),
            stored_bytes=1.0,
            used=1.0,
        )

    same = found()
    # Vanilla: 2 passes of the teacher, and 3 of the student; guided: twice as many of both.
    assert same.saved == pytest.approx({"vanilla": 0.4, "guided": 0.4, "mixed": 0.4})
    assert same.teacher_seconds == 0.5 * 2 + 0.5 * 4
    assert (same.pays_from, same.pays) == (1.0, True)
    assert found(making=0.25).pays_from == 0.25
    dear = found(stored=6.0)
    assert (dear.pays_from, dear.pays) == (3.0, False)


def test_l_ori_makes_the_teachers_share_smaller():
    found = break_even(
        "s",
        StepDistillationSettings(cfg_probability=0.0, gamma=0.2),
        student=NetworkSize(parameters=1, gmacs=10.0),
        teacher=NetworkSize(parameters=1, gmacs=10.0),
        rates=rates(),
        prices=UnitPrices(making=1.0, training=1.0, stored=0.0),
        stored_bytes=1.0,
        used=1.0,
    )
    assert found.saved == pytest.approx({"vanilla": 0.25, "mixed": 0.25})


def memory(**changed) -> PeakMemory:
    values = {
        "parameters": 100,
        "frozen": 10,
        "frozen_bytes": 7,
        "row_bytes": 50,
        "rows": 4,
        "precision": "bfloat16",
        "moment_bytes": 8.0,
        "averaged": True,
        "workers": 1,
        "spread": False,
    }
    return training_memory(**values | changed)


def test_a_trainer_holds_weights_gradients_moments_average_and_what_passes():
    assert memory().networks == 100 * (4 + 4 + 8 + 4) + 10 * 4 + 7
    assert memory(averaged=False, moment_bytes=2.0).networks == 100 * (4 + 4 + 2) + 47
    assert memory(workers=2).networks == memory().networks + 400, "buckets for the exchange"
    assert memory(workers=4, spread=True).networks == 100 * (20 / 4 + 4) + 47
    # Two-byte copies of the weights beside the activations, or the optimizer's copy, whichever is more.
    assert memory().activations == 100 * 2 + 4 * 50 * 1.2
    assert memory(precision="float32").activations == 4 * 50 * 2 * 1.2
    assert memory(rows=1).activations == 400


def test_a_network_that_is_only_asked_holds_its_weights_and_one_batch():
    found = network_memory(parameters=100, dtype="float32", row_bytes=50, rows=3)
    assert found.peak == 400 + 3 * 50 * 2 * 1.2
