"""Robust training and the efficient UNet as jobs: what they begin with, what they leave, what they refuse."""

import json

import pytest
import torch
from scene_latents import encode_scenes
from set_options import set_options

from jobs import train_efficient, train_robust
from jobs.training.initial_weights import named_architecture, own_architecture, with_architecture
from jobs.training.spec import TrainingError
from snapfusion.models.architecture import ArchitectureError, efficient_architecture
from snapfusion.models.load import load
from snapfusion.models.unet import UNetError, architecture_of

ORIGIN = own_architecture("mini-v")
EFFICIENT = efficient_architecture(ORIGIN)
TINY = (
    *("loop.num_steps=1", "loop.global_batch=4", "loop.warmup_steps=0", "loader.held_out=0.3"),
    *("trainer.micro_batch=4", "trainer.num_workers=1", "trainer.cpus_per_worker=0.5", "trainer.log_to=[]"),
)


def options(out, stage, *more):
    return ["--out", str(out), *set_options([*(f"{stage}.training.{one}" for one in TINY), *more])]


@pytest.fixture(scope="module")
def run(local_training, tmp_path_factory):
    """LATENTS, the robust model, and the efficient one made of that."""
    out = tmp_path_factory.mktemp("run")
    encode_scenes(out)
    assert train_robust.main(options(out, "robust")) == 0
    assert train_efficient.main(options(out, "efficient", "efficient.begin=run:robust/model")) == 0
    return out


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_robust_training_is_recorded_with_its_probabilities(run):
    assert metrics(run / "robust")["identity"]["settings"]["skip"] == {"attention": 0.2, "resnet": 0.2}
    assert architecture_of(load(str(run / "robust")).unet) == ORIGIN
    assert load(str(run / "robust")).fingerprint()["unet"] != load("mini-v").fingerprint()["unet"]


def test_the_efficient_model_inherits_block_weights(run):
    trained, first = load(str(run / "efficient")), load(str(run / "efficient-first"))
    assert architecture_of(trained.unet) == architecture_of(first.unet) == EFFICIENT
    robust = load(str(run / "robust")).unet
    for name in ("down_blocks.0.resnets.0", "mid_block.attentions.0"):
        for key, tensor in first.unet.get_submodule(name).state_dict().items():
            assert torch.equal(tensor, robust.get_submodule(name).state_dict()[key])
    copy, of = (first.unet.get_submodule(f"up_blocks.1.attentions.0{end}").state_dict() for end in ("+1", ""))
    assert all(torch.equal(copy[key], of[key]) for key in of)
    assert trained.fingerprint()["unet"] != first.fingerprint()["unet"]
    assert trained.prediction_type == "v_prediction"


def test_an_existing_model_is_left_as_it_is(run, capsys):
    before = metrics(run / "efficient")
    assert train_efficient.main(options(run, "efficient", "efficient.begin=run:robust/model")) == 0
    assert metrics(run / "efficient") == before
    assert "1,741,748 parameters of 2,034,956" in capsys.readouterr().out
    assert train_efficient.main(options(run, "efficient", "efficient.architecture=own")) == 2
    assert "holds a model of other settings: architecture." in capsys.readouterr().err


def test_an_architecture_is_read_from_a_file(tmp_path):
    path = tmp_path / "architecture.json"
    path.write_text(EFFICIENT.to_json())
    assert named_architecture(str(path), own=ORIGIN) == EFFICIENT
    assert named_architecture("own", own=ORIGIN) == ORIGIN
    path.write_text('{"channels": "wide"}')
    with pytest.raises(ArchitectureError, match=r"architecture\.json is no architecture \(.*own, table-3"):
        named_architecture(str(path), own=ORIGIN)
    with pytest.raises(ArchitectureError, match="table-4 is no architecture"):
        named_architecture("table-4", own=ORIGIN)


def test_weights_of_other_blocks_are_refused(tmp_path):
    twin = with_architecture("mini-v", EFFICIENT, url=str(tmp_path / "twin"))
    with pytest.raises(UNetError, match=r"there is no down_blocks\.0\.attentions\.0\."):
        with_architecture(twin, ORIGIN, url=str(tmp_path / "back"))
    wider = ORIGIN.changed(channels=(48, 64, 64), groups=8)
    with pytest.raises(UNetError, match=r"conv_in\.weight is \(24, 4, 3, 3\) there, \(48, 4, 3, 3\) here"):
        with_architecture("mini-v", wider, url=str(tmp_path / "wider"))
    with pytest.raises(TrainingError, match="holds a model of other settings: architecture"):
        with_architecture("mini-v", ORIGIN, url=twin)


def test_a_dry_run_describes_the_training(capsys):
    assert train_robust.main(["--dry-run", "--recipe", "sd15"]) == 0
    printed = capsys.readouterr().out
    assert "would train runs/demo/vpred/model on runs/demo/latents" in printed
    assert "cross-attention block with probability 0.2 and each ResNet block with 0.2" in printed
    assert train_efficient.main(["--dry-run", "--recipe", "sd2"]) == 0
    assert "would give stabilityai/stable-diffusion-2-1 the architecture table-3" in capsys.readouterr().out
