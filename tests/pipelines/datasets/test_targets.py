"""TARGETS: targets follow from latent, draw and settings, and can be recomputed."""

import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_bundle
from in_process import in_process
from latent_inputs import copy_table, data_files, encode, first_units, forge, make_shards, verify, with_column
from target_inputs import SETTINGS, DyingTeacher, online_targets

from pipelines.datasets.targets import (
    check_targets,
    compute_targets,
    is_guided_draw,
    pending_units,
    recomputer,
)
from pipelines.loading.branches import branch_and_draw, unit_name
from pipelines.loading.rows import to_batch
from pipelines.ray_data.execution import run_on_ray
from pipelines.ray_data.settings import Pool
from pipelines.stages.read_latents import ReadLatents
from pipelines.tables.schemas import array_type, read_array
from pipelines.tables.table import TableError, open_table
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.noise import gaussian_batch
from snapfusion.sampling import time_grid
from snapfusion.schedule import Estimate
from snapfusion.settings import SettingsError
from snapfusion.solvers import ddim_step
from snapfusion.training.captions import CaptionEncoder, draw_caption_dropout
from snapfusion.training.distillation_batch import StoredTargets
from snapfusion.training.draws import draw_guidance, draw_intervals, row_key
from snapfusion.training.settings import CfgRange, StepDistillationSettings

CFG_RANGE = CfgRange(low=1.0, high=6.0)
STEPS = StepDistillationSettings(
    student_steps=4, k=2, cfg_range=CFG_RANGE, cfg_probability=0.5, caption_dropout=0.3
)


def compute(url: Path | str, teacher: str, latents, *, settings=SETTINGS, run=in_process):
    return compute_targets(settings, teacher=teacher, latents=latents, url=str(url), run=run)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def latents(shards, tiny_teacher, tmp_path_factory):
    return encode(tmp_path_factory.mktemp("latents") / "latents", shards, tiny_teacher)


@pytest.fixture(scope="module")
def targets(latents, tiny_teacher, tmp_path_factory):
    return compute(tmp_path_factory.mktemp("targets") / "targets", tiny_teacher, latents)


@pytest.fixture(scope="module")
def exact(latents, tiny_teacher, tmp_path_factory):
    settings = SETTINGS.with_values(["teaching.x_dtype=float32"])
    return compute(tmp_path_factory.mktemp("exact") / "targets", tiny_teacher, latents, settings=settings)


def unit_of(table, *, guided: bool):
    return next(file for file in table.units if branch_and_draw(file.unit)[0] == guided)


def batch_of(rows):
    """A batch of the columns without nulls; `w` is null in vanilla rows."""
    names = [name for name in rows.schema.names if name != "source_id" and not rows[name].null_count]
    return to_batch(rows.select(names))


def parent_id(row) -> str:
    return row["id"].rpartition("#")[0]


def test_every_latent_has_all_draws_and_branches(targets, latents):
    rows = targets.read(["id", "draw", "source_id", "w"]).to_pylist()
    assert len(rows) == 2 * latents.num_rows == 36
    by_latent = Counter(map(parent_id, rows))
    assert set(by_latent.values()) == {2}
    assert set(by_latent) == set(latents.read(["id"])["id"].to_pylist())
    assert sorted(parent_id(row) for row in rows if row["w"] is not None) == sorted(by_latent)
    source_ids = dict(zip(*latents.read(["id", "source_id"]).to_pydict().values(), strict=True))
    assert all(row["source_id"] == source_ids[parent_id(row)] for row in rows)


def test_unit_name_says_branch_and_draw(targets):
    for file in targets.units:
        guided, draw = branch_and_draw(file.unit)
        rows = targets.read_unit(file, ["w", "draw"])
        assert rows["w"].null_count == (0 if guided else rows.num_rows)
        assert set(rows["draw"].to_pylist()) == {draw}


