"""Sources of models: a path and its options."""

import pytest

from snapfusion.models.errors import ModelError
from snapfusion.models.source import Lora, ModelSource, parse_source


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
