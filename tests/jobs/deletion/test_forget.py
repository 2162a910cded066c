"""`jobs.forget`: a request is carried out, told in a receipt, and leaves nothing that could be found."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import fsspec
import pytest
from forgetful_run import TABLES, Run, caption_of, id_of, make_run, picture, url_of

from jobs import forget
from jobs.cli.inputs import row_filters
from jobs.cli.job import Job
from jobs.deletion.receipt import format_ranges
from jobs.recipes.registry import recipe_named
from pipelines.deletion.erasure import erase_files
from pipelines.stages.deletion_filter import DeletionFilter
from pipelines.storage.objects import read_bytes
from pipelines.tables.deletion_list import DeletionList
from pipelines.tables.table import TableError, open_table
from snapfusion.settings import digest

GONE = [(0, 1), (1, 2), (0, 9)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_teacher) -> Run:
    return make_run(tmp_path_factory.mktemp("whole") / "run", teacher=tiny_teacher)


@pytest.fixture
def run(whole, tmp_path) -> Run:
    return whole.copy(tmp_path / "run")


@pytest.fixture
def lists(tmp_path) -> list[str]:
    """One row by its address, one by the hash of its bytes, one by its id; and some that are not there."""
    contents = {
        "url": f"# by mail\nhttps://ORIGIN.example/0/secret-1.png\n{url_of(7, 7)}\n{url_of(7, 8)}\n",
        "hash": f"{hashlib.sha256(picture(102)).hexdigest()}\n-12345\n",
        "id": f"{id_of(0, 9)}\n",
    }
    for kind, text in contents.items():
        (tmp_path / f"{kind}.txt").write_text(text)
    return [word for kind in contents for word in (f"--{kind}", str(tmp_path / f"{kind}.txt"))]


def carried_out(run: Run, *words: str) -> int:
    return forget.main(["--out", str(run.out), "--set", "source.name=web", *words])


def receipts(run: Run) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((run.out / "forgotten/receipts").iterdir())]


def telling(run: Run) -> list[str]:
    """The run's files, shards apart, that hold an address or a caption of what is forgotten."""
    words = [word.encode() for row in GONE for word in (url_of(*row), caption_of(*row))]
    paths = [path for path in sorted(run.out.rglob("*")) if path.is_file() and "shards" not in path.parts]
    return [str(path.relative_to(run.out)) for path in paths if any(w in path.read_bytes() for w in words)]


def test_a_request_by_address_hash_and_id(run, lists, capsys):
    assert carried_out(run, *lists) == 0
    assert run.table("latents").num_rows == 18 - 3
    assert run.table("targets").num_rows == 2 * 15
    assert run.table("pairs").num_rows == 15
    told = capsys.readouterr().out
    assert "--url: 1 of 3 entries name something, 2 name nothing (url.txt line 3-4)" in told
    assert "--hash: 1 of 2 entries name something, 1 name nothing (hash.txt line 2)" in told
    assert "--id: 1 of 1 entries name something" in told
    assert "old files still hold it, for older versions; --erase deletes them" in told
    assert "secret" not in told
    [receipt] = receipts(run)
    for name, rows in (("latents", 3), ("targets", 6), ("pairs", 3)):
        table = receipt["tables"][name]
        assert (table["kind"], table["rows"], table["rows_forgotten_so_far"]) == (name, rows, rows)
        assert table["after"] == table["before"] + 1 == run.table(name).version
    assert receipt["looked_up_in_shards"] == {"columns": 2, "read": 0, "skipped": 0}
    assert receipt["kept"]["shards"] == ["web/00000", "web/00001"]
    assert {fate["kind"]: len(fate["unmatched"]) for fate in receipt["asked"]} == {
        "url": 2,
        "hash": 1,
        "id": 0,
    }
    assert receipt["erased"] == []
    assert set(telling(run)) <= set(receipt["old_files"])
    assert all((run.out / place).exists() for place in receipt["old_files"])


def test_the_same_request_again_does_nothing_and_says_so(run, lists, capsys):
    carried_out(run, *lists)
    versions = [run.table(name).version for name in TABLES]
    capsys.readouterr()
    assert carried_out(run, *lists) == 0
    assert [run.table(name).version for name in TABLES] == versions
    assert "--url: 0 of 3 entries name something, 3 were on the list already" in capsys.readouterr().out


