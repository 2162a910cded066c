"""TARGETS: what the teacher says of a latent follows from latent, draw and settings; it can be made again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_bundle
from in_process import in_process
from target_inputs import SETTINGS, DyingTeacher
from test_latents import encode, make_shards
from test_pairs import data_files

from pipelines.datasets.targets import (
    check_targets,
    compute_targets,
    is_guided_draw,
    pending_units,
    recomputer,
    set_aside,
)
from pipelines.loading.branches import branch_and_draw, unit_name
from pipelines.loading.loader import to_batch
from pipelines.ray_data.execution import run_on_ray
from pipelines.stages.latents import ReadLatents
from pipelines.tables.manifest import read_manifest, to_parquet
from pipelines.tables.schemas import array_type
from pipelines.tables.table import TableError, open_table
from pipelines.tables.verification import verify_table
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.noise import gaussian_batch
from snapfusion.sampling import Denoiser, time_grid
from snapfusion.schedule import Estimate
from snapfusion.settings import SettingsError
from snapfusion.solvers import ddim_step
from snapfusion.training.captions import CaptionEncoder, draw_caption_dropout
from snapfusion.training.distillation_batch import OnlineTargets, StoredTargets
from snapfusion.training.draws import draw_guidance, draw_intervals, row_key
from snapfusion.training.settings import CfgRange, StepDistillationSettings, TargetSettings


def compute(url: Path, teacher: str, latents, *, settings=SETTINGS, run=in_process):
    return compute_targets(settings, teacher=teacher, latents=latents, url=str(url), run=run)


def copy_of(table, url: Path) -> Path:
    for ending in ("", ".rejects", ".units"):
        shutil.copytree(f"{table.url}{ending}", f"{url}{ending}")
    return url


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


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


def denoiser_of(bundle, batch) -> Denoiser:
    w = batch["w"].view(-1, 1, 1, 1) if "w" in batch.columns else 1.0
    return bundle.denoiser(bundle.encode_text(batch["token_ids"]), w=w)


def columns_of(rows) -> list[str]:
    """Those that are not null, which is how a vanilla row says so."""
    return [name for name in rows.schema.names if name != "source_id" and not rows[name].null_count]


def test_every_latent_has_every_draw_and_both_branches(targets, latents):
    rows = targets.read(["id", "draw", "source_id", "w"]).to_pylist()
    assert len(rows) == 2 * latents.num_rows == 36
    by_latent = Counter(row["id"].rpartition("#")[0] for row in rows)
    assert set(by_latent.values()) == {2}
    assert set(by_latent) == set(latents.read(["id"])["id"].to_pylist())
    guided = [row["id"].rpartition("#")[0] for row in rows if row["w"] is not None]
    assert sorted(guided) == sorted(by_latent)
    origins = dict(zip(*latents.read(["id", "source_id"]).to_pydict().values(), strict=True))
    assert all(row["source_id"] == origins[row["id"].rpartition("#")[0]] for row in rows)


def test_a_unit_is_of_one_branch_and_its_name_says_which(targets):
    for file in targets.units:
        guided, draw = branch_and_draw(file.unit)
        rows = targets.read_unit(file, ["w", "draw"])
        assert rows["w"].null_count == (0 if guided else rows.num_rows)
        assert set(rows["draw"].to_pylist()) == {draw}


def test_what_was_drawn_follows_from_the_key_alone(targets):
    times = time_grid(4)
    rows = targets.read().to_pylist()
    for row in rows:
        latent_id, _, draw = row["id"].rpartition("#")
        key = row["noise_key"]
        assert key == row_key(7, latent_id, int(draw))
        [interval] = draw_intervals([key], student_steps=4).tolist()
        assert (row["interval"], row["t"], row["t2"], row["k"]) == (
            interval,
            times[interval],
            times[interval + 1],
            2,
        )
        if row["w"] is not None:
            assert row["w"] == draw_guidance([key], cfg_range=CfgRange(low=1.0, high=6.0)).item()
    assert {row["interval"] for row in rows} == {0, 1, 2, 3}


def online_lessons(teacher: str) -> OnlineTargets:
    bundle = load(teacher)
    return OnlineTargets(
        bundle,
        captions=CaptionEncoder(bundle),
        settings=TargetSettings(
            student_steps=4, k=2, cfg_range=CfgRange(low=1.0, high=6.0), caption_dropout=0.3
        ),
        seed=7,
    )


@pytest.mark.parametrize("guided", [False, True])
def test_a_lesson_from_the_table_is_the_one_taught_online_after_the_cast(
    targets, latents, tiny_teacher, guided
):
    bundle, online = load(tiny_teacher), online_lessons(tiny_teacher)
    stored = StoredTargets(captions=CaptionEncoder(bundle), schedule=bundle.schedule)
    for parent in latents.units:
        draw = next(
            draw for draw in (0, 1) if is_guided_draw(SETTINGS, parent=parent.unit, draw=draw) == guided
        )
        [file] = [
            file for file in targets.units if file.unit == unit_name(parent.unit, draw=draw, guided=guided)
        ]
        rows = targets.read_unit(file)
        mine = to_batch(rows.select(columns_of(rows))).split(3)
        theirs = to_batch(latents.read_unit(parent, ["id", "latent", "token_ids"])).split(3)
        for one, other in zip(mine, theirs, strict=True):
            read = stored(one, guided=guided, step=0)
            taught = online.compute(other, [row_key(7, row_id, draw) for row_id in other.ids], guided=guided)
            assert torch.equal(read.x_target, taught.x_target.half().float())
            for name in ("x", "eps", "z_t", "interval", "t"):
                assert torch.equal(getattr(read, name), getattr(taught, name)), name
            assert (read.w is None) == (taught.w is None) == (not guided)
            assert not guided or torch.equal(read.w, taught.w)
            # A dropped caption is encoded among others here, and alone there.
            torch.testing.assert_close(read.c, taught.c, rtol=0, atol=1e-6)


def test_captions_are_dropped_in_vanilla_rows_alone_and_by_their_key(targets, latents, tiny_teacher):
    told = dict(zip(*latents.read(["id", "token_ids"]).to_pydict().values(), strict=True))
    empty = load(tiny_teacher).tokenize([""])[0].numpy().astype("<i4").tobytes()
    dropped = 0
    for row in targets.read(["id", "token_ids", "noise_key", "w"]).to_pylist():
        caption = told[row["id"].rpartition("#")[0]]
        drop = row["w"] is None and bool(draw_caption_dropout([row["noise_key"]], fraction=0.3)[0])
        assert row["token_ids"] == (empty if drop else caption)
        dropped += drop
    assert 0 < dropped < 18


@pytest.mark.parametrize("guided", [False, True])
def test_a_student_that_hits_the_target_lands_where_the_teacher_lands(exact, tiny_teacher, guided):
    rows = exact.read_unit(unit_of(exact, guided=guided))
    bundle, schedule = load(tiny_teacher), load(tiny_teacher).schedule
    for batch in to_batch(rows.select(columns_of(rows))).split(1):
        t, t2 = batch["t"].long(), batch["t2"].long()
        [middle] = set(time_grid(8)) & set(range(int(t2) + 1, int(t)))
        eps = gaussian_batch(batch["noise_key"].tolist(), bundle.latent_shape)
        z_t = schedule.diffuse(x=batch["latent"], eps=eps, t=t)
        denoiser, between = denoiser_of(bundle, batch), torch.tensor([middle])
        with torch.inference_mode():
            z_t1 = ddim_step(denoiser(z_t, t), t_next=between, schedule=schedule)
            z_t2 = ddim_step(denoiser(z_t1, between), t_next=t2, schedule=schedule)
        x = batch["x_target"]
        eps_hat = (z_t - schedule.alpha(t) * x) / schedule.sigma(t)
        landed = ddim_step(Estimate(x=x, eps=eps_hat), t_next=t2, schedule=schedule)
        # Another batch size than the table's: the networks' sums differ in their last bits.
        torch.testing.assert_close(landed, z_t2, rtol=1e-4, atol=1e-4)


def test_float16_holds_the_target_to_its_rounding(targets, exact):
    for rough, fine in zip(targets.units, exact.units, strict=True):
        one, other = (
            array_type(rows.schema.field("x_target")).unpack(rows["x_target"].to_pylist())
            for rows in (targets.read_unit(rough), exact.read_unit(fine))
        )
        assert (one.dtype, other.dtype) == (np.float16, np.float32)
        np.testing.assert_array_equal(one, other.astype(np.float16))


def test_a_network_may_compute_in_half_the_bits_and_the_table_says_so(exact, latents, tiny_teacher, tmp_path):
    settings = SETTINGS.with_values(["teaching.x_dtype=float32", "device.dtype=bfloat16"])
    half = compute(tmp_path / "targets", tiny_teacher, latents, settings=settings)
    assert half.identity["dtype"] == "bfloat16"
    one, other = (
        array_type(table.read().schema.field("x_target")).unpack(table.read()["x_target"].to_pylist())
        for table in (half, exact)
    )
    assert not np.array_equal(one, other)
    # Eq. 9's arithmetic stays float32: what differs is the network's own rounding, 2^-9, times 15 at t = 999.
    assert np.abs(one - other).max() < 0.02 * np.abs(other).max()
    with pytest.raises(TableError, match='dtype is "float32" there, "bfloat16" here'):
        compute(Path(exact.url), tiny_teacher, latents, settings=settings)


def test_two_runs_write_the_same_bytes(targets, latents, tiny_teacher, tmp_path):
    again = compute(tmp_path / "targets", tiny_teacher, latents)
    assert data_files(Path(again.url)) == data_files(Path(targets.url))


def test_a_run_that_was_stopped_is_gone_on_with_and_a_finished_one_does_nothing(
    targets, latents, tiny_teacher, tmp_path
):
    url = tmp_path / "targets"

    def three_units_only(items, stages):
        for number, written in enumerate(in_process(items, stages)):
            if number == 3:
                return
            yield written

    assert len(compute(url, tiny_teacher, latents, run=three_units_only).units) == 3
    whole = compute(url, tiny_teacher, latents)
    assert data_files(url) == data_files(Path(targets.url))
    assert compute(url, tiny_teacher, latents).version == whole.version


@pytest.mark.parametrize("point", ["file_to_commit", "rows_to_accounts"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(targets, latents, tiny_teacher, tmp_path, point):
    url = tmp_path / "targets"
    script = Path(__file__).with_name("compute_killed.py")
    command = [sys.executable, str(script), tiny_teacher, latents.url, str(url), point]
    killed = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert 0 < len(open_table(str(url)).units) < len(targets.units)
    whole = compute(url, tiny_teacher, latents)
    assert data_files(url) == data_files(Path(targets.url))
    assert whole.num_rows == targets.num_rows
    assert set(whole.manifests()) == {file.unit for file in targets.units}


@pytest.mark.ray
def test_ray_writes_the_bytes_that_one_process_writes_though_a_teacher_is_killed(
    ray_cluster, targets, latents, tiny_teacher, tmp_path
):
    def run(items, stages):
        reader, teacher, writer = stages
        arguments = {**teacher.arguments, "mark": str(tmp_path / "mark")}
        return run_on_ray(items, [reader, replace(teacher, build=DyingTeacher, arguments=arguments), writer])

    by_ray = compute(tmp_path / "targets", tiny_teacher, latents, run=run)
    assert (tmp_path / "mark").exists()
    assert data_files(Path(by_ray.url)) == data_files(Path(targets.url))


def test_more_draws_add_units_and_change_none(targets, latents, tiny_teacher, tmp_path):
    url = copy_of(targets, tmp_path / "targets")
    before = data_files(url)
    more = compute(url, tiny_teacher, latents, settings=SETTINGS.with_values(["draws=3"]))
    assert more.num_rows == 54
    assert {name: data_files(url)[name] for name in before} == before


def test_more_latents_add_units_and_change_none(targets, latents, tiny_teacher, tmp_path):
    make_shards(tmp_path / "shards", shards=3)
    grown = encode(copy_of(latents, tmp_path / "latents"), tmp_path / "shards", tiny_teacher)
    url = copy_of(targets, tmp_path / "targets")
    before = data_files(url)
    more = compute(url, tiny_teacher, grown)
    assert more.num_rows == 54
    assert {name: data_files(url)[name] for name in before} == before


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 1.0])
def test_the_guided_draws_are_as_many_as_the_probability_asks(p):
    settings = SETTINGS.with_values([f"cfg_probability={p}"])
    for draws in (1, 4, 10):
        counts = [
            sum(is_guided_draw(settings, parent=f"web-{n:05d}", draw=draw) for draw in range(draws))
            for n in range(400)
        ]
        assert set(counts) <= {int(p * draws), int(p * draws + 1)}
        assert abs(sum(counts) / (400 * draws) - p) < 0.06 / draws


def test_latents_that_changed_under_a_committed_unit_are_refused(targets, latents, shards, tiny_teacher):
    unit = next(iter(latents.manifests()))

    other = SimpleNamespace(url=latents.url, units=[file for file in latents.units if file.unit == unit])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipelines.datasets.targets.unit_records", lambda _: [{"unit": unit, "sha256": "0" * 64}]
        )
        with pytest.raises(TableError, match="was made from another file than"):
            list(pending_units(SETTINGS, latents=other, accounts=targets.manifests().values()))


def test_a_latents_file_that_is_not_the_committed_one_is_refused(latents, tmp_path):
    [item, *_] = pending_units(SETTINGS, latents=latents, accounts=[])
    forged = tmp_path / "forged.parquet"
    forged.write_bytes(Path(item.path).read_bytes() + b" ")
    with pytest.raises(TableError, match="not the file that was committed"):
        ReadLatents()(type(item)(unit=item.unit, draw=0, guided=False, path=str(forged)))


def test_not_finite_targets_are_set_aside(latents, tiny_teacher, tmp_path, monkeypatch):
    def poisoned(denoiser, z_t, **_):
        x = torch.zeros_like(z_t)
        x[0, 0, 0, 0] = 1e6  # finite, and beyond float16
        return x

    monkeypatch.setattr("snapfusion.training.distillation_batch.teacher_target", poisoned)
    table = compute(tmp_path / "targets", tiny_teacher, latents)
    assert table.num_rows == 36 - len(table.rejected_rows())
    assert {row["reason"] for row in table.rejected_rows()} == {"not_finite"}
    for account in table.manifests().values():
        assert account.rows_read == account.rows_written + len(account.rejections)


def test_a_unit_that_is_given_up_loses_no_row_from_the_account(latents):
    [item, *_] = pending_units(SETTINGS, latents=latents, accounts=[])
    finished = set_aside(ReadLatents()(item))
    assert [rejection.reason for rejection in finished.rejections] == ["crashed"] * item.unit.rows_read
    assert all(values == [] for values in finished.columns.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("teaching.student_steps=8", r"teaching\.student_steps is 4 there, 8 here"),
        ("teaching.k=4", r"teaching\.k is 2 there, 4 here"),
        ("teaching.cfg_range.high=7.0", r"teaching\.cfg_range\.high is 6\.0 there, 7\.0 here"),
        ("teaching.seed=8", r"teaching\.seed is 7 there, 8 here"),
        ("cfg_probability=0.1", r"cfg_probability is 0\.5 there, 0\.1 here"),
    ],
)
def test_other_settings_are_refused_by_name(targets, latents, tiny_teacher, change, said):
    with pytest.raises(TableError, match=f"made with other settings: {said}; give a new table"):
        compute(Path(targets.url), tiny_teacher, latents, settings=SETTINGS.with_values([change]))


def other_teacher(folder: Path, **changed) -> str:
    """The tiny bundle with another UNet, or with what is given."""
    bundle = tiny_bundle()
    bundle.unet = tiny_bundle(seed=1).unet
    for name, value in changed.items():
        setattr(bundle, name, value)
    save(bundle, folder)
    return str(folder)


def test_another_unet_is_refused_by_name_and_its_latents_are_not(targets, latents, tmp_path):
    other = other_teacher(tmp_path / "other")
    with pytest.raises(TableError, match=r"made with other settings: model\.weights\.unet is"):
        compute(Path(targets.url), other, latents)
    assert compute(tmp_path / "targets", other, latents).num_rows == 36


def test_latents_of_another_vae_are_refused_by_name(latents, tmp_path):
    other = other_teacher(tmp_path / "other", vae=tiny_bundle(seed=3).vae)
    with pytest.raises(TableError, match=r"another VAE than that of .*: weights\.vae is"):
        compute(tmp_path / "targets", other, latents)


def test_latents_of_another_tokenizer_are_refused(latents, tmp_path):
    bundle = tiny_bundle()
    bundle.tokenizer.pad_token = bundle.tokenizer.bos_token
    other = other_teacher(tmp_path / "other", tokenizer=bundle.tokenizer)
    with pytest.raises(TableError, match="token ids of another tokenizer"):
        compute(tmp_path / "targets", other, latents)


def test_a_grid_finer_than_the_schedule_is_refused(latents, tiny_teacher, tmp_path):
    settings = SETTINGS.with_values(["teaching.student_steps=600"])
    with pytest.raises(SettingsError, match=r"k 2 times student_steps 600 is more than the schedule's 1000"):
        compute(tmp_path / "targets", tiny_teacher, latents, settings=settings)


def verify(url: str, teacher: str, latents, *, units: int = 99):
    table = open_table(url)
    return verify_table(
        table, recompute=recomputer(table, teacher=teacher, latents=latents), units=units, seed=0
    )


def test_a_sound_table_is_made_again_bit_for_bit(targets, latents, tiny_teacher):
    found = verify(targets.url, tiny_teacher, latents)
    assert found.faults == ()
    assert found.recomputed == found.exact == found.units == len(targets.units)


@pytest.mark.parametrize(("factor", "sound"), [(1.01, True), (1.1, False)])
def test_another_environment_may_differ_in_proportion_to_the_value(
    exact, latents, tiny_teacher, factor, sound
):
    make = recomputer(exact, teacher=tiny_teacher, latents=latents)

    def elsewhere(account, rows):
        again, environment = make(account, rows)
        place = again.schema.get_field_index("x_target")
        kind = array_type(again.schema.field(place))
        values = kind.pack(kind.unpack(again["x_target"].to_pylist()) * np.float32(factor))
        column = pa.array(values, again.schema.field(place).type)
        return again.set_column(place, again.schema.field(place), column), {**environment, "torch": "other"}

    found = verify_table(exact, recompute=elsewhere, units=1, seed=0)
    assert (found.recomputed, found.exact, found.faults == ()) == (1, 0, sound)


@pytest.mark.parametrize("column", ["x_target", "latent", "noise_key", "w", "t2"])
def test_a_forged_row_is_found(targets, latents, tiny_teacher, tmp_path, column):
    url = copy_of(targets, tmp_path / "targets")
    path = Path(unit_of(open_table(str(url)), guided=True).path)
    account, rows = read_manifest(path.read_bytes()), pq.read_table(path)
    values = rows[column].to_pylist()
    values[:2] = reversed(values[:2])
    if column == "t2":
        values = [999] * len(values)
    place = rows.schema.get_field_index(column)
    field = rows.schema.field(place)
    path.write_bytes(to_parquet(rows.set_column(place, field, pa.array(values, field.type)), account))
    faults = verify(str(url), tiny_teacher, latents).faults
    assert any(f"column {column} is not what its keys give" in fault for fault in faults)


def test_verification_wants_the_teacher_and_the_latents(targets, latents, tiny_teacher, shards, tmp_path):
    with pytest.raises(TableError, match="another teacher"):
        verify(targets.url, other_teacher(tmp_path / "other"), latents)
    other = SimpleNamespace(url=latents.url, identity={**latents.identity, "rows_per_unit": 5})
    with pytest.raises(TableError, match=r"other LATENTS than .*: latents\.rows_per_unit is 4 there, 5 here"):
        recomputer(targets, teacher=tiny_teacher, latents=other)


STEPS = StepDistillationSettings(
    student_steps=4, k=2, cfg_range=CfgRange(low=1.0, high=6.0), cfg_probability=0.5, caption_dropout=0.3
)


def fit(table, *, teacher=None, student=None, **changed):
    model = table.identity["model"]
    steps = STEPS.model_copy(update=changed)
    check_targets(table, teacher=teacher or model, student=student or model, steps=steps)


def test_a_table_that_fits_is_accepted(targets):
    fit(targets)
    student = {**targets.identity["model"], "prediction_type": "v_prediction"}
    student["weights"] = {**student["weights"], "unet": "another"}
    fit(targets, student=student, cfg_probability=0.1)
    fit(targets, cfg_range=CfgRange(low=2.0, high=3.0), cfg_probability=0.0)
    fit(targets, caption_dropout=0.1, cfg_probability=1.0)


def changed(described, path: str, value) -> dict:
    first, _, rest = path.partition(".")
    return {**described, first: changed(described[first], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("whose", "path", "value", "said"),
    [
        ("teacher", "weights.unet", "abc", r"teacher\.weights\.unet is .* there, \"abc\" here"),
        ("teacher", "prediction_type", "v_prediction", r'teacher\.prediction_type is "epsilon" there'),
        ("teacher", "scaling_factor", 0.5, r"teacher\.scaling_factor is 0\.4 there, 0\.5 here"),
        ("student", "scaling_factor", 0.5, r"student\.scaling_factor is 0\.4 there, 0\.5 here"),
        ("student", "weights.text_encoder", "abc", r"student\.weights\.text_encoder is"),
        ("student", "schedule.beta_end", 0.02, r"student\.schedule\.beta_end is 0\.012 there, 0\.02 here"),
    ],
)
def test_another_teacher_or_student_does_not_fit(targets, whose, path, value, said):
    with pytest.raises(TableError, match=f"does not fit this training: {said}"):
        fit(targets, **{whose: changed(targets.identity["model"], path, value)})


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"student_steps": 8}, "student_steps is 4 there, 8 here"),
        ({"k": 4}, "k is 2 there, 4 here"),
        ({"caption_dropout": 0.1}, r"caption_dropout is 0\.3 there, 0\.1 here"),
        ({"cfg_range": CfgRange(low=2.0, high=6.0)}, r"cfg_range\.low is 1\.0 there, 2\.0 here"),
    ],
)
def test_another_grid_or_range_does_not_fit(targets, wanted, said):
    with pytest.raises(TableError, match=f"does not fit this training: {said}"):
        fit(targets, **wanted)


def test_a_branch_without_rows_does_not_fit(latents, tiny_teacher, tmp_path):
    vanilla = compute(
        tmp_path / "vanilla",
        tiny_teacher,
        latents,
        settings=SETTINGS.with_values(["cfg_probability=0.0", "draws=1"]),
    )
    fit(vanilla, cfg_probability=0.0)
    with pytest.raises(TableError, match=r"has no guided rows, and a CFG probability of 0\.1 needs some"):
        fit(vanilla, cfg_probability=0.1)
    with pytest.raises(TableError, match="holds latents; targets are needed"):
        fit(latents)
