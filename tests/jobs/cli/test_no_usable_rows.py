"""A job whose rows were all rejected fails, and names the commonest reason."""

import pytest
from in_process import in_process

from jobs import encode_latents, evaluate, find_duplicates, forget, generate_pairs
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.tables.schemas import to_png
from snapfusion.mini.scenes import captioned_image


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    for job in (encode_latents, evaluate, find_duplicates, generate_pairs):
        monkeypatch.setattr(job, "runner", lambda *_, **__: in_process)


def write_rows(folder, *images: bytes) -> None:
    rows = [
        ShardRow(image=image, caption=f"caption {number}", url=f"https://example.org/{number}")
        for number, image in enumerate(images)
    ]
    write_shard(str(folder), iter(rows), index=0, extension="png", rows_per_shard=len(rows))


@pytest.mark.parametrize(("job", "table"), [(encode_latents, "LATENTS"), (find_duplicates, "FINGERPRINTS")])
def test_shards_without_an_image_fail(job, table, tmp_path, capsys):
    write_rows(tmp_path / "shards", b"no image", b"none either", b"")
    assert job.main(["--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    message = f"{job.main.name}: {table}: none of 3 rows is usable; 2 are not_an_image: the image is in no"
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_a_file_that_is_no_shard_is_named(tmp_path, capsys):
    write_rows(tmp_path / "shards", b"no image")
    (tmp_path / "shards" / "00000.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "shards" / "00000.parquet").unlink()
    assert encode_latents.main(["--out", str(tmp_path), "--set", "source.settle=0"]) == 1
    assert "the first is scenes/00000/.tar: the file is a Git LFS pointer" in capsys.readouterr().err


def test_captions_that_cannot_be_read_fail(tmp_path, capsys):
    (tmp_path / "captions.jsonl").write_text('{"caption": ""}\n{"caption": " "}\n')
    words = ["--out", str(tmp_path), "--set", f"captions.url={tmp_path}/captions.jsonl"]
    assert generate_pairs.main(words) == 1
    assert "PAIRS: none of 2 rows is usable; 2 are " in capsys.readouterr().err


def test_references_that_are_no_images_fail(tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"no image")
    words = ["--out", str(tmp_path / "run"), "--set", f"evaluation.references.url={tmp_path}"]
    assert evaluate.main([*words, "--set", "evaluation.references.count=3"]) == 1
    assert "REFERENCES: none of 3 rows is usable; 3 are not_an_image" in capsys.readouterr().err


def test_one_usable_row_is_enough(tmp_path, capsys):
    write_rows(tmp_path / "shards", b"no image", to_png(captioned_image(0, seed=0)[0]))
    assert encode_latents.main(["--out", str(tmp_path)]) == 0
    assert "1 rows in 1 units, 1 rejected (1 not_an_image)" in capsys.readouterr().out


def test_rows_deleted_on_request_are_no_fault(tmp_path):
    write_rows(tmp_path / "shards", to_png(captioned_image(0, seed=0)[0]))
    assert encode_latents.main(["--out", str(tmp_path)]) == 0
    (tmp_path / "urls.txt").write_text("https://example.org/0\n")
    assert forget.main(["--out", str(tmp_path), "--url", str(tmp_path / "urls.txt")]) == 0
    assert encode_latents.main(["--out", str(tmp_path)]) == 0