def test_random_draws_follow_from_the_key(targets):
    times = time_grid(4)
    rows = targets.read().to_pylist()
    for row in rows:
        key = row["noise_key"]
        assert key == row_key(7, parent_id(row), row["draw"])
        [interval] = draw_intervals([key], student_steps=4).tolist()
        expected = (interval, times[interval], times[interval + 1], 2)
        assert (row["interval"], row["t"], row["t2"], row["k"]) == expected
        if row["w"] is not None:
            assert row["w"] == draw_guidance([key], cfg_range=CFG_RANGE).item()
    assert {row["interval"] for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("guided", [False, True])
def test_stored_targets_equal_online_targets(targets, latents, tiny_teacher, guided):
    bundle, online = load(tiny_teacher), online_targets(tiny_teacher, STEPS)
    stored = StoredTargets(captions=CaptionEncoder(bundle), schedule=bundle.schedule)
    for parent in latents.units:
        draw = next(n for n in (0, 1) if is_guided_draw(SETTINGS, parent=parent.unit, draw=n) == guided)
        name = unit_name(parent.unit, draw=draw, guided=guided)
        [file] = [file for file in targets.units if file.unit == name]
        stored_batches = batch_of(targets.read_unit(file)).split(3)
        batches = to_batch(latents.read_unit(parent, ["id", "latent", "token_ids"])).split(3)
        for stored_batch, batch in zip(stored_batches, batches, strict=True):
            read = stored(stored_batch, guided=guided, step=0)
            keys = [row_key(7, row_id, draw) for row_id in batch.ids]
            computed = online.compute(batch, keys, guided=guided)
            assert torch.equal(read.x_target, computed.x_target.half().float())
            for field in ("x", "eps", "z_t", "interval", "t"):
                assert torch.equal(getattr(read, field), getattr(computed, field)), field
            assert (read.w is None) == (computed.w is None) == (not guided)
            assert not guided or torch.equal(read.w, computed.w)
            # A dropped caption is encoded among others here, and alone there.
            torch.testing.assert_close(read.c, computed.c, rtol=0, atol=1e-6)


def test_captions_are_dropped_in_vanilla_rows_alone(targets, latents, tiny_teacher):
    token_ids = dict(zip(*latents.read(["id", "token_ids"]).to_pydict().values(), strict=True))
    empty = load(tiny_teacher).tokenize([""])[0].numpy().astype("<i4").tobytes()
    dropped = 0
    for row in targets.read(["id", "token_ids", "noise_key", "w"]).to_pylist():
        drop = row["w"] is None and bool(draw_caption_dropout([row["noise_key"]], fraction=0.3)[0])
        assert row["token_ids"] == (empty if drop else token_ids[parent_id(row)])
        dropped += drop
    assert 0 < dropped < 18


@pytest.mark.parametrize("guided", [False, True])
def test_target_leads_where_the_teacher_lands(exact, tiny_teacher, guided):
    bundle, schedule = load(tiny_teacher), load(tiny_teacher).schedule
    for batch in batch_of(exact.read_unit(unit_of(exact, guided=guided))).split(1):
        t, t2 = batch["t"].long(), batch["t2"].long()
        [middle] = set(time_grid(8)) & set(range(int(t2) + 1, int(t)))
        eps = gaussian_batch(batch["noise_key"].tolist(), bundle.latent_shape)
        z_t = schedule.diffuse(x=batch["latent"], eps=eps, t=t)
        w = batch["w"].view(-1, 1, 1, 1) if guided else 1.0
        denoiser = bundle.denoiser(bundle.encode_text(batch["token_ids"]), w=w)
        between = torch.tensor([middle])
        with torch.inference_mode():
            z_t1 = ddim_step(denoiser(z_t, t), t_next=between, schedule=schedule)
            z_t2 = ddim_step(denoiser(z_t1, between), t_next=t2, schedule=schedule)
        x = batch["x_target"]
        eps_hat = (z_t - schedule.alpha(t) * x) / schedule.sigma(t)
        landed = ddim_step(Estimate(x=x, eps=eps_hat), t_next=t2, schedule=schedule)
        # Another batch size than the table's: the networks' sums differ in their last bits.
        torch.testing.assert_close(landed, z_t2, rtol=1e-4, atol=1e-4)


def test_float16_targets_are_rounded_float32(targets, exact):
    for rounded, full in zip(targets.units, exact.units, strict=True):
        one = read_array(targets.read_unit(rounded), "x_target")
        other = read_array(exact.read_unit(full), "x_target")
        assert (one.dtype, other.dtype) == (np.float16, np.float32)
        np.testing.assert_array_equal(one, other.astype(np.float16))


def test_bfloat16_network_is_part_of_identity(exact, latents, tiny_teacher, tmp_path):
    settings = SETTINGS.with_values(["teaching.x_dtype=float32", "device.dtype=bfloat16"])
    half = compute(tmp_path / "targets", tiny_teacher, latents, settings=settings)
    assert half.identity["dtype"] == "bfloat16"
    one, other = (read_array(table.read(), "x_target") for table in (half, exact))
    assert not np.array_equal(one, other)
    # Eq. 9's arithmetic stays float32: what differs is the network's own rounding, 2^-9, times 15 at t = 999.
    assert np.abs(one - other).max() < 0.02 * np.abs(other).max()
    with pytest.raises(TableError, match='dtype is "float32" there, "bfloat16" here'):
        compute(exact.url, tiny_teacher, latents, settings=settings)


def test_stopped_run_is_completed(targets, latents, tiny_teacher, tmp_path):
    url = tmp_path / "targets"
    assert len(compute(url, tiny_teacher, latents, run=first_units(3)).units) == 3
    whole = compute(url, tiny_teacher, latents)
    assert data_files(url) == data_files(targets.url)
    assert compute(url, tiny_teacher, latents).version == whole.version


@pytest.mark.parametrize(
    "point", ["file_to_commit", pytest.param("rows_to_manifests", marks=pytest.mark.slow)]
)
def test_killed_run_is_completed(targets, latents, tiny_teacher, tmp_path, point):
    url = tmp_path / "targets"
    script = Path(__file__).with_name("compute_killed.py")
    command = [sys.executable, str(script), tiny_teacher, latents.url, str(url), point]
    killed = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert 0 < len(open_table(str(url)).units) < len(targets.units)
    whole = compute(url, tiny_teacher, latents)
    assert data_files(url) == data_files(targets.url)
    assert whole.num_rows == targets.num_rows
    assert set(whole.manifests()) == {file.unit for file in targets.units}


@pytest.mark.ray
def test_ray_writes_equal_bytes_though_a_teacher_dies(ray_cluster, targets, latents, tiny_teacher, tmp_path):
    def run(items, stages):
        reader, teacher, writer = stages
        arguments = {**teacher.arguments, "mark": str(tmp_path / "mark")}
        # Bytes do not depend on the number of teachers, which may change while they work.
        pool = Pool(actors=1, max_actors=2)
        dying = replace(teacher, build=DyingTeacher, arguments=arguments, pool=pool)
        return run_on_ray(items, [reader, dying, writer])

    by_ray = compute(tmp_path / "targets", tiny_teacher, latents, run=run)
    assert (tmp_path / "mark").exists()
    assert data_files(by_ray.url) == data_files(targets.url)


@pytest.mark.parametrize("more", ["draws", "latents"])
def test_more_inputs_add_units_and_change_none(targets, latents, tiny_teacher, tmp_path, more):
    url = copy_table(targets, tmp_path / "targets")
    before, settings = data_files(url), SETTINGS
    if more == "draws":
        settings = SETTINGS.with_values(["draws=3"])
    else:
        folder = make_shards(tmp_path / "shards", shards=3)
        latents = encode(copy_table(latents, tmp_path / "latents"), folder, tiny_teacher)
    assert compute(url, tiny_teacher, latents, settings=settings).num_rows == 54
    assert data_files(url).items() >= before.items()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 1.0])
