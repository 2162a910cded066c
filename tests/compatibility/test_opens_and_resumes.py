"""Artefacts of version 0.1 open, and continue to the results that version 0.1 recorded."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from in_process import in_process

from jobs.evaluation.settings import PromptSettings
from jobs.training.distillation import assemble, distill_steps
from jobs.training.settings import DistillSettings, TrainerSettings, ValidationSettings
from jobs.training.table_training import TrainingInputs
from jobs.training.trainer import resume
from jobs.verify_bundle import verify
from pipelines.datasets.latents import encode_latents
from pipelines.datasets.pairs import generate_pairs
from pipelines.datasets.settings import LatentsSettings, PairsSettings, TargetsSettings
from pipelines.datasets.targets import compute_targets
from pipelines.loading.buckets import count_training_rows
from pipelines.loading.settings import LoaderSettings
from pipelines.sources.captions import Caption
from pipelines.sources.webdataset import list_shards
from pipelines.stages.settings import Generation, ImageSettings, TeacherSettings
from pipelines.tables.schemas import from_png
from pipelines.tables.table import open_table
from snapfusion.models.load import load
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.loop import new_state, train
from snapfusion.training.settings import CfgRange, LoopSettings, StepDistillationSettings

CAPTIONS = [Caption(id=f"c{n}", ordinal=n, text=f"a red thing, number {n}") for n in range(10)]
RANGE = CfgRange(low=1.0, high=6.0)
LATENTS = LatentsSettings(rows_per_unit=6, images=ImageSettings(min_side=8))
PAIRS = PairsSettings(generation=Generation(steps=2, guidance=2.0, batch_size=3, seed=7), rows_per_unit=4)
TARGETS = TargetsSettings(
    teaching=TeacherSettings(student_steps=4, k=2, cfg_range=RANGE, batch_size=6),
    draws=2,
    cfg_probability=0.5,
)
DISTILL = DistillSettings(
    steps=StepDistillationSettings(student_steps=4, cfg_probability=0.5, cfg_range=RANGE),
    loop=LoopSettings(num_steps=4, global_batch=6, learning_rate=1e-3, ema_decay=0.9),
    loader=LoaderSettings(held_out=0.3),
    trainer=TrainerSettings(
        num_workers=1, cpus_per_worker=0.5, micro_batch=2, checkpoint_every=2, curve_every=1
    ),
    validation=ValidationSettings(every=2, prompts=PromptSettings(limit=6), guidance=(2.0, 1.0), images=2),
)

DECODERS = {
    "latent": (lambda data: np.frombuffer(data, "<f2").astype(np.float32), 2e-3),
    "image": (lambda data: from_png(data).astype(np.int16), 1),
}
"""How the columns of numbers are decoded, and by how much they may differ."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder that version 0.1 wrote; `finished` in it has the results of its continuation."""
    with tarfile.open(Path(__file__).with_name("v0_1.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "v0_1"


def assert_same_files(table: Path, expected: Path) -> None:
    """Every data file of `expected` is in `table`, up to rounding differences between processors."""
    for path in sorted(expected.glob("*.parquet")):
        found, other = pq.read_table(table / path.name), pq.read_table(path)
        assert found.schema.equals(other.schema)
        assert manifest_of(found) == manifest_of(other)
        for name in other.column_names:
            for one, another in zip(
                found.column(name).to_pylist(), other.column(name).to_pylist(), strict=True
            ):
                if name in DECODERS:
                    decode, tolerance = DECODERS[name]
                    np.testing.assert_allclose(decode(one), decode(another), rtol=0, atol=tolerance)
                else:
                    assert one == another, name


def manifest_of(table: pa.Table) -> dict:
    """The unit's manifest in the file, without the machine's environment."""
    (manifest,) = table.schema.metadata.values()
    return json.loads(manifest) | {"environment": None}


def test_tables_are_topped_up(run: Path) -> None:
    assert open_table(f"{run}/latents", kind="latents").num_rows == 18
    latents = encode_latents(
        LATENTS,
        model=f"{run}/model",
        shards=list_shards(f"{run}/shards"),
        source="web",
        url=f"{run}/latents",
        run=in_process,
    )
    pairs = generate_pairs(
        PAIRS, teacher=f"{run}/model", captions=CAPTIONS, source="list", url=f"{run}/pairs", run=in_process
    )
    assert (latents.num_rows, pairs.num_rows) == (24, 10)
    for name in ("latents", "pairs"):
        assert_same_files(run / name, run / "finished" / name)


def test_finished_targets_are_left_as_they_are(run: Path) -> None:
    targets = compute_targets(
        TARGETS,
        teacher=f"{run}/model",
        latents=open_table(f"{run}/latents"),
        url=f"{run}/targets",
        run=in_process,
    )
    assert (targets.version, targets.num_rows) == (1, 36)


def metrics_of(run: Path) -> dict:
    return json.loads((run / "finished/student/metrics.json").read_text())


def assert_same_weights(found: dict[str, torch.Tensor], student: Path) -> None:
    for name, tensor in load(str(student)).unet.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_a_checkpoint_is_resumed_in_one_process(run: Path) -> None:
    identity = json.loads((run / "student.training/begun.json").read_text())["identity"]
    table = open_table(f"{run}/latents")
    inputs = TrainingInputs(
        settings=DISTILL.as_begun({}),
        sources={"teacher": f"{run}/model", "student": f"{run}/model"},
        table=table,
        counts=count_training_rows(table, held_out=DISTILL.loader.held_out),
        identity=identity,
    )
    (training,) = assemble(inputs, device=torch.device("cpu"))
    state = new_state(training.model, settings=training.settings)
    resume(state, store=CheckpointStore(f"{run}/student.training/unet"), identity=training.identity, rank=0)
    assert state.step == 2
    batches = training.loader.batches(state.step)
    steps: list = []
    train(
        state,
        objective=training.objective,
        batches=batches,
        settings=training.settings,
        micro_batch=2,
        after_step=steps.append,
    )
    batches.close()
    expected = {point["step"]: point["loss"] for point in metrics_of(run)["curve"]}
    for step in steps:
        assert step.loss == pytest.approx(expected[step.step], rel=1e-4)
    assert_same_weights(state.final_weights(), run / "finished/student/model")


def test_a_training_is_resumed_and_published(local_training: None, run: Path) -> None:
    metrics = distill_steps(
        DISTILL, teacher=f"{run}/model", data_url=f"{run}/latents", out_url=f"{run}/student"
    )
    expected = metrics_of(run)
    assert metrics["identity"] == expected["identity"]
    assert [point["step"] for point in metrics["curve"]] == [1, 2, 3, 4]
    assert [seen["step"] for seen in metrics["watch"]] == [2, 4]
    assert metrics["best"]["step"] == expected["best"]["step"]
    for branch, figures in expected["evaluation"]["after"].items():
        assert metrics["evaluation"]["after"][branch] == pytest.approx(figures, rel=1e-3)
    for folder in ("model", "raw", "best"):
        student = load(f"{run}/student/{folder}").unet.state_dict()
        assert_same_weights(student, run / "finished/student" / folder)


def test_a_finished_student_is_left_as_it_is(run: Path) -> None:
    student = run / "finished/student"
    # As if its driver had been killed after it had published.
    remains = (run / "student.training").rename(run / "finished/student.training")
    metrics = distill_steps(DISTILL, teacher=f"{run}/model", data_url=f"{run}/latents", out_url=str(student))
    assert metrics == metrics_of(run)
    assert not remains.exists()
    for folder, weights in metrics["weights"].items():
        assert load(f"{student}/{folder}").fingerprint()["unet"] == weights


def test_a_phone_bundle_opens_and_computes_its_vectors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(run / "mobile")
    assert "executorch-int8" in capsys.readouterr().out
