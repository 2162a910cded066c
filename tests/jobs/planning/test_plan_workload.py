"""Counts of the planner, compared with the code that does the work."""

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from dmd2_training import batch_of, networks_of, objective_of, settings_of, step_at, teacher_of
from torch import nn
from workloads import workload

from jobs.planning.workload import Workload
from jobs.training.costs import training_memory
from jobs.training.settings import TrainerSettings
from pipelines.costs.stage import StageCost
from pipelines.datasets.costs import TEXT_BYTES
from pipelines.stages.write import pack
from pipelines.tables.manifest import to_parquet
from pipelines.tables.schemas import latents_schema, targets_schema
from pipelines.tables.units import FinishedRows, Unit
from snapfusion.models.activation_memory import _fused_attention, peak_bytes
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.unet import architecture_of, block_unet
from snapfusion.settings import SettingsError
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import OnlineTargets
from snapfusion.training.dmd2 import FAKE_SCORE
from snapfusion.training.networks import MODEL, Networks
from snapfusion.training.passes import dmd2_passes, student_passes, teacher_passes
from snapfusion.training.settings import LoopSettings, StepDistillationSettings
from snapfusion.training.step_distillation import StepDistillationObjective

ROWS = 3


@pytest.fixture(scope="module")
def mini() -> dict[str, StageCost]:
    return {stage.name: stage for stage in workload("mini", rows=512, captions=512).stages()}


def units(stage: StageCost, kind: str, *, replicated: bool | None = None) -> float:
    return sum(
        work.units
        for group in stage.groups
        for work in group.works
        if work.kind == kind and replicated in (None, work.replicated)
    )


def count_rows(unet: nn.Module) -> list[int]:
    """Rows of every call of a UNet from now on."""
    rows: list[int] = []
    unet.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    return rows


@pytest.mark.parametrize("guided", [False, True], ids=["vanilla", "guided"])
@pytest.mark.parametrize("changed", [{}, {"gamma": 0.0}, {"original_times": "grid"}, {"k": 4}], ids=str)
def test_passes_are_those_of_the_objective(guided, changed):
    student, teacher = tiny_bundle(seed=0), tiny_bundle(seed=1)
    student.prediction_type = "v_prediction"
    steps = StepDistillationSettings(student_steps=4, cfg_probability=float(guided), **changed)
    captions = CaptionEncoder(student)
    student_rows, teacher_rows = count_rows(student.unet), count_rows(teacher.unet)
    targets = OnlineTargets(teacher, captions=captions, settings=steps, seed=0)
    objective = StepDistillationObjective(
        steps, targets=targets, captions=captions, schedule=student.schedule, seed=0, across_ranks=False
    )
    batch = Batch(
        ids=tuple(map(str, range(ROWS))),
        columns={"latent": torch.randn(ROWS, 4, 8, 8), "token_ids": student.tokenize(["red"] * ROWS)},
    )
    objective(student.unet, batch, step=0)
    assert sum(student_rows) == ROWS * student_passes(steps, guided=guided)
    assert sum(teacher_rows) == ROWS * teacher_passes(steps, guided=guided)


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("generator", [True, False], ids=["generator", "fake score"])
@pytest.mark.parametrize(
    "changes", [{}, {"gan": None}, {"gan": None, "regression_weight": 0.25}, {"guidance": 1.0}], ids=str
)
def test_passes_of_distribution_matching_are_those_of_the_objective(depth, generator, changes):
    settings = settings_of(**changes)
    teacher, step = teacher_of("epsilon"), step_at(depth, generator=generator, settings=settings)
    networks = networks_of(teacher)
    unets = {"student": networks[MODEL], "teacher": teacher.unet, "fake": networks[FAKE_SCORE]}
    rows = {name: count_rows(unet) for name, unet in unets.items()}
    objective = objective_of(settings, teacher=teacher)
    trained = {name: networks[name] for name in objective.turn(step)}
    batch = batch_of(step)
    objective(Networks(trained=trained, bare=networks, averages={}), batch, step=step)
    passes = dmd2_passes(settings, generator=generator, depth=depth)
    found = {name: sum(counts) / len(batch) for name, counts in rows.items()}
    if generator:
        # A pass of the fake score with a gradient in its input counts as two.
        assert found["fake"] == passes.fake - (settings.gan is not None)
        assert found["student"] == passes.student + passes.trained
    else:
        assert (found["fake"], found["student"]) == (passes.trained, passes.student)
    assert found["teacher"] == passes.teacher


