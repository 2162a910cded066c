"""Tokenizers of diffusers folders: completed from the text encoder, or refused."""

import json
import shutil
from pathlib import Path

import pytest

from snapfusion.models.errors import ModelError
from snapfusion.models.tokenizer import clip_tokenizer, tokenize
from snapfusion.models.tokenizer_files import read_tokenizer

SD15 = {"vocab_size": 49408, "hidden_size": 768, "max_position_embeddings": 77}


@pytest.fixture
def folder(tmp_path) -> Path:
    """CLIP's tokenizer as files."""
    clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def read(folder: Path, **text_encoder: object):
    """Read a tokenizer beside the text encoder of SD 1.5, but for some fields."""
    return read_tokenizer(folder, text_encoder=SD15 | text_encoder, source="model")


def test_missing_length_is_that_of_the_text_encoder(folder, caplog):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    with caplog.at_level("INFO", logger="snapfusion"):
        assert tokenize(read(folder), ["a red circle"]).shape == (1, 77)


def test_missing_configuration_is_completed(folder):
    (folder / "tokenizer_config.json").unlink()
    tokens = tokenize(read(folder), ["a red circle"])
    assert tokens.tolist() == tokenize(clip_tokenizer(), ["a red circle"]).tolist()


@pytest.mark.parametrize(("width", "padding"), [(768, 49407), (1024, 0)])
def test_missing_tokenizer_is_clips(folder, width, padding):
    shutil.rmtree(folder)
    tokens = tokenize(read(folder, hidden_size=width), ["a red circle"])[0].tolist()
    assert tokens == [49406, 320, 736, 7117, 49407] + [padding] * 72


def test_missing_tokenizer_of_another_vocabulary_fails(tmp_path):
    with pytest.raises(ModelError, match="vocabulary has 600 tokens, not the 49408"):
        read(tmp_path, vocab_size=600)


def test_damaged_tokenizer_fails_with_one_line(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer cannot be read") as caught:
        read(folder)
    assert "\n" not in str(caught.value)
