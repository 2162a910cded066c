"""Tests of the decoder distillation from end to end, with a tiny teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_bundle
from in_process import in_process
from student_inputs import first_batch, inputs_of

from jobs.training.decoder import assemble, distill_decoder, summary
from jobs.training.settings import DecoderSettings, TrainerSettings
from jobs.training.spec import TrainingError
from pipelines.datasets.pairs import generate_pairs
from pipelines.datasets.settings import PairsSettings
from pipelines.loading.loader import count_trainable
from pipelines.loading.settings import LoaderSettings
from pipelines.sources.captions import Caption
from pipelines.stages.settings import Generation
from pipelines.tables.table import TableError
from snapfusion.models.decoder import load_decoder
from snapfusion.models.save import save
from snapfusion.training.settings import LoopSettings

SETTINGS = DecoderSettings(
    loop=LoopSettings(num_steps=6, global_batch=4, learning_rate=1e-3, ema_decay=0.9),
    loader=LoaderSettings(held_out=0.3),
    timing_batches=(1, 3),
    timing_repeats=2,
    trainer=TrainerSettings(cpus_per_worker=0.5, checkpoint_every=3, curve_every=2),
)


def changed(**changes):
    return SETTINGS.model_copy(update=changes)


def make_pairs(url, teacher, *, images=True, draws=1):
    captions = [Caption(id=f"c{number}", ordinal=number, text="a red thing") for number in range(16)]
    generation = Generation(steps=1, guidance=1.0, batch_size=8, images=images)
    settings = PairsSettings(generation=generation, draws=draws, rows_per_unit=8)
    return generate_pairs(
        settings, teacher=teacher, captions=captions, source="list", url=str(url), run=in_process
    )


def distill(pairs, folder, settings=SETTINGS, *, teacher):
    return distill_decoder(settings, pairs_url=pairs.url, out_url=str(folder / "decoder"), teacher=teacher)


@pytest.fixture(scope="module")
def pairs(tiny_teacher, tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("run") / "pairs", tiny_teacher)


@pytest.fixture(scope="module")
def made(local_training, pairs, tiny_teacher):
    """The folder, the metrics and the progress reports of a distilled decoder."""
    reports, out = [], Path(pairs.url).with_name("decoder")
    metrics = distill_decoder(
        SETTINGS,
        pairs_url=pairs.url,
        out_url=str(out),
        teacher=tiny_teacher,
        on_report=reports.append,
    )
    return out, metrics, reports


def test_publishes_a_decoder_with_its_metrics(made, pairs):
    out, metrics, reports = made
    decoder = load_decoder(str(out))
    assert decoder.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert [path.name for path in out.parent.glob("decoder*")] == ["decoder"]
    assert metrics["rows"] == {"pairs": 16, "trained_on": 16 - metrics["held_out_rows"]}
    assert metrics["parents"]["pairs"] == pairs.lineage()
    assert metrics["parameters"]["student"] == decoder.num_parameters
    assert 3.0 < metrics["parameters"]["ratio"] < 4.0
    assert [times["batch"] for times in metrics["times"]] == [1, 3]
    assert [point["step"] for point in metrics["curve"]] == [2, 4, 6]
    gain = metrics["psnr_db"] - metrics["random_init"]["psnr_db"]
    assert metrics["random_init"]["gain_db"] == pytest.approx(gain)
    assert metrics["environment"]["workers"] == 1
    assert reports[-1]["step"] == 6
    assert f"{metrics['psnr_db']:.2f} dB" in summary(metrics)[0]


def test_a_published_decoder_is_left_as_it_is(made, pairs, tiny_teacher, tmp_path):
    out, metrics, _ = made
    elsewhere = changed(trainer=TrainerSettings(num_workers=7))
    assert distill(pairs, out.parent, elsewhere, teacher=tiny_teacher) == metrics

    grown = shutil.copytree(pairs.url, tmp_path / "pairs")
    for sibling in ("rejects", "units"):
        shutil.copytree(f"{pairs.url}.{sibling}", f"{grown}.{sibling}")
    newer = make_pairs(grown, tiny_teacher, draws=2)
    assert newer.version > pairs.version
    assert distill(newer, out.parent, teacher=tiny_teacher) == metrics


def test_another_setting_is_refused_and_named(made, pairs, tiny_teacher):
    out, metrics, _ = made
    other = changed(init="random")
    with pytest.raises(TrainingError, match=r'settings\.init is "leading" there, "random" here'):
        distill(pairs, out.parent, other, teacher=tiny_teacher)
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_a_training_of_other_settings_is_refused(pairs, tiny_teacher, tmp_path):
    begun = tmp_path / "decoder.training" / "begun.json"
    begun.parent.mkdir()
    begun.write_text(json.dumps({"identity": {"pairs": {"version": pairs.version}}}))
    with pytest.raises(TrainingError, match="holds a decoder of other settings"):
        distill(pairs, tmp_path, teacher=tiny_teacher)
    assert not (tmp_path / "decoder").exists()


def test_online_targets_equal_stored_images(pairs, tiny_teacher):
    images = {}
    for target in ("stored", "online"):
        inputs = inputs_of(pairs, changed(target=target), count=count_trainable, teacher=tiny_teacher)
        training = next(assemble(inputs, device=torch.device("cpu")))
        batch = first_batch(training)
        images[target] = training.objective.teacher_images(batch)
        assert training.objective(training.model, batch, step=0).shape == (4,)
        assert sorted(batch.columns) == (["image", "latent"] if target == "stored" else ["latent"])
    # PNG keeps 8 bits: half a level at most.
    torch.testing.assert_close(images["online"], images["stored"], rtol=0, atol=0.501 / 127.5)


def test_pairs_of_another_teacher_are_refused(pairs, tmp_path):
    save(tiny_bundle(seed=5), tmp_path / "other")
    with pytest.raises(TableError, match="made with another VAE"):
        distill(pairs, tmp_path, teacher=str(tmp_path / "other"))


def test_pairs_without_images_are_refused(tiny_teacher, tmp_path):
    bare = make_pairs(tmp_path / "pairs", tiny_teacher, images=False)
    with pytest.raises(TableError, match=r"decoder\.target=online"):
        distill(bare, tmp_path, teacher=tiny_teacher)


def test_pairs_without_held_out_rows_are_refused(pairs, tiny_teacher, tmp_path):
    none = changed(loader=LoaderSettings(held_out=0.0))
    with pytest.raises(TrainingError, match=r"loader\.held_out \(now 0\.0\)"):
        distill(pairs, tmp_path, none, teacher=tiny_teacher)