def test_fraction_of_guided_draws_is_the_probability(p):
    settings = SETTINGS.with_values([f"cfg_probability={p}"])
    for draws in (1, 4, 10):
        counts = [
            sum(is_guided_draw(settings, parent=f"web-{n:05d}", draw=draw) for draw in range(draws))
            for n in range(400)
        ]
        assert set(counts) <= {int(p * draws), int(p * draws + 1)}
        assert abs(sum(counts) / (400 * draws) - p) < 0.06 / draws


def test_changed_latents_file_is_refused(targets, latents):
    unit = next(iter(latents.manifests()))
    changed = SimpleNamespace(
        units=[file for file in latents.units if file.unit == unit],
        unit_records=lambda: [SimpleNamespace(unit=unit, sha256="0" * 64)],
    )
    with pytest.raises(TableError, match="was made from another file than"):
        list(pending_units(SETTINGS, targets.manifests().values(), latents=changed))


def test_forged_latents_file_is_refused(latents, tmp_path):
    [item, *_] = pending_units(SETTINGS, [], latents=latents)
    forged = tmp_path / "forged.parquet"
    forged.write_bytes(Path(item.path).read_bytes() + b" ")
    with pytest.raises(TableError, match="not the file that was committed"):
        ReadLatents()(replace(item, path=str(forged)))


