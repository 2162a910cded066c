"""Jobs from shards with copies to LATENTS without them."""

import re
from pathlib import Path

import pytest
from copy_inputs import encoded, near_copies, photograph, row, write_shards
from in_process import in_process
from set_options import set_options
from shuffled_rows import read_shuffled

from jobs import encode_latents, find_duplicates, verify_table
from pipelines.tables.table import open_table


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    """A run of two shards; one image of the second is in the evaluation, and two copy the first shard."""
    for job in (encode_latents, find_duplicates):
        monkeypatch.setattr(job, "runner", lambda *_, **__: in_process)
    monkeypatch.setattr(find_duplicates, "reader", lambda *_: read_shuffled(0))
    second = [row(100), row(101, image=encoded(photograph(1))), row(102, image=near_copies(0)["brighter"])]
    write_shards(tmp_path / "run" / "shards", [[row(n) for n in range(3)], second])
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "a.jpg").write_bytes(encoded(photograph(100)))
    return tmp_path / "run"


def options(out: Path, model: str, *settings: str) -> list[str]:
    return ["--out", str(out), *set_options([f"model={model}", "latents.images.min_side=8", *settings])]


def test_copies_are_counted_rejected_and_verified(out, tiny_teacher, capsys):
    evaluation = f'deduplication.evaluation.images=["{out.parent}/val2014"]'
    settings = options(out, tiny_teacher, "deduplication.use=true", evaluation)
    assert find_duplicates.main([*settings, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert f"would read {out.parent}/val2014 of the evaluation" in output
    assert f"into {out}/duplicates (does not exist yet)" in output
    assert find_duplicates.main(settings) == 0
    output = capsys.readouterr().out
    assert re.search(
        r"FINGERPRINTS of the evaluation version \d+: 2 rows in \d+ units, none rejected", output
    )
    assert "6 rows, 3 rejected (1 evaluation_image, 1 duplicate_image, 1 near_duplicate_image)" in output
    assert "3 of them, 50.0%" in output
    assert encode_latents.main(settings) == 0
    assert open_table(str(out / "latents")).num_rows == 3
    assert {one["id"][-3:]: one["reason"] for one in open_table(str(out / "latents")).rejected_rows()} == {
        "100": "evaluation_image",
        "101": "duplicate_image",
        "102": "near_duplicate_image",
    }
    for table in ("fingerprints", "duplicates", "latents"):
        assert verify_table.main([*settings, str(out / table)]) == 0, table
    assert "its round is made as a whole" in capsys.readouterr().out


def test_latents_need_verdicts_on_the_same_rows(out, tiny_teacher, capsys):
    use = options(out, tiny_teacher, "deduplication.use=true")
    assert encode_latents.main(use) == 2
    assert "run jobs.find_duplicates first" in capsys.readouterr().err
    assert find_duplicates.main(use) == 0
    other = options(out, tiny_teacher, "deduplication.use=true", "latents.selection.min_caption_chars=3")
    assert encode_latents.main(other) == 2
    assert "selection.min_caption_chars is null there, 3 here" in capsys.readouterr().err
    for differing, message in (
        ('deduplication.evaluation.captions=["list.txt"]', "evaluation is null there"),
        ('deduplication.against=["/elsewhere"]', 'against is [] there, ["/elsewhere"] here'),
        ("deduplication.max_hamming=null", "max_hamming is 4 there, null here"),
        ("deduplication.table=others", "others does not exist"),
    ):
        assert encode_latents.main([*use, "--set", differing]) == 2
        assert message in capsys.readouterr().err
    assert encode_latents.main(options(out, tiny_teacher)) == 0
    assert open_table(str(out / "latents")).num_rows == 6
    assert encode_latents.main(use) == 2
    assert "latents was made with other settings: duplicates is null there" in capsys.readouterr().err
