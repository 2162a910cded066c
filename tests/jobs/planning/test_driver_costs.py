"""The planner's counts of a driver's work and memory, compared with the code that does the work."""

import gc
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from workloads import workload

from jobs.evaluation.distance_costs import distances_cost
from jobs.evaluation.settings import Contender, EvaluationSettings, PromptSettings
from jobs.planning.driver_rates import measure_driver
from jobs.planning.rates_and_prices import Rates
from jobs.recipes.registry import recipe_named
from pipelines.costs.stage import DriverCost, StageCost
from pipelines.datasets.costs import CAPTION_BYTES, UNIT_BYTES
from pipelines.datasets.pairs import pending_units
from pipelines.datasets.settings import PairsSettings, ReferencesSettings
from pipelines.ray_data.settings import window_items
from pipelines.sources.captions import Caption
from pipelines.tables.manifest import UnitManifest
from snapfusion.metrics import kernel, neighbors, subset_distances
from snapfusion.metrics.curve_point import ImageDistances
from snapfusion.metrics.image_groups import ImageGroups
from snapfusion.metrics.kernel import KernelReference
from snapfusion.metrics.moments import Moments
from snapfusion.metrics.neighbors import NeighborReference
from snapfusion.mini.vocabulary import NUM_CAPTIONS

CURVE_COSTS = Path(__file__).parents[2] / "snapfusion" / "metrics" / "curve_costs.py"
PLANNED = (
    *(
        "encode_latents",
        "finetune_vpred",
        "train_robust",
        "evolve_unet",
        "train_efficient",
        "compute_targets",
    ),
    *("distill_schedule", "generate_pairs", "distill_decoder", "evaluate"),
)


def units(driver: DriverCost, kind: str, *, replicated: bool | None = None) -> float:
    return sum(
        work.units for work in driver.works if work.kind == kind and replicated in (None, work.replicated)
    )


@pytest.fixture(scope="module")
def sd15() -> dict[str, StageCost]:
    steps = json.dumps(PLANNED)
    return {stage.name: stage for stage in workload(rows=1_000_000, plan=[f"steps={steps}"]).stages()}


def test_every_job_has_a_driver(sd15):
    without = [name for name, stage in sd15.items() if not (stage.driver.works and stage.driver.peak_bytes)]
    assert without == []
    local = {stage.name: stage for stage in workload("mini").stages() if stage.local}
    assert list(local) == ["render_scenes", "compile_mobile"]
    assert local["compile_mobile"].driver.peak_bytes > 0


def test_weights_that_a_training_saves(sd15):
    own, frozen = 859_520_964, sd15_frozen()
    stage = sd15["finetune_vpred"]
    # Weights and average, a model with the UNet's file, and two folders that are saved and copied.
    numbers = 2 * own + (2 * own + frozen) + 2 * 2 * (own + frozen)
    assert units(stage.driver, "save_weights") == pytest.approx(numbers / 1e6)
    # The model, its file, and weights and average of the checkpoint.
    assert stage.driver.peak_bytes == pytest.approx(4 * (own + frozen + own + 2 * own))
    rounds = units(sd15["evolve_unet"].driver, "save_weights") / units(stage.driver, "save_weights")
    assert rounds == pytest.approx(20)


def sd15_frozen() -> int:
    return workload().sizes.frozen


