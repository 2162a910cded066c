"""`jobs.forget`: deletes rows, writes a receipt, and leaves nothing that could be found."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from deletion_run import TABLES, Run, caption_of, id_of, image, make_shards, url_of
from deltalake import DeltaTable, write_deltalake

from jobs import forget
from jobs.cli.inputs import row_filters
from jobs.cli.job import Job
from jobs.deletion import delete_request
from jobs.deletion.receipt import format_ranges
from jobs.recipes.registry import recipe_named
from pipelines.deletion.erasure import erase_files
from pipelines.stages.deletion_filter import DeletionFilter
from pipelines.storage.objects import read_bytes
from pipelines.tables.commits import REJECTS
from pipelines.tables.deletion_list import DeletionList
from pipelines.tables.table import TableError, open_table
from snapfusion.settings import digest

DELETED = [(0, 1), (1, 2), (0, 9)]
SECRETS = [text.encode() for row in DELETED for text in (url_of(*row), caption_of(*row))]


@pytest.fixture
def lists(tmp_path) -> list[str]:
    """Options for one row by its address, one by its hash, one by its id, and some that do not exist."""
    contents = {
        "url": f"# by mail\nhttps://ORIGIN.example/0/secret-1.png\n{url_of(7, 7)}\n{url_of(7, 8)}\n",
        "hash": f"{hashlib.sha256(image(102)).hexdigest()}\n-12345\n",
        "id": f"{id_of(0, 9)}\n",
    }
    for kind, text in contents.items():
        (tmp_path / f"{kind}.txt").write_text(text)
    return [option for kind in contents for option in (f"--{kind}", str(tmp_path / f"{kind}.txt"))]


def forgotten(run: Run, *options: str) -> int:
    return forget.main(["--out", str(run.out), "--set", "source.name=web", *options])


def receipts(run: Run) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((run.out / "forgotten/receipts").iterdir())]


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def disclosing(run: Run) -> list[str]:
    """The run's files, shards apart, that hold an address or a caption of a deleted row."""
    files = [path for path in files_of(run.out) if "shards" not in path.parts]
    return [str(path.relative_to(run.out)) for path in files if any(s in path.read_bytes() for s in SECRETS)]


def test_a_request_by_address_hash_and_id(run, lists, capsys):
    assert forgotten(run, *lists) == 0
    assert run.table("latents").num_rows == 18 - 3
    assert run.table("targets").num_rows == 2 * 15
    assert run.table("pairs").num_rows == 15
    output = capsys.readouterr().out
    for part in (
        "--url: 1 of 3 .*url.txt line 3-4",
        "--hash: 1 of 2 .*hash.txt line 2",
        "--id: 1 of 1 ",
        "--erase",
    ):
        assert re.search(part, output)
    assert "secret" not in output
    [receipt] = receipts(run)
    for name, rows in (("latents", 3), ("targets", 6), ("pairs", 3)):
        table = receipt["tables"][name]
        assert (table["kind"], table["rows"], table["rows_forgotten_so_far"]) == (name, rows, rows)
        assert table["after"] == table["before"] + 1 == run.table(name).version
    assert receipt["looked_up_in_shards"] == {"columns": 2, "read": 0, "skipped": 0}
    assert receipt["kept"]["shards"] == ["web/00000", "web/00001"]
    unmatched = {outcome["kind"]: len(outcome["unmatched"]) for outcome in receipt["asked"]}
    assert unmatched == {"url": 2, "hash": 1, "id": 0}
    assert receipt["erased"] == []
    assert set(disclosing(run)) <= set(receipt["old_files"])
    assert all((run.out / path).exists() for path in receipt["old_files"])


def test_the_same_request_again_changes_nothing(run, lists, capsys):
    forgotten(run, *lists)
    versions = [run.table(name).version for name in TABLES]
    capsys.readouterr()
    assert forgotten(run, *lists) == 0
    assert [run.table(name).version for name in TABLES] == versions
    assert "--url: 0 of 3 entries match, 3 were on the list already" in capsys.readouterr().out


def erase_all(run, lists):
    assert disclosing(run)
    forgotten(run, *lists, "--erase")
    assert disclosing(run) == []


