"""Whatever is given to a command, it ends with exit code 0, 1 or 2 and one line, without a traceback.

The cases follow from a seed. Ray cannot start: a command that would start it has accepted its input.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import ray
from set_options import set_options

from jobs import command
from jobs.recipes.recipe import Recipe
from jobs.runtime.cluster import ClusterUnreachable
from snapfusion.settings import Settings

VALUES = (
    *("null", "true", "0", "-1", "1", "0.5", "1e308", "1e999", "NaN", "1e-320", "9" * 30, '""', '"x"', "x"),
    *("[]", "{}", "[[]]", "[null]", "[{}]", "[1, 2]", '["x", "x"]', '{"a": 1}', "[" * 100_000, '"\\u0000"'),
    *('"\\ud800"', '"../x"', '"a/b"', '"ä漢"', '"%41"', '"[1]"', '"run:"', '"s3://"', '"://"', '"http://"'),
    *('"/dev/null"', '"/dev/null/x"', json.dumps("y" * 5_000)),
)
"""Values of settings."""

TEXTS = (
    *("", "x", "ä漢", "0", "-1", "nan", "1e999", "9" * 5_000, "y" * 100_000, "\0", "\ud800", "%s", "{0}"),
    *(
        "[1]",
        "*",
        "null",
        "~",
        "-",
        "--",
        "/",
        ".",
        "/dev/null",
        "/dev/null/x",
        "gs://x/y",
        "other://x",
        "://",
    ),
    *("http://127.0.0.1:1/x", "file:///dev/null", "mini", "run:student/model"),
)
"""Values of options and arguments, beside the paths of `files`."""

CONTENTS = {
    "empty": b"",
    "half.json": b'{"a": [1, 2',
    "list.json": b"[]",
    "null.json": b"null",
    "nan.json": b'{"source": {"scenes": NaN}}',
    "deep.json": b"[" * 20_000,
    "deep.yaml": b"{a: " * 5_000,
    "open.yaml": b"a: [1\n",
    "itself.yaml": b"a: &a {b: *a}\n",
    "bytes": bytes(range(256)) * 20,
    "wrong.parquet": b"PAR1aaaaPAR1",
    "utf16.csv": "url,caption\n".encode("utf-16"),
    "zeros.tar": bytes(10_240),
}

REQUIRED = {"caption": "red", "robust": "nowhere", "plain": "nowhere", "target": "encode_latents"}


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ClusterUnreachable("Ray cannot start here")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Paths of files of no use, of an empty folder, and of nothing."""
    folder = tmp_path / "files"
    (folder / "folder").mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in (*CONTENTS, "folder", "missing", "empty/below")]


