"""A training by DMD2 of tiny networks: generator, fake score and GAN head."""

import itertools

import torch
from conftest import tiny_bundle

from snapfusion.models.gan_head import head_for
from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.dmd2 import (
    FAKE_SCORE,
    GAN_HEAD,
    Dmd2Objective,
    draw_depth,
    is_generator_step,
)
from snapfusion.training.loop import new_state, train
from snapfusion.training.networks import MODEL
from snapfusion.training.settings import Dmd2Settings, LoopSettings, NetworkSettings

BATCH = 4
LOOP = LoopSettings(num_steps=4, global_batch=BATCH, learning_rate=1e-3, ema_decay=0.9, clip_norm=0.5)
FAKE = NetworkSettings(learning_rate=2e-3, clip_norm=0.3)
HEAD = NetworkSettings(learning_rate=5e-3, clip_norm=0.1)
MODEL_WITH_TEXT = tiny_bundle()
CAPTIONS = CaptionEncoder(MODEL_WITH_TEXT)


def settings_of(**changes) -> Dmd2Settings:
    return Dmd2Settings(fake_updates=1).model_copy(update=changes)


def teacher_of(prediction_type):
    teacher = tiny_bundle()
    teacher.prediction_type = prediction_type
    return teacher


def objective_of(settings, *, teacher=None):
    return Dmd2Objective(settings, teacher=teacher or teacher_of("epsilon"), captions=CAPTIONS, seed=0)


def batch_of(step, *, rows=slice(BATCH)):
    """These rows of a step's four."""
    ids = tuple(f"{step}-{row}" for row in range(BATCH))[rows]
    keys = [noise_key(row) for row in ids]
    latent, captions = gaussian_batch(keys, (4, 8, 8)), ["red" if key % 2 else "re" for key in keys]
    tokens = MODEL_WITH_TEXT.tokenize(captions)
    return Batch(ids=ids, columns={"latent": latent, "token_ids": tokens, "noise_key": torch.tensor(keys)})


def networks_beside(seed, *, made=lambda network: network):
    fake = tiny_bundle(seed + 1).unet.requires_grad_(requires_grad=True).train()
    return {FAKE_SCORE: (made(fake), FAKE), GAN_HEAD: (made(head_for(fake, seed=seed)), HEAD)}


def state_of(seed=3, *, made=lambda network: network):
    model = tiny_bundle(seed).unet.requires_grad_(requires_grad=True).train()
    return new_state(made(model), settings=LOOP, others=networks_beside(seed, made=made))


def run(state, *, rows=slice(BATCH), micro_batch=3, **options):
    batches = (batch_of(step, rows=rows) for step in itertools.count(state.step))
    objective = objective_of(settings_of())
    train(state, objective=objective, batches=batches, settings=LOOP, micro_batch=micro_batch, **options)


def networks_of(teacher):
    """Networks of other weights than the teacher's, to call an objective with."""
    head = head_for(teacher.unet, seed=1)
    networks = {MODEL: tiny_bundle(3).unet, FAKE_SCORE: tiny_bundle(5).unet, GAN_HEAD: head}
    return {name: network.requires_grad_(requires_grad=True) for name, network in networks.items()}


def step_at(depth, *, generator, settings):
    """The first step of this depth that trains the generator, or the fake score."""
    return next(
        step
        for step in itertools.count()
        if is_generator_step(step, fake_updates=settings.fake_updates) == generator
        and draw_depth(0, step, steps=settings.steps) == depth
    )