def test_after_erasing_no_file_tells_anything(run, lists):
    assert telling(run)
    carried_out(run, *lists, "--erase")
    assert telling(run) == []
    [receipt] = receipts(run)
    assert receipt["old_files"] == []
    assert receipt["erased"]
    assert not any((run.out / place).exists() for place in receipt["erased"])
    for name in TABLES:
        url = str(run.out / name)
        assert run.table(name).read().num_rows == run.table(name).num_rows
        assert len(open_table(url).rejected_rows()) == sum(
            len(one.rejections) for one in open_table(url).manifests().values()
        )


def test_what_an_earlier_request_left_is_erased_by_a_later_one(run, lists):
    carried_out(run, *lists)
    assert telling(run)
    carried_out(run, *lists, "--erase")
    assert telling(run) == []
    assert len(receipts(run)) == 2


def test_an_old_version_that_was_erased_says_so(run, lists):
    before = run.table("latents")
    carried_out(run, *lists, "--erase")
    pinned = open_table(before.url, version=before.version)
    with pytest.raises(TableError, match=r"of version \d+ is gone: rows of it were forgotten"):
        pinned.read(["id"])


def test_an_erasure_that_was_killed_is_ended_by_the_next(run, lists, monkeypatch):
    def dying(url, paths):
        if url.endswith("pairs"):
            erase_files(url, paths)
            return
        Path(paths[0]).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(forget, "erase_files", dying)
        assert carried_out(run, *lists, "--erase") == 130
    assert telling(run)
    carried_out(run, *lists, "--erase")
    assert telling(run) == []


def test_details_of_rejected_rows_are_erased_from_the_siblings_and_their_log(run, tmp_path):
    """As tables have them that were made before the siblings' log went without statistics."""
    from pipelines.tables import commits

    url = str(run.out / "latents")
    told = [row for row in open_table(url).rejected_rows() if row["reason"] == "not_an_image"]
    assert told
    marks = [path for path in (run.out / "latents.rejects").rglob("*") if path.is_file()]
    planted = "http://origin.example/0/secret-3.png"
    delta = commits.DeltaTable(f"{url}.rejects")
    unit = told[0]["unit"]
    commits.write_deltalake(
        delta,
        commits.pa.Table.from_pylist(
            [{"unit": unit, "id": id_of(0, 3), "source": "s", "reason": "bad_url", "detail": planted}],
            schema=commits.REJECTS,
        ),
        mode="append",
    )
    assert len(list((run.out / "latents.rejects").rglob("*"))) > len(marks)
    (tmp_path / "id.txt").write_text(id_of(0, 3))
    carried_out(run, "--id", str(tmp_path / "id.txt"), "--erase")
    for path in (run.out / "latents.rejects").rglob("*"):
        assert path.is_dir() or planted.encode() not in path.read_bytes()
    assert {row["detail"] for row in open_table(url).rejected_rows() if row["unit"] == unit} == {""}
    run.encode()


def test_a_table_goes_on_after_its_siblings_logs_were_pruned(run, lists):
    carried_out(run, *lists, "--erase")
    from forgetful_run import make_shards

    make_shards(run.out / "shards", shards=3)
    assert run.encode().num_rows == 15 + 9
    assert len(open_table(str(run.out / "latents")).manifests()) == len(run.table("latents").units)
    assert run.teach().num_rows == 2 * 24
    assert run.draw().num_rows == 24


def plant_trainings(run: Run) -> None:
    """One that is done, one that was taught by it, one that is going on, and a bundle for phones."""

    def table(name: str) -> dict:
        snapshot = run.table(name)
        return {"identity": digest(snapshot.identity), "version": snapshot.version}

    def leave(place: str, **told) -> None:
        (run.out / place).parent.mkdir(parents=True)
        (run.out / place).write_text(json.dumps(told))

    leave(
        "vpred/metrics.json",
        identity={"latents": table("latents")},
        parents={"latents": run.table("latents").lineage()},
        weights={"model": "w1", "raw": "w2"},
        settings_hash="s1",
    )
    leave(
        "student-8/metrics.json",
        identity={"data": {"identity": "another", "version": 0}},
        parents={"teacher": {"source": "x", "weights": {"unet": "w1"}}},
        weights={"model": "w3"},
        settings_hash="s3",
    )
    leave("other/metrics.json", identity={}, parents={}, weights={"model": "w9"}, settings_hash="s9")
    leave("decoder.training/begun.json", identity={"pairs": table("pairs")})
    leave("mobile/manifest.json", identity={"parents": {"model": {"settings_hash": "s3"}, "decoder": None}})
    leave("report/index.html")