def test_after_erasing_no_file_discloses_anything(run, lists):
    erase_all(run, lists)
    [receipt] = receipts(run)
    assert receipt["old_files"] == []
    assert receipt["erased"]
    assert not any((run.out / path).exists() for path in receipt["erased"])
    for name in TABLES:
        table = run.table(name)
        assert table.read().num_rows == table.num_rows
        rejected = sum(len(manifest.rejections) for manifest in table.manifests().values())
        assert len(table.rejected_rows()) == rejected


def test_a_later_request_erases_what_an_earlier_left(run, lists):
    forgotten(run, *lists)
    erase_all(run, lists)
    assert len(receipts(run)) == 2


def test_reading_an_erased_version_is_refused(run, lists):
    before = run.table("latents")
    forgotten(run, *lists, "--erase")
    pinned = open_table(before.url, version=before.version)
    with pytest.raises(TableError, match=r"of version \d+ is gone: rows of it were forgotten"):
        pinned.read(["id"])


def test_a_killed_erasure_is_completed_by_the_next(run, lists, monkeypatch):
    def dying(url, paths):
        if url.endswith("pairs"):
            erase_files(url, paths)
            return
        Path(paths[0]).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delete_request, "erase_files", dying)
        assert forgotten(run, *lists, "--erase") == 130
    erase_all(run, lists)


def test_details_of_rejected_rows_are_erased_from_siblings(run, tmp_path):
    """In tables written before the log of the siblings went without statistics."""
    url, planted = str(run.out / "latents"), "http://origin.example/0/secret-3.png"
    rejected = run.table("latents").rejected_rows()
    unit = next(row["unit"] for row in rejected if row["reason"] == "not_an_image")
    row = {"unit": unit, "id": id_of(0, 3), "source": "s", "reason": "bad_url", "detail": planted}
    write_deltalake(DeltaTable(f"{url}.rejects"), pa.Table.from_pylist([row], schema=REJECTS), mode="append")
    files = run.out / "latents.rejects"
    assert any(planted.encode() in path.read_bytes() for path in files_of(files))
    (tmp_path / "id.txt").write_text(id_of(0, 3))
    forgotten(run, "--id", str(tmp_path / "id.txt"), "--erase")
    assert not any(planted.encode() in path.read_bytes() for path in files_of(files))
    assert {row["detail"] for row in run.table("latents").rejected_rows() if row["unit"] == unit} == {""}
    run.encode()


def test_tables_grow_after_their_siblings_logs_are_pruned(run, lists):
    forgotten(run, *lists, "--erase")
    make_shards(run.out / "shards", shards=3)
    assert run.encode().num_rows == 15 + 9
    assert len(run.table("latents").manifests()) == len(run.table("latents").units)
    assert run.compute_targets().num_rows == 2 * 24
    assert run.generate_pairs().num_rows == 24


def plant_trainings(run: Run) -> None:
    """A finished training, one taught by it, an unfinished one, and a mobile bundle."""

    def table(name: str) -> dict:
        snapshot = run.table(name)
        return {"identity": digest(snapshot.identity), "version": snapshot.version}

    def write(path: str, **record) -> None:
        (run.out / path).parent.mkdir(parents=True)
        (run.out / path).write_text(json.dumps(record))

    write(
        "vpred/metrics.json",
        identity={"latents": table("latents")},
        parents={"latents": run.table("latents").lineage()},
        weights={"model": "w1", "raw": "w2"},
        settings_hash="s1",
    )
    write(
        "student-8/metrics.json",
        identity={"data": {"identity": "another", "version": 0}},
        parents={"teacher": {"source": "x", "weights": {"unet": "w1"}}},
        weights={"model": "w3"},
        settings_hash="s3",
    )
    write("other/metrics.json", identity={}, parents={}, weights={"model": "w9"}, settings_hash="s9")
    write("decoder.training/begun.json", identity={"pairs": table("pairs")})
    write("mobile/manifest.json", identity={"parents": {"model": {"settings_hash": "s3"}, "decoder": None}})
    write("report/index.html")


