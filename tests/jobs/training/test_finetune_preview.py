"""A dry run of the fine-tuning says what will happen, from what the model's scheduler states."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import unsealed_copy
from ldm_checkpoint import sd_shaped_bundle, write_checkpoint

from jobs import finetune_vpred
from snapfusion.models.bundled import BUNDLED
from snapfusion.models.ldm_keys import ldm_tensors
from snapfusion.models.load import load_prediction_type
from snapfusion.models.local_folder import SCHEDULER_CONFIG, stated_prediction_type

NOTHING = "nothing to fine-tune: {} predicts v already"
FINETUNED = "would fine-tune {} to predict v on runs/demo/latents for 20000 steps of 2048 rows, into "
CONDITION = "; nothing if it predicts v already"


def previewed(capsys, model):
    assert finetune_vpred.main(["--recipe", "own", "--set", f"model={model}", "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_a_model_that_predicts_v_needs_no_training(capsys):
    folder = str(BUNDLED["mini-v"])
    assert previewed(capsys, folder) == NOTHING.format(folder)


def test_a_model_that_predicts_eps_is_trained(capsys, tiny_teacher, tmp_path):
    write_checkpoint(tmp_path / "tune.safetensors", ldm_tensors(sd_shaped_bundle()))
    for model in (tiny_teacher, str(tmp_path / "tune.safetensors")):
        line = previewed(capsys, model)
        assert line.startswith(FINETUNED.format(model))
        assert CONDITION not in line


def test_a_model_that_is_not_here_leaves_both(capsys):
    assert finetune_vpred.main(["--recipe", "sd15", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(f"{CONDITION}\n")


@pytest.mark.parametrize("name", BUNDLED)
def test_what_a_folder_states_is_what_loading_reads(name):
    assert stated_prediction_type(name) == load_prediction_type(name)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"{}", b'{"prediction_type": "sample"}'])
def test_a_scheduler_that_states_nothing_is_no_answer(content, tiny_teacher, tmp_path):
    config = unsealed_copy(tiny_teacher, tmp_path / "model") / SCHEDULER_CONFIG
    config.unlink()
    if content is not None:
        config.write_bytes(content)
    assert stated_prediction_type(str(tmp_path / "model")) is None


def test_a_run_folder_states_what_its_model_does(tiny_teacher, tmp_path):
    config = unsealed_copy(tiny_teacher, tmp_path / "model") / SCHEDULER_CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    assert stated_prediction_type(f"{tmp_path}?lora=style.safetensors") == "v_prediction"


def test_torch_is_not_imported_for_it():
    code = (
        "import sys; from jobs import finetune_vpred; assert not finetune_vpred.main(['--dry-run']); "
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.endswith(" (does not exist yet)\nFalse\n")
