import codecs
import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_files import assert_ranges_agree, corrupt, text

from pipelines.rejections import Rejection
from pipelines.sources import SourceError
from pipelines.sources.captions import Caption, captions_digest, read_captions
from pipelines.sources.layouts import SPELLINGS
from pipelines.sources.settings import CaptionSettings

SETTINGS = CaptionSettings()
WITH_IDS = CaptionSettings(id_column="id")
GOOD = ["a red circle", 'the word "START", large', "ein grüner Kreis \N{SNOWMAN}"]


def written(path: Path, text: str) -> Path:
    path.write_text(text, newline="")
    return path


def write_txt(folder: Path, captions: list[str]) -> Path:
    return written(folder / "list.txt", "\n".join(captions) + "\n")


def write_tsv(folder: Path, captions: list[str]) -> Path:
    rows = [f"{i}\t{caption}\tx" for i, caption in enumerate(captions)]
    return written(folder / "list.tsv", "\n".join(["id\tcaption\tother", *rows]))


def write_csv(folder: Path, captions: list[str]) -> Path:
    path = folder / "list.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "caption"], *enumerate(captions)])
    return path


def write_jsonl(folder: Path, captions: list[str]) -> Path:
    rows = (json.dumps({"id": i, "caption": caption}) + "\n" for i, caption in enumerate(captions))
    return written(folder / "list.jsonl", "".join(rows))


def write_parquet(folder: Path, captions: list[str]) -> Path:
    path = folder / "list.parquet"
    pq.write_table(pa.table({"caption": captions, "id": range(len(captions))}), path)
    return path


def rename_column(path: Path, name: str) -> Path:
    """Give the column of captions another name."""
    if path.suffix == ".parquet":
        pq.write_table(pq.read_table(path).rename_columns([name, "id"]), path)
        return path
    return written(path, path.read_text().replace("caption", name))


WRITERS = [write_txt, write_tsv, write_csv, write_jsonl, write_parquet]
Writer = Callable[[Path, list[str]], Path]


def read(path: Path, settings: CaptionSettings = SETTINGS) -> list[Caption | Rejection]:
    rows = list(read_captions(str(path), settings))
    assert [row.ordinal for row in rows] == list(range(len(rows)))
    return rows


def outcomes(path: Path, settings: CaptionSettings = SETTINGS) -> list[str]:
    return [row.reason if isinstance(row, Rejection) else row.text for row in read(path, settings)]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, write: Writer) -> None:
    rows = read(write(tmp_path, GOOD))
    assert rows == [Caption(id=f"{i:09d}", ordinal=i, text=text) for i, text in enumerate(GOOD)]


@pytest.mark.parametrize("write", WRITERS)
def test_an_empty_list_has_no_rows(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path, [])
    if path.suffix == ".txt":
        path.write_bytes(b"")
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"caption": pa.array([], pa.string())}), path)
    assert read(path) == []


@pytest.mark.parametrize("write", WRITERS)
def test_empty_and_very_long_captions(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path, ["", " \u00a0 ", "x" * 100_000, "y " * 50_000, "z"])
    assert outcomes(path) == ["empty_caption", "empty_caption", "x" * 2000, ("y " * 1000).rstrip(), "z"]
    assert outcomes(path, CaptionSettings(max_caption_chars=3))[2:] == ["xxx", "y y", "z"]


@pytest.mark.parametrize("write", [write_txt, write_tsv, write_csv, write_jsonl])
def test_invalid_utf8_costs_one_row(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path, ["one", "caf?", "three"])
    path.write_bytes(path.read_bytes().replace(b"caf?", b"caf\xe9"))
    assert outcomes(path) == ["one", "bad_encoding", "three"]