def check(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command; its exit code is 0, 1 or 2, and a failure has one line."""
    shown = [word[:60] for word in words]
    try:
        code = command.main(words)
    except BaseException as error:
        raise AssertionError(f"{shown}: {type(error).__name__}") from error
    errors = capsys.readouterr().err
    assert code in (0, 1, 2), shown
    if code:
        assert errors.count("\n") == 1, (shown, errors)
    assert "Traceback" not in errors, shown


def command_lines(files: list[str]) -> Iterator[list[str]]:
    """Each option and argument of each verb with each value"""
    for verb in command.VERBS:
        parameters = command.load(verb).command.params
        for parameter in parameters:
            if isinstance(parameter, click.Option) and parameter.is_flag:
                continue
            numeric = isinstance(parameter.type, (click.types.IntParamType, click.types.FloatParamType))
            # The miniature's measurement would begin with its own weights.
            if verb == "measure_mini" and parameter.name == "out":
                continue
            for value in TEXTS if numeric else (*TEXTS, *files):
                # It would serve it until it is ended.
                if verb == "serve" and value == "mini":
                    continue
                yield [verb.replace("_", "-"), *arguments(parameters, changed=parameter, value=value)]


def arguments(parameters: list[click.Parameter], *, changed: click.Parameter, value: str) -> list[str]:
    words = []
    for parameter in parameters:
        if parameter.name == "dry_run":
            words.append("--dry-run")
        given = value if parameter is changed else REQUIRED.get(parameter.name or "", "nowhere")
        if isinstance(parameter, click.Argument):
            words.append(given)
        elif parameter is changed or parameter.required or parameter.name in ("out", "model", "weights"):
            words += [parameter.opts[0], given]
    return words


def settings(cls: type[Settings], prefix: str = "") -> Iterator[str]:
    """The keys of all settings, and of their sections."""
    for name, field in cls.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from settings(field.annotation, f"{prefix}{name}.")


def fuzz_options(files: list[str], capsys: pytest.CaptureFixture[str], *, count: int) -> None:
    lines = list(command_lines(files))
    for words in random.Random(0).sample(lines, min(count, len(lines))):
        check(words, capsys)


TARGETS = {
    "compact": ["nowhere"],
    "export_table": ["nowhere", "--to", "webdataset"],
    "top_up": ["generate_pairs"],
    "verify_table": ["nowhere"],
}


def fuzz_settings(capsys: pytest.CaptureFixture[str], *, fraction: float, per_key: int) -> None:
    draw = random.Random(0)
    verbs = [verb for verb in command.VERBS if {"dry_run", "recipe"} <= names_of(verb)]
    keys = list(settings(Recipe))
    for key in draw.sample(keys, round(fraction * len(keys))):
        for value in draw.sample(VALUES, per_key):
            verb = draw.choice(verbs)
            target = TARGETS.get(verb, [])
            options = ["--dry-run", "--out", "nowhere", "--set", f"{key}={value}"]
            check([verb.replace("_", "-"), *target, *options], capsys)


def names_of(verb: str) -> set[str | None]:
    return {parameter.name for parameter in command.load(verb).command.params}


DAMAGES = ("gone", "folder", "empty", "half", "noise", "null", "[]", "{}", "1e999", '"x"', "NaN")


def damage(path: Path, kind: str, draw: random.Random) -> None:
    """Replace a file, which may be a hard link."""
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        texts = {"empty": b"", "half": content[: len(content) // 2], "noise": draw.randbytes(300)}
        path.write_bytes(texts.get(kind, kind.encode()))


def fuzz_files(run, out: Path, capsys: pytest.CaptureFixture[str], *, count: int) -> None:
    draw = random.Random(0)
    names = sorted(path.relative_to(run.out) for path in run.out.rglob("*") if path.is_file())
    request = out.with_name("ids.txt")
    request.write_text("web/00000/0000001\n")
    options = ["--out", str(out), *set_options([f"model={run.teacher}", "verification.units=1"])]
    jobs = [
        *(["vacuum"], ["forget", "--id", str(request)], ["compute-targets"], ["generate-pairs"]),
        *(["encode-latents"], ["encode-latents", "--dry-run"], ["distill-steps"], ["distill-decoder"]),
        *(["verify-table", f"{out}/{name}"] for name in ("latents", "targets", "pairs")),
    ]
    for _ in range(count):
        shutil.copytree(run.out, out, copy_function=os.link)
        damage(out / draw.choice(names), draw.choice(DAMAGES), draw)
        check([*draw.choice(jobs), *options], capsys)
        shutil.rmtree(out)


def test_no_option_ends_in_a_traceback(files, capsys):
    fuzz_options(files, capsys, count=250)


def test_no_setting_ends_in_a_traceback(capsys):
    fuzz_settings(capsys, fraction=0.2, per_key=1)


def test_no_damaged_run_ends_in_a_traceback(whole_run, tmp_path, capsys):
    fuzz_files(whole_run, tmp_path / "run", capsys, count=12)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_times_as_many_end_without_a_traceback(files, whole_run, tmp_path, capsys):
    fuzz_options(files, capsys, count=4_000)
    fuzz_settings(capsys, fraction=1.0, per_key=2)
    fuzz_files(whole_run, tmp_path / "run", capsys, count=300)
