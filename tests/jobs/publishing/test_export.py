"""`export --to single-file`, and mistakes of `export`."""

import re

import pytest

from jobs import command


def test_the_file_is_written_and_told_how_to_open(tmp_path, capsys):
    path = tmp_path / "below" / "mini.safetensors"
    assert command.main(["export", "mini-v", "--to", "single-file", "--out", str(path)]) == 0
    text = capsys.readouterr().out
    assert f'StableDiffusionPipeline.from_single_file("{path}", config=' in text
    assert "float16, which changes no value" in text
    assert 'prediction_type="v_prediction"' in text
    assert [each.name for each in path.parent.iterdir()] == ["mini.safetensors"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mini --to onnx --out a", "Invalid value for '--to': 'onnx' is not one of"),
        ("mini --to single-file", "Missing option '--out'"),
        ("mini --to single-file --out a", "a: a file that ends with .safetensors is accepted"),
        ("mini --to single-file --out here.safetensors", "here.safetensors exists and is not overwritten"),
        (
            "mini --to single-file --out a.safetensors --decoder d",
            "--decoder d: it has an effect with --to apple",
        ),
        ("mini --to single-file --out /dev/null/a.safetensors", "--out /dev/null/a.safetensors cannot be"),
        (
            "mini --to apple --out s3://bucket/x",
            "--out 's3://bucket/x': a new file or folder on this machine",
        ),
        ("nowhere --to single-file --out a.safetensors", "there is no model folder or file 'nowhere'"),
        ("mini --to apple --out here", "--out here exists and is not overwritten"),
        ("mini --to apple --out a --guidance 0.5", "--guidance: "),
        ("mini --to apple --out a --decoder nowhere", "nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here.safetensors").touch()
    assert command.main(["export", *words.split()]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"export: .*\n", error)
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "here.safetensors"]