def test_trainings_models_and_bundles_are_named(run, lists, capsys):
    plant_trainings(run)
    assert forgotten(run, *lists) == 0
    [receipt] = receipts(run)
    lineage, output = receipt["descendants"], capsys.readouterr().out
    assert [(pin["place"], pin["table"], pin["finished"]) for pin in lineage["trainings"]] == [
        ("decoder", "pairs", False),
        ("vpred", "latents", True),
    ]
    assert lineage["models"] == ["student-8", "vpred"]
    assert lineage["bundles"] == ["mobile"]
    assert lineage["pages"] == ["report/index.html"]
    assert lineage["drawn"] == []
    version = receipt["tables"]["pairs"]["before"]
    assert f"pinned to pairs version {version}, not finished: decoder" in output
    assert "not changed: student-8, vpred" in output


def test_an_unfinished_training_prevents_erasure(run, lists, capsys):
    plant_trainings(run)
    assert forgotten(run, *lists, "--erase") == 1
    assert "--erase: nothing was erased" in (line := capsys.readouterr().err)
    assert "decoder (at pairs version" in line
    assert run.table("latents").num_rows == 15
    assert receipts(run)[0]["old_files"]
    assert forgotten(run, *lists, "--erase-pinned") == 0
    assert disclosing(run) == []


def test_training_of_newest_version_is_not_named(run, lists):
    forgotten(run, *lists)
    plant_trainings(run)
    forgotten(run, *lists)
    assert receipts(run)[-1]["descendants"]["trainings"] == []


def test_a_dry_run_counts_and_writes_nothing(run, lists, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.out.rglob("*")}
    assert forgotten(run, *lists, "--dry-run") == 0
    output = capsys.readouterr().out
    for part in ("3 of 6 entries", "; 0 ", "3 rows and 0 rejections from latents", "6 rows .* from targets"):
        assert re.search(part, output)
    assert {path: path.stat().st_mtime_ns for path in run.out.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--url, --hash, --id: at least one of them is needed"),
        (["--url", "none.txt"], "--url none.txt: No such file"),
        (["--hash", "{bad}"], "--hash {bad}, line 1 is not a hash"),
    ],
)
def test_an_error_names_the_option_in_one_line(run, tmp_path, capsys, options, message):
    bad = tmp_path / "bad.txt"
    bad.write_text("neither\n")
    assert forgotten(run, *(option.format(bad=bad) for option in options)) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"forget: {message.format(bad=bad)}")
    assert line.count("\n") == 1
    assert not (run.out / "forgotten").exists()


def test_a_run_that_does_not_exist_is_refused(tmp_path, lists, capsys):
    assert forget.main(["--out", str(tmp_path / "none"), *lists]) == 2
    assert "forget: --out " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_without_shards_tables_match_addresses_and_ids(run, lists):
    shutil.rmtree(run.out / "shards")
    assert forgotten(run, *lists) == 0
    assert run.table("latents").num_rows == 18 - 2
    [receipt] = receipts(run)
    assert receipt["looked_up_in_shards"] == {"columns": 0, "read": 0, "skipped": 0}
    assert all(one["unmatched"] for one in receipt["asked"] if one["kind"] == "hash")


def test_jobs_of_a_run_apply_its_deletion_list(run):
    job = Job(verb="encode_latents", recipe=recipe_named("mini"), out=str(run.out))
    [deletion] = [one for one in row_filters(job) if isinstance(one, DeletionFilter)]
    assert deletion.list.url == str(run.out / "forgotten")
    assert dict(deletion.describe()) == {}


def test_line_numbers_are_joined_to_ranges():
    assert format_ranges([1, 4, 5, 6, 9]) == "1, 4-6, 9"
    assert format_ranges([]) == ""


@pytest.mark.slow
def test_a_run_in_a_bucket(bucket, run, lists):
    filesystem = fsspec.filesystem("s3")
    filesystem.put(f"{run.out}/", "s3://bucket/run/", recursive=True)
    url = f"{bucket}/run"
    assert forget.main(["--out", url, "--set", "source.name=web", *lists, "--erase"]) == 0
    assert open_table(f"{url}/latents").read().num_rows == 15
    assert open_table(f"{url}/targets").read().num_rows == 30
    assert len(DeletionList(f"{url}/forgotten").read()) > 6
    filesystem.invalidate_cache()
    for path in filesystem.find("s3://bucket/run"):
        if "/shards/" not in path:
            assert not any(secret in read_bytes(f"s3://{path}") for secret in SECRETS), path
