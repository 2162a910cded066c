"""Draws made beforehand, in another thread: the same bits, and none is left to the step."""

import itertools
import threading

import pytest
import torch
from conftest import tiny_bundle
from dmd2_training import networks_of, settings_of, teacher_of
from dmd2_training import objective_of as dmd2_objective

from pipelines.loading.loader import PrefetchingLoader
from snapfusion import noise
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import OnlineTargets, StoredTargets
from snapfusion.training.lcm import LcmObjective
from snapfusion.training.networks import MODEL, Networks
from snapfusion.training.pcm import PcmObjective
from snapfusion.training.robust import RobustObjective
from snapfusion.training.row_draws import draw_rows
from snapfusion.training.settings import (
    CfgRange,
    LcmSettings,
    PcmSettings,
    SkipSettings,
    StepDistillationSettings,
    VelocitySettings,
)
from snapfusion.training.step_distillation import StepDistillationObjective
from snapfusion.training.velocity import VelocityObjective

TEACHER = tiny_bundle()
TEACHER.prediction_type = "v_prediction"
CAPTIONS = CaptionEncoder(TEACHER)
RANGE = CfgRange(low=2.0, high=6.0)
PARTS = {"schedule": TEACHER.schedule}


class Rows(PrefetchingLoader):
    """Batches with the columns of every table."""

    def stream(self, start, *, rank=0, world=1):
        for step in itertools.count(start):
            ids = tuple(f"{step}-{row}" for row in range(4))
            keys = [noise_key(row) for row in ids]
            latent = gaussian_batch(keys, (4, 8, 8))
            columns = {
                "latent": latent,
                "token_ids": TEACHER.tokenize(["red", "re"] * 2),
                "noise_key": torch.tensor(keys),
                "interval": torch.tensor([0, 1, 2, 3]),
                "t": torch.tensor([999, 749, 499, 249]),
                "w": torch.tensor([2.0, 3.0, 4.0, 5.0]),
                "x_target": latent.flip(0),
            }
            yield Batch(ids=ids, columns=columns)


def velocity():
    return VelocityObjective(VelocitySettings(caption_dropout=0.5), captions=CAPTIONS, seed=0, **PARTS)


def online(settings):
    return OnlineTargets(TEACHER, captions=CAPTIONS, settings=settings, seed=0)


def steps(p, *, targets=None):
    settings = StepDistillationSettings(student_steps=4, cfg_range=RANGE, cfg_probability=p)
    targets = targets or online(settings)
    return StepDistillationObjective(settings, targets=targets, captions=CAPTIONS, seed=0, **PARTS)


OBJECTIVES = {
    "velocity": velocity,
    "robust": lambda: RobustObjective(velocity(), settings=SkipSettings(attention=0.4), seed=0),
    "vanilla": lambda: steps(0.0),
    "mixed": lambda: steps(0.5),
    "stored": lambda: steps(1.0, targets=StoredTargets(captions=CAPTIONS, schedule=TEACHER.schedule)),
    "LCM": lambda: LcmObjective(
        (settings := LcmSettings(points=8, cfg_range=RANGE)), targets=online(settings.targets), **PARTS
    ),
    "PCM": lambda: PcmObjective(
        (settings := PcmSettings(points=8, cfg_range=RANGE)), targets=online(settings.targets), **PARTS
    ),
    "DMD2": lambda: dmd2_objective(settings_of(fake_updates=1)),
    "DMD2 regression": lambda: dmd2_objective(
        settings_of(fake_updates=1, gan=None, regression_weight=0.25), teacher=teacher_of("epsilon")
    ),
}


def losses(name, objective, batch, *, step):
    """The losses of a batch in two pieces, as a loop with gradient accumulation has them."""
    unet = tiny_bundle(3).unet.requires_grad_(requires_grad=True)
    if name == "LCM":
        torch.manual_seed(0)
        unet = with_guidance_embedding(unet)
    networks = {MODEL: unet}
    if name.startswith("DMD2"):
        networks = networks_of(teacher_of("epsilon"))
    if name == "LCM" or name.startswith("DMD2"):
        model = Networks(trained=networks, bare=networks, averages=networks)
    else:
        model = unet
    return torch.cat([objective(model, piece, step=step) for piece in batch.split(2)])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_draws_of_a_thread_are_those_of_the_step(name, monkeypatch):
    objective = OBJECTIVES[name]()
    threads, made = set(), noise.gaussian

    def recorded(key, shape):
        threads.add(threading.current_thread().name)
        return made(key, shape)

    def prepare(batch, *, step):
        return draw_rows(objective, batch, step=step)

    plain, drawn = Rows().batches(5), Rows().batches(5, prepare=prepare)
    monkeypatch.setattr(noise, "gaussian", recorded)
    for step in (5, 6):
        expected, ready = losses(name, objective, next(plain), step=step), next(drawn)
        threads.clear()
        assert torch.equal(losses(name, objective, ready, step=step), expected)
        assert "MainThread" not in threads
    plain.close()
    drawn.close()