def test_invalid_utf8_in_parquet_costs_one_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": text(b"one", b"caf\xe9", b"three")}), tmp_path / "list.parquet")
    assert outcomes(tmp_path / "list.parquet") == ["one", "bad_encoding", "three"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_parquet_text_of_any_type(tmp_path: Path, kind: pa.DataType) -> None:
    captions = pa.array(["one", None, "one"], pa.string()).cast(pa.string())
    captions = captions.dictionary_encode() if pa.types.is_dictionary(kind) else captions.cast(kind)
    pq.write_table(pa.table({"caption": captions}), tmp_path / "list.parquet")
    assert outcomes(tmp_path / "list.parquet") == ["one", "missing_caption", "one"]


@pytest.mark.parametrize("write", [write_tsv, write_csv, write_jsonl, write_parquet])
def test_given_ids_are_kept(tmp_path: Path, write: Writer) -> None:
    assert [row.id for row in read(write(tmp_path, GOOD), WITH_IDS)] == ["0", "1", "2"]


def test_repeated_ids_are_rejected_in_every_range(tmp_path: Path) -> None:
    ids = ["7", 7, None, "", True, 8.0, "x" * 300, "y"]
    lines = (json.dumps({"id": name, "caption": "a"}) + "\n" for name in ids)
    path = written(tmp_path / "list.jsonl", "".join(lines))
    rows = read(path, WITH_IDS)
    expected = "7 duplicate_key bad_row bad_row bad_row 8 bad_row y"
    assert [(row.id if isinstance(row, Caption) else row.reason) for row in rows] == expected.split()
    assert_ranges_agree(partial(read_captions, str(path), WITH_IDS))


def test_malformed_rows_are_rejected(tmp_path: Path) -> None:
    lines = [
        '{"caption": "ok"}', "{", "[1]", '"text"', '{"caption": 3}', "{}", "", '{"caption": "\\ud800"}',
        "[" * 99_999,
    ]  # fmt: skip
    expected = "ok bad_row bad_row bad_row bad_row missing_caption empty_caption bad_encoding bad_row"
    assert outcomes(written(tmp_path / "list.jsonl", "\n".join(lines))) == expected.split()
    path = written(tmp_path / "list.tsv", "id\tcaption\n1\n2\ttwo\n\n")
    assert outcomes(path) == ["missing_caption", "two", "missing_caption"]


def test_csv_quotes_and_oversized_fields(tmp_path: Path) -> None:
    text = 'id,caption\n1,"two\nlines, ""quoted"""\n2,' + "x" * 200_000 + "\n3,after\n"
    assert outcomes(written(tmp_path / "list.csv", text)) == ['two lines, "quoted"', "bad_row", "after"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # Not closed at all, or by the quote that begins another field.
        (['1,"a', "2,b", "3,c"], ["bad_row", "b", "c"]),
        (["1,a", '2,"b', '3,"c, d"', "4,e"], ["a", "bad_row", "c, d", "e"]),
        (['1,"a', '2,"b', '3,"c'], ["bad_row"] * 3),
        (['1,"a"', '2,"b'], ["a", "bad_row"]),
        # Python's parser accepts text after a closing quote, and so did earlier versions.
        (['1,"a" b', '2,c "d', '3,"e', 'f"'], ["a b", 'c "d', "e f"]),
    ],
)
def test_an_unclosed_quote_costs_its_line(tmp_path: Path, lines: list[str], expected: list[str]) -> None:
    path = written(tmp_path / "list.csv", "\n".join(["id,caption", *lines]))
    assert outcomes(path) == expected
    assert_ranges_agree(partial(read_captions, str(path), SETTINGS))


def test_a_tsv_does_not_quote(tmp_path: Path) -> None:
    # PartiPrompts holds such a row.
    path = written(tmp_path / "list.tsv", 'Prompt\tCategory\n"G I G G L E" painted\tText\nnext\tText\n')
    assert outcomes(path, CaptionSettings(caption_column="Prompt")) == ['"G I G G L E" painted', "next"]


