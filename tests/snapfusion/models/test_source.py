"""Sources of models: a path and its options."""

import pytest

from snapfusion.models.errors import ModelError
from snapfusion.models.source import Embedding, Lora, ModelSource, absolute_source, parse_source, source_paths


@pytest.mark.parametrize("source", ["mini", "/models/a?b", "s3://bucket/m?versionId=3", "a.safetensors?"])
def test_source_without_options_is_a_path(source):
    assert parse_source(source) == ModelSource(path=source)


def test_options_are_parsed():
    text = "a.safetensors?ema=true&prediction_type=v_prediction&size=128&lora=x.safetensors:0.5&lora=y+z"
    assert parse_source(text) == ModelSource(
        path="a.safetensors",
        ema=True,
        prediction_type="v_prediction",
        size=128,
        loras=(Lora(path="x.safetensors", weight=0.5), Lora(path="y+z")),
    )
    assert parse_source("m?lora=s3://b/x").loras == (Lora(path="s3://b/x"),)
    embeddings = (Embedding(path="a.safetensors", token="<x>:y"), Embedding(path="s3://b/e.safetensors"))
    options = "embedding=a.safetensors:<x>:y&embedding=s3://b/e.safetensors"
    assert parse_source(f"m?{options}").embeddings == embeddings
    assert parse_source("owner/name?revision=v1&variant=fp16").revision == "v1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("variant=fp16&varient=x", "no option 'varient'"),
        ("variant=", "is empty"),
        ("variant=a&variant=b", "is repeated"),
        ("ema=1", "true or false"),
        ("size=big", "a number of pixels"),
        ("prediction_type=v", "epsilon or v_prediction"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        parse_source(f"model?{options}")


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base.safetensors", "my style+.safetensors", "cat.safetensors"):
        (tmp_path / name).touch()
    options = "lora=my style+.safetensors:0.5&lora=s3://b/x&ema=true&embedding=cat.safetensors:<cat>"
    source = absolute_source(f"base.safetensors?{options}")
    assert parse_source(source) == ModelSource(
        path=f"{tmp_path}/base.safetensors",
        ema=True,
        loras=(Lora(path=f"{tmp_path}/my style+.safetensors", weight=0.5), Lora(path="s3://b/x")),
        embeddings=(Embedding(path=f"{tmp_path}/cat.safetensors", token="<cat>"),),
    )
    assert source_paths(source) == (
        f"{tmp_path}/base.safetensors",
        f"{tmp_path}/my style+.safetensors",
        "s3://b/x",
        f"{tmp_path}/cat.safetensors",
    )
    for kept in ("mini", "owner/name", "s3://bucket/model", "random:sd15"):
        assert absolute_source(kept) == kept
