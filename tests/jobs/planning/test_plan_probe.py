"""Measurements of the probe, on a tiny model."""

import itertools

import pytest
from torch import nn

from jobs.cli.job import Job
from jobs.planning import probe
from jobs.planning.driver_rates import measure_driver
from jobs.planning.probe import Probe, run_timed
from jobs.planning.timings import noise_batch, step_seconds
from jobs.recipes.miniature import mini
from jobs.recipes.stable_diffusion import sd15
from jobs.training.progress_channel import seconds_per_step
from pipelines.ray_data.execution import PipelineStage
from pipelines.ray_data.settings import Pool
from snapfusion.metrics.lpips import lpips_gmacs
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.load import load
from snapfusion.models.network_sizes import network_sizes
from snapfusion.settings import SettingsError
from snapfusion.training.settings import LoopSettings


@pytest.fixture
def job(tiny_teacher: str, tmp_path, monkeypatch) -> Job:
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    monkeypatch.setattr("jobs.planning.timings.SECONDS", 0.0)
    monkeypatch.setattr(probe, "_SCENES", 8)
    recipe = mini().with_values(
        [
            f"model={tiny_teacher}",
            "latents.rows_per_unit=4",
            "pairs.generation.batch_size=2",
            "efficient.training.trainer.micro_batch=2",
        ]
    )
    return Job(verb="plan", recipe=recipe, out=str(tmp_path))


def test_rows_and_passes_are_measured(job, capsys):
    found = Probe(job=job, sizes=network_sizes(job.recipe.model))
    found.measure_rows()
    share = found.measure_teacher()
    assert set(found.rates) == {"render", "read", "encode", "write", "pass", "decode", "write_image"}
    assert all(rate.seconds > 0 for rates in found.rates.values() for rate in rates)
    assert found.rates["pass"][0].gmacs == found.sizes.unet.gmacs
    assert 0 < share < 2
    capsys.readouterr()


def test_training_steps_of_both_unets_are_measured(job):
    sizes, bundle = network_sizes("mini"), load("mini")
    found = Probe(job=job, sizes=sizes)
    for architecture in (sizes.architecture, efficient_architecture(sizes.architecture)):
        found.measure_training(bundle, architecture)
    own, small = found.rates["train"]
    assert own.gmacs == sizes.unet.gmacs > small.gmacs
    assert len(found.rates["update"]) == 1
    found.measure_decoder_training(bundle)
    assert found.rates["train_decoder"][0].gmacs == sizes.half.gmacs


def test_driver_works_are_measured(job, tmp_path):
    found = dict(measure_driver(url=str(tmp_path), features=16))
    assert set(found) == {
        *("commit", "save_weights", "read_features"),
        *("sum_features", "subset_distance", "image_pair", "lpips_image"),
    }
    sized = {kind: rate.gmacs for kind, rate in found.items() if rate.gmacs is not None}
    assert sized.pop("lpips_image") == lpips_gmacs("alex", side=128)
    assert sized == {"sum_features": 16**2 / 1e9, "subset_distance": 16**3 / 1e9, "image_pair": 16 / 1e9}
    assert all(rate.seconds > 0 for rate in found.values())


class Double:
    def __call__(self, item):
        yield item
        yield item


class Add:
    def __call__(self, item):
        return item + 1


def test_stages_are_timed_by_name():
    times = {"Double": [], "Add": []}
    stages = [PipelineStage(build=build, arguments={}, pool=Pool()) for build in (Double, Add)]
    assert list(run_timed([1, 2], stages, times=times, results=3)) == [2, 2, 3]
    assert {name: len(found) for name, found in times.items()} == {"Double": 3, "Add": 3}
    assert min(itertools.chain(*times.values())) >= 0


def test_probe_needs_the_recipes_accelerator(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SettingsError, match=r"^--set plan.rates: recipe sd15 "):
        probe._check_device(Job(verb="plan", recipe=sd15(), out="nowhere"))


def test_update_is_part_of_a_step(job):
    def objective(model, batch, *, step):
        return model(batch["latent"]).square().flatten(1).mean(dim=1)

    bundle = load(job.recipe.model)
    step, update = step_seconds(
        nn.Linear(bundle.latent_shape[-1], 4),
        objective=objective,
        batch=noise_batch(bundle, 2),
        loop=LoopSettings(num_steps=1, global_batch=64, learning_rate=1.0, ema_decay=0.9),
    )
    assert step > 0 < update


@pytest.mark.parametrize(
    ("cores", "settings", "workers"),
    [
        (2, [], 2),
        (4, [], 1),
        (4, ["targets.teachers.actors=4"], 4),
        (4, ["targets.teachers.max_actors=4"], 4),
        (4, ["efficient.training.trainer.num_workers=8"], 4),
    ],
)
def test_any_stage_can_fill_the_cores(cores, settings, workers, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = mini().with_values(settings)
    assert probe._contending_workers(Job(verb="plan", recipe=recipe, out="nowhere")) == workers


def test_step_time_skips_the_first_report():
    reports = [{"step": step, "steps_per_second": pace} for step, pace in ((1, 0.1), (11, 5.0), (12, 0.5))]
    assert seconds_per_step(reports) == (10 / 5.0 + 1 / 0.5) / 11