def test_trainings_models_and_bundles_are_named(run, lists, capsys):
    plant_trainings(run)
    assert carried_out(run, *lists) == 0
    [receipt] = receipts(run)
    found = receipt["descendants"]
    assert [(pin["place"], pin["table"], pin["finished"]) for pin in found["trainings"]] == [
        ("decoder", "pairs", False),
        ("vpred", "latents", True),
    ]
    assert found["models"] == ["student-8", "vpred"]
    assert found["bundles"] == ["mobile"]
    assert found["pages"] == ["report/index.html"]
    told = capsys.readouterr().out
    version = receipt["tables"]["pairs"]["before"]
    assert f"pinned to pairs version {version}, not finished: decoder" in told
    assert "weights that learned from it, and keep what they learned: student-8, vpred" in told


def test_a_training_that_is_not_finished_stops_the_erasure_and_is_named(run, lists, capsys):
    plant_trainings(run)
    assert carried_out(run, *lists, "--erase") == 1
    assert "--erase: nothing was erased" in (line := capsys.readouterr().err)
    assert "decoder (at pairs version" in line
    assert run.table("latents").num_rows == 15
    assert receipts(run)[0]["old_files"]
    assert carried_out(run, *lists, "--erase-pinned") == 0
    assert telling(run) == []


def test_a_training_of_the_newest_version_is_not_named(run, lists):
    carried_out(run, *lists)
    plant_trainings(run)
    carried_out(run, *lists)
    assert receipts(run)[-1]["descendants"]["trainings"] == []


def test_a_dry_run_counts_and_writes_nothing(run, lists, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.out.rglob("*")}
    assert carried_out(run, *lists, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "3 of 6 entries name something; 0 are on the list already" in told
    assert "would take 3 rows and 0 rejections out of latents" in told
    assert "would take 6 rows and 0 rejections out of targets" in told
    assert {path: path.stat().st_mtime_ns for path in run.out.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--url, --hash, --id: at least one of them is needed"),
        (["--url", "none.txt"], "--url none.txt: No such file"),
        (["--hash", "{bad}"], "--hash {bad}, line 1 is not a hash"),
    ],
)
def test_a_mistake_is_one_line_that_begins_with_the_option(run, tmp_path, capsys, words, said):
    bad = tmp_path / "bad.txt"
    bad.write_text("neither\n")
    assert carried_out(run, *(word.format(bad=bad) for word in words)) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"forget: {said.format(bad=bad)}")
    assert line.count("\n") == 1
    assert not (run.out / "forgotten").exists()


def test_a_run_that_is_not_there_is_said(tmp_path, lists, capsys):
    assert forget.main(["--out", str(tmp_path / "none"), *lists]) == 2
    assert "forget: --out " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_without_shards_tables_still_know_addresses_and_ids(run, lists):
    shutil.rmtree(run.out / "shards")
    assert carried_out(run, *lists) == 0
    assert run.table("latents").num_rows == 18 - 2
    [receipt] = receipts(run)
    assert receipt["looked_up_in_shards"] == {"columns": 0, "read": 0, "skipped": 0}
    assert all(fate["unmatched"] for fate in receipt["asked"] if fate["kind"] == "hash")


def test_the_jobs_of_a_run_ask_its_list(run):
    job = Job(verb="encode_latents", recipe=recipe_named("mini"), out=str(run.out))
    [veto] = [veto for veto in row_filters(job) if isinstance(veto, DeletionFilter)]
    assert veto.list.url == str(run.out / "forgotten")
    assert dict(veto.describe()) == {}


def test_lines_are_told_in_few_words():
    assert format_ranges([1, 4, 5, 6, 9]) == "1, 4-6, 9"
    assert format_ranges([]) == ""


def test_a_run_in_a_bucket(bucket, whole, lists, tiny_teacher):
    filesystem = fsspec.filesystem("s3")
    filesystem.put(f"{whole.out}/", "s3://bucket/run/", recursive=True)
    url = f"{bucket}/run"
    assert forget.main(["--out", url, "--set", "source.name=web", *lists, "--erase"]) == 0
    assert open_table(f"{url}/latents").read().num_rows == 15
    assert open_table(f"{url}/targets").read().num_rows == 30
    assert len(DeletionList(f"{url}/forgotten").read()) > 6
    filesystem.invalidate_cache()
    words = [word.encode() for row in GONE for word in (url_of(*row), caption_of(*row))]
    for path in filesystem.find("s3://bucket/run"):
        if "/shards/" not in path:
            assert not any(word in read_bytes(f"s3://{path}") for word in words), path
