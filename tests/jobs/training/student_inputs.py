"""Tiny students, each with a checkpoint and a validation in the middle, and their trainings without Ray."""

import dataclasses
from contextlib import closing

import numpy as np
import torch
from in_process import in_process
from PIL import Image

from jobs.evaluation.settings import PromptSettings
from jobs.training.initial_state import initial_state
from jobs.training.settings import DistillSettings, TrainerSettings, ValidationSettings, VpredSettings
from jobs.training.student import save_student
from jobs.training.table_training import TrainingInputs
from jobs.training.trainer import TrainingResult
from pipelines.datasets.latents import encode_latents
from pipelines.datasets.settings import LatentsSettings
from pipelines.loading.buckets import count_training_rows
from pipelines.loading.settings import LoaderSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import list_shards
from pipelines.stages.settings import ImageSettings
from pipelines.tables.schemas import to_png
from snapfusion.models.save import save
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.loop import train
from snapfusion.training.settings import CfgRange, LoopSettings, StepDistillationSettings

LOOP = LoopSettings(num_steps=4, global_batch=6, learning_rate=1e-3, ema_decay=0.9)
LOADER = LoaderSettings(held_out=0.3)
TRAINER = TrainerSettings(
    num_workers=2,
    cpus_per_worker=0.5,
    micro_batch=2,
    checkpoint_every=2,
    curve_every=1,
    heartbeat_seconds=1.0,
)
VALIDATION = ValidationSettings(every=2, prompts=PromptSettings(limit=6), guidance=(2.0, 1.0), images=3)
VPRED = VpredSettings(
    loop=LOOP, loader=LOADER, trainer=TRAINER.model_copy(update={"num_workers": 1}), validation=VALIDATION
)
DISTILL = DistillSettings(
    steps=StepDistillationSettings(
        student_steps=4, cfg_probability=0.5, cfg_range=CfgRange(low=1.0, high=6.0)
    ),
    loop=LOOP,
    loader=LOADER,
    trainer=TRAINER,
    validation=VALIDATION,
)


def encode(folder, *, model, side, rows=12, detail=4, wide=2, **images):
    """LATENTS of images of three aspects, as many times as high or as wide as `wide` says."""

    def shard_row(number: int) -> ShardRow:
        height, width = ((side, side), (side, wide * side), (wide * side, side))[number % 3]
        noise = np.random.Generator(np.random.Philox(number))
        coarse = noise.integers(0, 256, (detail, detail, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((width, height)))
        return ShardRow(image=to_png(image), caption="a red thing", url=f"http://origin/{number}")

    shards = str(folder / "shards")
    write_shard(shards, map(shard_row, range(rows)), index=0, extension="png", rows_per_shard=100)
    return encode_latents(
        LatentsSettings(rows_per_unit=6, images=ImageSettings(min_side=8, **images)),
        model=model,
        shards=list_shards(shards),
        source="web",
        url=str(folder / "latents"),
        run=in_process,
    )


def save_v_model(bundle, folder, **how) -> str:
    """The folder of a bundle with a UNet that is declared to predict v."""
    bundle.prediction_type = "v_prediction"
    save(bundle, folder, **how)
    return str(folder)


def inputs_of(table, settings, *, count=count_training_rows, **sources):
    """Inputs of a worker for a training on a table."""
    return TrainingInputs(
        settings=settings,
        sources=sources,
        table=table,
        counts=count(table, held_out=settings.loader.held_out),
        identity={},
    )


def assembled(assemble, table, settings, **sources):
    [training] = assemble(inputs_of(table, settings, **sources), device=torch.device("cpu"))
    return training


def first_batch(training):
    with closing(training.loader.batches(0)) as batches:
        return next(batches)


def train_alone(training, loop, *, micro_batch=6, state=None):
    """A training without Ray: its state, the result of each step, and the shapes of its latents."""
    state = state or initial_state(dataclasses.replace(training, settings=loop))
    steps, shapes = [], set()

    def seen(batches):
        for batch in batches:
            shapes.add(tuple(batch["latent"].shape[1:]))
            yield batch

    with closing(training.loader.batches(state.step)) as batches:
        train(
            state,
            objective=training.objective,
            batches=seen(batches),
            settings=loop,
            micro_batch=micro_batch,
            after_step=steps.append,
        )
    assert all(tensor.isfinite().all() for tensor in state.final_weights().values())
    return state, steps, shapes


def save_trained(state, *, student, size, folder, settings, distillation=None):
    """The folders of a student that was trained alone; the hashes of its UNets."""
    store = CheckpointStore(f"{folder}.training")
    store.save(state.step, tensors=state.tensors(), values={"state": state.values()})
    trained = TrainingResult(store_url=store.url, step=state.step, evaluation={}, environment={})
    return save_student(
        trained, student=student, size=size, folder=folder, settings=settings, distillation=distillation
    )