@pytest.mark.slow
def test_distribution_matching_trains_a_third_unet():
    plan = ['steps=["distill_schedule"]']
    _, student = workload(settings=["schedule=dmd2"], plan=plan).stages()
    loop, parameters = 42_900 * 2_048, 859_520_964
    # Of eleven steps ten train the fake score, two passes each, and one the generator.
    assert units(student, "train") == pytest.approx(loop * (10 * 2 + 1) / 11)
    checkpointing = loop * (10 * 2 + 1) / 11
    passes = loop * (10 * 2.5 + 1.5 + 2 + 3) / 11 + checkpointing
    assert units(student, "pass", replicated=False) == pytest.approx(passes)
    # The head has 52 million parameters; weights of 4 bytes, AdamW's two moments, and the student's average.
    assert sum(student.reads.checkpoint_bytes) == pytest.approx(4 * (parameters * 7 + 52.4e6 * 3), rel=1e-3)


@pytest.mark.parametrize(
    ("workers", "sharding", "expected"),
    [
        # Weights, gradients and moments of 100; of 150 beside them weights, moments and 50 gradients more.
        (1, "none", 100 * 16 + 150 * 12 + 50 * 4 + 150 * 4),
        (2, "none", 100 * 16 + 150 * 12 + 50 * 4 + 150 * 4 + 250 * 4),
        (2, "fsdp", (100 * 16 + 150 * 12 + 50 * 4 + 150 * 4) / 2 + 250 * 4),
    ],
)
def test_memory_of_networks_that_are_trained_in_turns(workers, sharding, expected):
    found = training_memory(
        parameters=100,
        beside=150,
        loop=LoopSettings(num_steps=1, global_batch=2, learning_rate=1.0),
        trainer=TrainerSettings(num_workers=workers, sharding=sharding),
        row_bytes=0,
        frozen_bytes=0,
        moment_bytes=8.0,
    )
    assert found == expected


def test_stages_of_the_miniature(mini):
    assert list(mini) == [
        *("render_scenes", "encode_latents", "train_efficient", "student"),
        *("generate_pairs", "distill_decoder", "compile_mobile"),
    ]


def test_work_of_the_miniatures_stages(mini):
    assert units(mini["encode_latents"], "read") == units(mini["encode_latents"], "encode") == 512
    assert units(mini["train_efficient"], "train") == 300 * 64
    assert units(mini["generate_pairs"], "pass") == 512 * 50 * 2
    assert units(mini["generate_pairs"], "decode") == 512
    assert units(mini["distill_decoder"], "train_decoder") == 2 * 800 * 16
    assert units(mini["distill_decoder"], "update") == pytest.approx(2 * 800 * 0.125303)
    student = mini["student"]
    # With p = 1/2 of 200 steps about a half is guided: 3 rows forward and backward then, else 2.
    assert units(student, "train") == pytest.approx(200 * 32 * 2.5, rel=0.1)
    assert units(student, "pass", replicated=False) == pytest.approx(200 * 32 * 2 * 1.5, rel=0.1)


def test_the_efficient_unet_is_table_3s(stages, sd15):
    (train,) = (work for work in stages["train_efficient"].groups[0].works if work.kind == "train")
    efficient = sd15.sizes.of(efficient_architecture(sd15.sizes.architecture))
    assert train.gmacs == efficient.gmacs < sd15.sizes.unet.gmacs


@pytest.fixture(scope="module")
def sd15() -> Workload:
    return workload("sd15", rows=1_000_000, captions=1_000)


@pytest.fixture(scope="module")
def stages(sd15: Workload) -> dict[str, StageCost]:
    return {stage.name: stage for stage in sd15.stages()}


def test_stages_of_sd15_need_no_weights(sd15, stages):
    assert list(stages) == [
        *("encode_latents", "finetune_vpred", "train_efficient", "teacher-16", "small-16", "staged-8"),
        *("generate_pairs", "distill_decoder", "evaluate"),
    ]
    assert sd15.sizes.unet.parameters == 859_520_964


def test_students_and_teachers_have_their_architectures(sd15):
    own, small = sd15.sizes.architecture, sd15.efficient
    assert sd15.architecture("run:teacher-16/model") == own
    assert sd15.architecture("run:small-16/model") == sd15.architecture("run:staged-8/model") == small


def test_evaluation_passes_of_all_contenders(stages):
    stage = stages["evaluate"]
    # 13 contenders of 242 steps in all, 19 scales, of which w = 1 is not guided; 30,000 captions.
    assert units(stage, "pass") == 30_000 * (234 + 8) * (1 + 18 * 2)
    assert stage.rows == 13 * 19 * 30_000


def test_gradient_checkpointing_adds_a_pass_per_row(stages):
    stage = stages["finetune_vpred"]
    assert units(stage, "pass", replicated=False) == units(stage, "train") == 20_000 * 2_048


def test_targets_table_replaces_the_online_teacher():
    found = workload(
        settings=["distill.targets=table", "targets.draws=3"],
        plan=['steps=["compute_targets","distill_schedule"]'],
    ).stages()
    table, student = found[0], found[-1]
    assert units(table, "pass") == pytest.approx(3 * 1_000 * 2 * 1.1)
    assert units(student, "pass", replicated=False) == units(student, "train"), (
        "checkpointing alone: no teacher"
    )