def test_points_of_the_papers_evaluation(sd15):
    driver, points, images, real = sd15["evaluate"].driver, 13 * 19, 30_000, 30_000
    assert units(driver, "subset_distance") == points * 21
    assert units(driver, "sum_features", replicated=False) == points * images
    assert units(driver, "sum_features", replicated=True) == real
    assert units(driver, "read_features") == pytest.approx((points * images + real + 5_000) * 2_048 / 1e6)
    assert units(driver, "image_pair") == 5_000**2 * (1.5 + points * 3.5)
    # A point's features and their copy, the real images' scatter, factor and chosen features, scores.
    floats = 30_000 * 2_048 * (0.5 + 1) + 2 * 2_048**2 + 5_000 * 2_048 + points * 30_000
    distances = distances_cost(workload().job.recipe.evaluation)
    assert distances.bytes_on(0) == pytest.approx(8 * floats + 30_000 * CAPTION_BYTES)
    assert distances.bytes_on(64) - distances.bytes_on(0) == 21 * 2 * 2_048**2 * 8
    # The model that was loaded before took more.
    assert driver.peak_bytes > distances.peak_bytes
    assert units(driver, "lpips_image") == 0


def test_lpips_is_of_the_first_captions_of_every_point():
    settings = (
        'evaluation.lpips={"network":"vgg","backbone":"b","heads":"h","captions":3}',
        *("evaluation.prompts.draws=5", "evaluation.samples.drawing.images=true"),
    )
    planned = workload("mini", settings=settings, plan=('steps=["evaluate"]',))
    (stage,) = planned.stages()
    (work,) = (work for work in stage.driver.works if work.kind == "lpips_image")
    assert work.units == planned.job.recipe.evaluation.num_points * 3 * 5
    # VGG16's convolutions, whose work grows with the area, at the miniature's 32 px.
    assert work.gmacs == pytest.approx(15.3466 * (32 / 224) ** 2, rel=1e-3)


def small_evaluation(*, draws: int) -> EvaluationSettings:
    return EvaluationSettings(
        contenders=(Contender(name="ddim-50"), Contender(name="other", guidance=())),
        guidance=(1.0, 2.0),
        prompts=PromptSettings(limit=60, draws=draws),
        references=ReferencesSettings(count=80),
        floor_redraws=0,
        kid_images=40,
        neighbor_images=20,
        groups=5,
    )


@pytest.mark.parametrize("draws", [1, 3])
def test_counts_are_those_of_the_distances(draws, monkeypatch):
    """Each element of a matrix of kernels or distances is a pair; each root of a trace a subset."""
    settings, counts = small_evaluation(draws=draws), {"pairs": 0, "subsets": 0, "summed": 0}
    monkeypatch.setattr(kernel, "_BLOCK", 1)
    count_numbers(monkeypatch, kernel, "polynomial_kernel", counts)
    count_numbers(monkeypatch, neighbors, "_squared_distances", counts)
    measure, add = subset_distances.ReferenceSpace.distance, subset_distances.ReferenceSpace.sums

    def distance(space, whole, without):
        counts["subsets"] += 1
        return measure(space, whole, without)

    def sums(space, features, group):
        counts["summed"] += len(group[0])
        return add(space, features, group)

    monkeypatch.setattr(subset_distances.ReferenceSpace, "distance", distance)
    monkeypatch.setattr(subset_distances.ReferenceSpace, "sums", sums)
    random, images = np.random.default_rng(0), 60 * draws
    features = random.standard_normal((80 + images, 6), dtype=np.float32)
    real, drawn = torch.from_numpy(features[:80]), features[80:]
    known = {"kernel": KernelReference.of(real[:40]), "neighbors": NeighborReference.of(real[:20])}
    grouping = ImageGroups.of(images, groups=5, draws=draws)
    for _ in range(3):
        ImageDistances.of(drawn, grouping=grouping, reference=Moments.of(real), **known)
    driver = distances_cost(settings)
    assert counts["subsets"] == units(driver, "subset_distance")
    assert counts["summed"] == units(driver, "sum_features", replicated=False)
    # Each group gives as many images, so that a few fewer are compared than the settings allow.
    assert counts["pairs"] == pytest.approx(units(driver, "image_pair"), rel=0.06)


def count_numbers(monkeypatch, module, name: str, counts: dict[str, int]) -> None:
    """Count the numbers of the matrices that a function of a module returns."""
    function = getattr(module, name)

    def counted(a, b):
        found = function(a, b)
        counts["pairs"] += found.numel()
        return found

    monkeypatch.setattr(module, name, counted)