def test_windows_files(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert outcomes(tmp_path / "list.txt") == ["one", "two"]
    (tmp_path / "list.tsv").write_bytes(b"\xef\xbb\xbfcaption\tid\r\none\t1\r\n")
    assert read(tmp_path / "list.tsv", WITH_IDS) == [Caption(id="1", ordinal=0, text="one")]


@pytest.mark.parametrize("write", [write_txt, write_tsv, write_csv, write_jsonl])
@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_encoding_marks_and_line_ends(tmp_path: Path, write: Writer, end: str, encoding: str) -> None:
    path = write(tmp_path, GOOD)
    text = end.join(path.read_text().splitlines())
    path.write_bytes((codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b"") + text.encode(encoding))
    assert outcomes(path) == GOOD


def test_ends_and_characters_may_straddle_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sources.text_files._CHUNK_BYTES", 3)
    path = tmp_path / "list.txt"
    for data in (b"aa\r\nb\r\r\n\xc3\xa4\n\rc", "aa\r\nb\r\r\nä\n\rc".encode("utf-16")):
        path.write_bytes(data)
        assert outcomes(path) == ["aa", "b", "empty_caption", "ä", "empty_caption", "c"]


def test_unmarked_or_broken_utf16_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("one\ntwo".encode("utf-16-le"))
    assert outcomes(path) == ["bad_encoding", "bad_encoding"]
    path.write_bytes("one\n\ud800\nthree".encode("utf-16", "surrogatepass") + b"x")
    assert outcomes(path) == ["one", "bad_encoding", "bad_encoding"]
    path.write_bytes("one".encode("utf-32"))
    with pytest.raises(SourceError, match="UTF-32"):
        read(path)


def test_columns_of_one_name_must_agree(tmp_path: Path) -> None:
    path = written(tmp_path / "list.tsv", "caption\tcaption\na\ta\nb\tc\n\td\ne\t\n")
    assert outcomes(path) == ["a", "bad_row", "d", "e"]
    columns = [pa.array(["a", "b", "e"]), pa.array(["a", "c", None])]
    pq.write_table(pa.Table.from_arrays(columns, names=["caption", "caption"]), tmp_path / "list.parquet")
    assert outcomes(tmp_path / "list.parquet") == ["a", "bad_metadata", "e"]


def test_a_corrupt_page_costs_its_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": list("abcdef")}), tmp_path / "list.parquet", row_group_size=2)
    corrupt(tmp_path / "list.parquet", group=1, column="caption")
    assert outcomes(tmp_path / "list.parquet") == ["a", "b", "torn_shard", "torn_shard", "e", "f"]


def test_endless_lines_are_truncated(tmp_path: Path) -> None:
    path = written(tmp_path / "list.txt", "first\n" + "x" * 10_000_000 + "\nlast")
    assert outcomes(path) == ["first", "x" * 2000, "last"]


@pytest.mark.parametrize("write", [write_tsv, write_csv, write_parquet])
def test_a_missing_column_is_named(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path, GOOD)
    with pytest.raises(SourceError, match=r"list\.\w+: no caption column named text; it has .*caption"):
        read(path, CaptionSettings(caption_column="text"))


@pytest.mark.parametrize("write", [write_tsv, write_csv, write_jsonl, write_parquet])
@pytest.mark.parametrize("name", SPELLINGS["caption"])
def test_the_column_of_captions_is_found(tmp_path: Path, write: Writer, name: str) -> None:
    path = rename_column(write(tmp_path, GOOD), name)
    assert outcomes(path) == outcomes(path, CaptionSettings(caption_column=name)) == GOOD


@pytest.mark.parametrize("write", [write_tsv, write_csv, write_jsonl, write_parquet])
def test_a_list_without_captions_is_refused(tmp_path: Path, write: Writer) -> None:
    path = rename_column(write(tmp_path, GOOD), "title")
    message = (
        r"list\.\w+: no caption column named caption or TEXT or text or prompt or Prompt; it has .*title"
    )
    with pytest.raises(SourceError, match=message):
        read(path)
    assert outcomes(path, CaptionSettings(caption_column="title")) == GOOD


def test_of_several_columns_the_most_trusted_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "list.tsv", "Prompt\ttext\tcaption\nx\ty\tz\nx\ty\t\n")
    assert outcomes(path) == ["z", "empty_caption"]
    assert outcomes(path, CaptionSettings(caption_column="Prompt")) == ["x", "x"]


def test_names_of_columns_stay_on_a_short_line(tmp_path: Path) -> None:
    path = written(tmp_path / "list.csv", '"a\nb",' + "x" * 10_000)
    with pytest.raises(SourceError, match=r"it has a\\nb, x+\.\.\.: set") as error:
        read(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.doc", b"", "no known format"),
        ("list.txt", None, "list.txt: no such file"),
        ("list.parquet", b"PAR1", "not readable as Parquet"),
    ],
)
def test_unreadable_lists_are_an_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read(tmp_path / name)


def test_other_misuse_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a \.txt has no columns"):
        read(write_txt(tmp_path, GOOD), WITH_IDS)
    for captions in ([["a", "list"]], [7], pa.array([0.5]).dictionary_encode()):
        pq.write_table(pa.table({"caption": captions}), tmp_path / "other.parquet")
        with pytest.raises(SourceError, match="text is accepted"):
            read(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="start -1"):
        list(read_captions(str(tmp_path / "list.txt"), SETTINGS, start=-1))


def test_digests_of_version_0_1_are_unchanged(tmp_path: Path) -> None:
    """Tables record them. The lists of 0.1 had a column `caption`, which rows could lack."""
    path = write_jsonl(tmp_path, GOOD)
    path.write_text(path.read_text() + '{}\n{"id": 4, "text": "x"}\n')
    by_position = "c673559bbcc32bd25fb6bda04294ec39668275593e41e07ba9b18907deb37732"
    assert captions_digest(read(path)) == by_position
    assert captions_digest(read(path, CaptionSettings(caption_column="caption"))) == by_position
    by_id = "a64c09db8b90125be6d4f909878088075c2a01adda9265c85bea63a096ecb878"
    assert captions_digest(read(path, WITH_IDS)) == by_id


def test_the_digest_covers_ids_texts_and_rejections(tmp_path: Path) -> None:
    def of(captions: list[str], settings: CaptionSettings = SETTINGS) -> str:
        return captions_digest(read(write_csv(tmp_path, captions), settings))

    assert of(GOOD) == of([f"  {text}" for text in GOOD])
    assert len({of(GOOD), of(GOOD[:2]), of([*GOOD[:2], ""]), of(GOOD, WITH_IDS), of(GOOD[::-1]), of([])}) == 6
    one, other = Caption(id="a", ordinal=0, text="bc"), Caption(id="ab", ordinal=0, text="c")
    assert captions_digest([one]) != captions_digest([other])