def test_w_conditioned_teacher_needs_one_pass():
    """Meng et al.: every student but the first has a w-conditioned teacher."""
    found = workload(
        settings=["schedule=w-conditioned", "distill.gradient_checkpointing=false"],
        plan=['steps=["distill_schedule"]'],
    ).stages()
    assert [units(stage, "pass", replicated=False) / stage.rows for stage in found[1:]] == [2 * 2, 2, 2]


def test_evolution_scores_every_block_every_round():
    (found,) = workload(plan=['steps=["evolve_unet"]']).stages()
    blocks = 22 + 16
    checkpointing, held_out = 20 * 20_000 * 2_048, 20 * 1_000 * 0.0001
    scored = 20 * (blocks + 1) * 2_000 * 50 * 2
    assert units(found, "pass") == pytest.approx(scored + checkpointing + held_out)
    assert units(found, "judge") == 20 * (blocks + 1) * 2_000


def test_unknown_step_is_refused():
    with pytest.raises(SettingsError, match=r"^--set plan.steps: 'dance' .*render_scenes, "):
        workload("mini", plan=['steps=["dance"]']).stages()


def parquet_bytes(columns: dict, schema, *, rows: int) -> int:
    unit = Unit(name="u", source="laion", start=0, stop=rows, final=True, source_digest="d")
    table = pack(FinishedRows(unit=unit, columns=columns, rejections=[]), schema)
    manifest = unit.manifest(settings="s", environment={}, rows_read=rows, rows_written=rows)
    return len(to_parquet(table, manifest))


def test_table_bytes_match_written_units(sd15, stages):
    """A unit of 128 rows of 512 px, as the recipe writes it."""
    rows, draw = 128, np.random.default_rng(0)
    latents = draw.standard_normal((rows, 4, 64, 64)).astype(np.float16)
    token_ids = np.where(np.arange(77) < 16, draw.integers(0, 49_000, (rows, 77)), 49_407).astype(np.int32)
    text = {
        "id": [f"laion/00012{row:04d}" for row in range(rows)],
        "source_id": [f"https://pictures.example.org/{row * 7919}.jpg" for row in range(rows)],
        "token_ids": token_ids,
    }
    caption = [f"a photograph of {row} people in front of house number {row * 31}" for row in range(rows)]
    made = parquet_bytes(
        {**text, "caption": caption, "latent": latents},
        latents_schema(latent_shape=(4, 64, 64), num_tokens=77),
        rows=rows,
    )
    assert made == pytest.approx(stages["encode_latents"].output_bytes / 1_000_000 * rows, rel=0.005)
    numbers = {name: [1] * rows for name in ("draw", "noise_key", "interval", "t", "t2", "k")}
    made = parquet_bytes(
        {**text, **numbers, "w": [2.0] * rows, "latent": latents, "x_target": latents},
        targets_schema(latent_shape=(4, 64, 64), num_tokens=77, x_dtype="float16"),
        rows=rows,
    )
    assert made == pytest.approx(sd15.target_bytes * rows, rel=0.005)
    assert TEXT_BYTES == 150


# Memory


def counted(bundle, *, rows: int, device: str, checkpointing: bool = False) -> int:
    with torch.device(device):
        unet = block_unet(architecture_of(bundle.unet))
        inputs = torch.randn(rows, 4, 8, 8), torch.zeros(rows)
        c = torch.randn(rows, 16, 16)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return peak_bytes(unet, lambda: unet(*inputs, encoder_hidden_states=c).sample, trained=True)


def test_meta_tensors_count_as_real_ones():
    bundle = tiny_bundle()
    for rows in (1, 8):
        real, shapes = (counted(bundle, rows=rows, device=device) for device in ("cpu", "meta"))
        assert shapes == pytest.approx(real, rel=0.1)


def test_memory_grows_with_rows_and_shrinks_with_checkpointing():
    bundle = tiny_bundle()
    one, eight = (counted(bundle, rows=rows, device="meta") for rows in (8, 64))
    assert eight == pytest.approx(8 * one, rel=0.05)
    assert counted(bundle, rows=64, device="meta", checkpointing=True) < eight


def test_sd15_trainer_memory_matches_the_measurement():
    """docs/full_size.md: 17.2 GiB of all processes, for two steps of one guided row without an average."""
    settings = ["distill.targets=table", "distill.teacher=recipe:model", "distill.loop.global_batch=1"]
    settings += ["distill.loop.ema_decay=null", "distill.trainer.num_workers=1"]
    (found,) = workload(rows=2, captions=2, settings=settings, plan=['steps=["distill_steps"]']).stages()
    # The driver, Ray and the libraries of each process are not in it.
    assert 14.0 < found.peak_bytes / 2**30 < 17.2


def test_attention_counts_as_fused():
    with torch.device("meta"):
        q = torch.empty(1, 2, 64, 8, requires_grad=True)
        with _fused_attention():
            out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad is not None