def test_targets_that_are_not_finite_are_rejected(latents, tiny_teacher, tmp_path, monkeypatch):
    def poisoned(denoiser, z_t, **_):
        x = torch.zeros_like(z_t)
        x[0, 0, 0, 0] = 1e6  # finite, and beyond float16
        return x

    monkeypatch.setattr("snapfusion.training.distillation_batch.teacher_target", poisoned)
    table = compute(tmp_path / "targets", tiny_teacher, latents)
    assert table.num_rows == 36 - len(table.rejected_rows())
    assert {row["reason"] for row in table.rejected_rows()} == {"not_finite"}
    for manifest in table.manifests().values():
        assert manifest.rows_read == manifest.rows_written + len(manifest.rejections)


def test_crashed_unit_rejects_all_its_rows(latents):
    [item, *_] = pending_units(SETTINGS, [], latents=latents)
    finished = ReadLatents()(item).reject_all(["id", "latent"])
    assert [rejection.reason for rejection in finished.rejections] == ["crashed"] * item.unit.rows_read
    assert finished.columns == {"id": [], "latent": []}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("teaching.student_steps=8", r"teaching\.student_steps is 4 there, 8 here"),
        ("teaching.k=4", r"teaching\.k is 2 there, 4 here"),
        ("teaching.cfg_range.high=7.0", r"teaching\.cfg_range\.high is 6\.0 there, 7\.0 here"),
        ("teaching.seed=8", r"teaching\.seed is 7 there, 8 here"),
        ("cfg_probability=0.1", r"cfg_probability is 0\.5 there, 0\.1 here"),
    ],
)
def test_other_settings_are_refused(targets, latents, tiny_teacher, change, difference):
    with pytest.raises(TableError, match=difference):
        compute(targets.url, tiny_teacher, latents, settings=SETTINGS.with_values([change]))


def other_teacher(folder: Path, **changed) -> str:
    """The tiny bundle with another UNet, and with these attributes."""
    bundle = tiny_bundle()
    bundle.unet = tiny_bundle(seed=1).unet
    for name, value in changed.items():
        setattr(bundle, name, value)
    save(bundle, folder)
    return str(folder)


def test_other_unet_needs_other_targets_and_not_latents(targets, latents, tmp_path):
    other = other_teacher(tmp_path / "other")
    with pytest.raises(TableError, match=r"model\.weights\.unet is"):
        compute(targets.url, other, latents)
    assert compute(tmp_path / "targets", other, latents).num_rows == 36


@pytest.mark.parametrize(
    ("part", "difference"), [("vae", r"VAE than that of .*: weights\.vae is"), ("tokenizer", "tokenizer")]
)
def test_latents_of_another_vae_or_tokenizer_are_refused(latents, tmp_path, part, difference):
    bundle = tiny_bundle(seed=3)
    bundle.tokenizer.pad_token = bundle.tokenizer.bos_token
    other = other_teacher(tmp_path / "other", **{part: getattr(bundle, part)})
    with pytest.raises(TableError, match=f"another {difference}"):
        compute(tmp_path / "targets", other, latents)


def test_grid_finer_than_the_schedule_is_refused():
    with pytest.raises(SettingsError, match=r"k 2 times student_steps 600 .* 1000"):
        SETTINGS.with_values(["teaching.student_steps=600"])


def test_units_are_recomputed_bit_for_bit(targets, latents, tiny_teacher):
    found = verify(targets, recomputer(targets, teacher=tiny_teacher, latents=latents))
    assert found.faults == ()
    assert found.recomputed == found.exact == found.units == len(targets.units)


@pytest.mark.parametrize(("factor", "sound"), [(1.01, True), (1.1, False)])
def test_tolerance_in_other_environments_is_relative(exact, latents, tiny_teacher, factor, sound):
    recompute = recomputer(exact, teacher=tiny_teacher, latents=latents)

    def elsewhere(manifest, rows):
        again, environment = recompute(manifest, rows)
        kind = array_type(again.schema.field("x_target"))
        values = kind.pack(read_array(again, "x_target") * np.float32(factor))
        return with_column(again, "x_target", values), {**environment, "torch": "other"}

    found = verify(exact, elsewhere, units=1)
    assert (found.recomputed, found.exact, found.faults == ()) == (1, 0, sound)