def test_tuning_and_floor_are_counted():
    settings = small_evaluation(draws=1)
    values = settings.to_values() | {
        "floor_redraws": 3,
        "tuning": {"prompts": {"name": "tuning", "limit": 30}, "references": {"count": 50}},
    }
    without, both = distances_cost(settings), distances_cost(EvaluationSettings.parse(values))

    def added(kind: str) -> float:
        return units(both, kind) - units(without, kind)

    # Three points of 30 images in 5 groups, and three sets of 60 images.
    assert added("subset_distance") == 3 * 6 + 3
    assert added("sum_features") == 3 * 30 + 50 + 3 * 60
    assert NUM_CAPTIONS > 60


def test_a_driver_holds_a_window_of_a_long_list_of_captions():
    def peak(captions: int) -> int:
        (stage,) = workload(captions=captions, plan=('steps=["generate_pairs"]',)).stages()
        return stage.driver.peak_bytes

    pairs = recipe_named("sd15").pairs
    held = pairs.rows_per_unit * window_items((pairs.teachers, pairs.writers))
    assert peak(held) - peak(1_000) == (held - 1_000) * CAPTION_BYTES
    assert peak(2 * held) == peak(held)


def allocated(make) -> int:
    """Bytes of Python's objects that a call leaves."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = make()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] if kept else 0
    finally:
        tracemalloc.stop()


def test_memory_of_captions_and_units():
    count = 2_000
    settings = PairsSettings(rows_per_unit=count)

    def listed():
        captions = [Caption(id=f"{row:09d}", ordinal=row, text=f"{row:060d}") for row in range(count)]
        items = list(pending_units(settings, (), captions=captions, source="list"))
        return captions, items, [pickle.dumps(item) for item in items]

    assert 0.4 * CAPTION_BYTES < allocated(listed) / count < CAPTION_BYTES
    manifest = UnitManifest(
        unit="laion-000000000-000000128",
        source="s3://bucket/shards/00000.tar",
        start=0,
        stop=128,
        final=False,
        source_digest="d" * 64,
        settings="s" * 64,
        environment={"device": "cuda NVIDIA A100", "dtype": "float16", "threads": 1},
        rows_read=128,
        rows_written=128,
    ).to_json()
    manifests = allocated(lambda: [UnitManifest.from_json(manifest) for _ in range(count)]) / count
    assert 0.2 * UNIT_BYTES < manifests < UNIT_BYTES


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_distances_take_what_is_forecast(tmp_path, capsys):
    """Two points of 30,000 images of 2,048 features, whose making is not counted, in a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = {kind: (rate,) for kind, rate in measure_driver(url=str(tmp_path), features=2_048)}
    finally:
        torch.set_num_threads(threads)
    command = [sys.executable, str(CURVE_COSTS), "--points", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout)
    rates = Rates(name="r", about="", worker="one", date="2020-01-01", rates=measured)
    driver = distances_cost(paper_evaluation(points=2))
    seconds = sum(rates.seconds(work) for work in driver.works if work.kind != "read_features")
    mib = driver.bytes_on(1) / 2**20 + figures["start_mib"]
    with capsys.disabled():
        print(f"\nforecast {seconds:.0f} CPU-s, {mib:,.0f} MiB; measured {figures}")
    assert seconds == pytest.approx(figures["cpu_s"], rel=0.3)
    assert mib == pytest.approx(figures["peak_mib"], rel=0.15)


def paper_evaluation(*, points: int) -> EvaluationSettings:
    """Of one contender at so many guidances, by Inception's features."""
    settings = workload().job.recipe.evaluation
    one = settings.contenders[0].model_copy(update={"guidance": tuple(1.0 + w for w in range(points))})
    return settings.model_copy(update={"contenders": (one,), "baseline": one.name})