@pytest.mark.parametrize("column", ["x_target", "latent", "noise_key", "w", "t2"])
def test_forged_row_is_found(targets, latents, tiny_teacher, tmp_path, column):
    table = open_table(str(copy_table(targets, tmp_path / "targets")))
    file = unit_of(table, guided=True)
    forge(Path(file.path), column=column, values=[999] * file.rows if column == "t2" else None)
    found = verify(table, recomputer(table, teacher=tiny_teacher, latents=latents))
    assert any(f"column {column}" in fault for fault in found.faults)


def test_recomputing_needs_the_teacher_and_latents(targets, latents, tiny_teacher, tmp_path):
    with pytest.raises(TableError, match="another teacher"):
        recomputer(targets, teacher=other_teacher(tmp_path / "other"), latents=latents)
    other = SimpleNamespace(url=latents.url, identity={**latents.identity, "rows_per_unit": 5})
    with pytest.raises(TableError, match=r"latents\.rows_per_unit is 4 there, 5 here"):
        recomputer(targets, teacher=tiny_teacher, latents=other)


def check(table, *, teacher=None, student=None, **steps):
    model, steps = table.identity["model"], STEPS.model_copy(update=steps)
    check_targets(table, teacher=teacher or model, student=student or model, steps=steps)


def test_fitting_targets_are_accepted(targets):
    check(targets)
    student = {**targets.identity["model"], "prediction_type": "v_prediction"}
    student["weights"] = {**student["weights"], "unet": "another"}
    check(targets, student=student, cfg_probability=0.1)
    check(targets, cfg_range=CfgRange(low=2.0, high=3.0), cfg_probability=0.0)
    check(targets, caption_dropout=0.1, cfg_probability=1.0)


def changed(identity, path: str, value) -> dict:
    first, _, rest = path.partition(".")
    return {**identity, first: changed(identity[first], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("model", "path", "value", "difference"),
    [
        ("teacher", "weights.unet", "abc", r"teacher\.weights\.unet is .* there, \"abc\" here"),
        ("teacher", "prediction_type", "v_prediction", r'teacher\.prediction_type is "epsilon" there'),
        ("teacher", "scaling_factor", 0.5, r"teacher\.scaling_factor is 0\.4 there, 0\.5 here"),
        ("student", "scaling_factor", 0.5, r"student\.scaling_factor is 0\.4 there, 0\.5 here"),
        ("student", "weights.text_encoder", "abc", r"student\.weights\.text_encoder is"),
        ("student", "schedule.beta_end", 0.02, r"student\.schedule\.beta_end is 0\.012 there, 0\.02 here"),
    ],
)
def test_other_model_does_not_fit(targets, model, path, value, difference):
    with pytest.raises(TableError, match=difference):
        check(targets, **{model: changed(targets.identity["model"], path, value)})


@pytest.mark.parametrize(
    ("steps", "difference"),
    [
        ({"student_steps": 8}, "student_steps is 4 there, 8 here"),
        ({"k": 4}, "k is 2 there, 4 here"),
        ({"caption_dropout": 0.1}, r"caption_dropout is 0\.3 there, 0\.1 here"),
        ({"cfg_range": CfgRange(low=2.0, high=6.0)}, r"cfg_range\.low is 1\.0 there, 2\.0 here"),
    ],
)
def test_other_steps_do_not_fit(targets, steps, difference):
    with pytest.raises(TableError, match=difference):
        check(targets, **steps)


def test_branch_without_rows_does_not_fit(latents, tiny_teacher, tmp_path):
    settings = SETTINGS.with_values(["cfg_probability=0.0", "draws=1"])
    vanilla = compute(tmp_path / "vanilla", tiny_teacher, latents, settings=settings)
    check(vanilla, cfg_probability=0.0)
    with pytest.raises(TableError, match=r"no guided rows, and a CFG probability of 0\.1"):
        check(vanilla, cfg_probability=0.1)
    with pytest.raises(TableError, match="holds latents"):
        check(latents)
