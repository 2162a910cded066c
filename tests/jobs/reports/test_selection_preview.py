"""Preview of a selection by `jobs.encode_latents --dry-run`, compared with what encoding finds."""

import io
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import in_process
from layout_fixtures import LIST_LAYOUTS, write_list
from PIL import Image
from set_options import set_options

from jobs import encode_latents
from pipelines.datasets.preview import preview_links, preview_shards
from pipelines.sources.links import list_links
from pipelines.sources.settings import LinkSettings, ShardSettings
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import list_shards
from pipelines.stages.settings import ImageBounds, Selection
from pipelines.tables.manifest import total_rejected
from pipelines.tables.table import open_table
from snapfusion.models.bundled import BUNDLED
from snapfusion.models.errors import ModelError
from snapfusion.models.load import ModelDimensions, load, load_sizes


def jpeg(shade: int, *, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (shade % 256, 80, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


def shard_row(number: int) -> ShardRow:
    """Widths 40, 44, ...; scores 4.0, 4.1, ...; every tenth row was not downloaded, every 25th is broken."""
    metadata = {"aesthetic": 4.0 + number % 40 / 10, "NSFW": "UNLIKELY" if number % 4 else "UNSURE"}
    url = f"https://{'bad' if number % 20 == 3 else 'good'}.example/{number}.jpg"
    if number % 10 == 9:
        failure = {"status": "failed_to_download", "error_message": "HTTP Error 404: File not found"}
        return ShardRow(image=None, caption="a", url=url, metadata=metadata, **failure)
    image = jpeg(number, width=40 + 4 * (number % 40), height=48)
    if number % 25 == 12:
        image = image[:200]
    return ShardRow(image=image, caption=f"a picture of number {number}", url=url, metadata=metadata)


def write_shards(folder: Path, *, shards: int, rows: int) -> None:
    for index in range(shards):
        numbers = range(index * rows, (index + 1) * rows)
        write_shard(str(folder), map(shard_row, numbers), index=index, rows_per_shard=rows)


def preview(capsys, out: Path, *settings: str, recipe: str = "mini") -> list[str]:
    options = ["--dry-run", "--recipe", recipe, "--out", str(out), *set_options(settings)]
    assert encode_latents.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines[next(n for n, line in enumerate(lines) if line.startswith("would encode")) :]


BOUNDED = (
    "latents.selection.min_side=44",
    "latents.selection.min_aesthetic=5.0",
    "latents.selection.max_watermark=0.5",
    'latents.selection.refused_tags=["UNSURE"]',
)


# Of numbers 0 to 199: 20 end in 9; 5 are 40 px wide, whose numbers are multiples of 40; 40 score 4.1 to 4.8;
# of those that score more 35 are multiples of 4; 5 are of bad.example; 4 are broken; 91 are left.
OUTCOMES = {
    "kept": 91,
    "low_aesthetic": 40,
    "unsafe": 35,
    "download_failed": 20,
    "blocked_domain": 5,
    "short_side": 5,
    "broken_image": 4,
}
DOCUMENT = Path(__file__).parents[3] / "docs" / "sources.md"


def test_a_preview_of_all_rows_is_a_table(tmp_path, capsys):
    write_shards(tmp_path / "shards", shards=2, rows=100)
    (tmp_path / "domains.txt").write_text("bad.example\n")
    lines = preview(capsys, tmp_path, *BOUNDED, f"source.blocklists.domains={tmp_path}/domains.txt")
    assert max(map(len, lines[1:])) <= 100
    assert {line.split()[0]: int(line.split()[1]) for line in lines[6 : 6 + len(OUTCOMES)]} == OUTCOMES
    # The document shows this table; only the message for a broken image depends on Pillow's version.
    table = [line for line in lines[2:] if not line.startswith("broken_image")]
    document = [line for line in DOCUMENT.read_text().splitlines() if not line.startswith("broken_image")]
    start = document.index(table[0])
    assert document[start : start + len(table)] == table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["domains.txt", "shards"]


def test_encoding_finds_what_the_preview_showed(tmp_path, capsys, monkeypatch):
    write_shards(tmp_path / "shards", shards=2, rows=100)
    domains = tmp_path / "domains.txt"
    domains.write_text("# comment\nbad.example\n")
    settings = (*BOUNDED, f"source.blocklists.domains={domains}", "latents.bounds.max_rejected=0.9")
    size = preview(capsys, tmp_path, *settings)[-1]
    monkeypatch.setattr(encode_latents, "runner", lambda *_, **__: in_process)
    options = ["--out", str(tmp_path), *set_options(settings)]
    assert encode_latents.main(options) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "max_watermark rejects" in line]
    assert "pwatermark, watermark_score" in line
    table = open_table(str(tmp_path / "latents"))
    assert {"kept": table.num_rows, **total_rejected(table.manifests().values())} == OUTCOMES
    groups = [pq.read_metadata(file.path).row_group(0) for file in table.units]
    columns = sum(group.column(n).total_compressed_size for group in groups for n in range(group.num_columns))
    assert float(size.split()[3]) * 1000 == pytest.approx(columns, rel=0.15)
    # The same list in another form is accepted; another list would make other rows.
    domains.write_text("*.BAD.example.\n")
    assert encode_latents.main(options) == 0
    domains.write_text("bad.example\nworse.example\n")
    assert encode_latents.main(options) == 2
    assert "blocklists.domains is" in capsys.readouterr().err


def sampled(shards: Path, *, rows: int, selection: Selection) -> Any:
    return preview_shards(
        list_shards(str(shards)),
        rows=rows,
        source="laion",
        reading=ShardSettings(),
        selection=selection,
        images=ImageBounds(),
    )


def test_a_sample_is_spread_over_shards(tmp_path):
    write_shards(tmp_path, shards=20, rows=50)
    sample = sampled(tmp_path, rows=200, selection=Selection())
    assert (sample.rows, sample.num_sources) == (200, 8)
    # Every tenth row failed, and every 25th of the others is broken.
    assert 16 <= sample.rejected["download_failed"].rows <= 24
    assert sample.accepted + sum(refused.rows for refused in sample.rejected.values()) == 200
    assert sampled(tmp_path, rows=3, selection=Selection()).num_sources == 3
    assert sampled(tmp_path, rows=10_000, selection=Selection()).rows == 400


def test_the_number_of_rows_is_unknown_without_sidecars(tmp_path, capsys):
    write_shards(tmp_path / "shards", shards=3, rows=10)
    (tmp_path / "shards" / "00001.parquet").unlink()
    lines = preview(capsys, tmp_path)
    assert lines[2] == "sampled 30 rows, from 3 of 3 shards"  # the stats file counts one that failed
    assert lines[-1] == "the number of rows is unknown: 1 shards have no sidecar"


def test_a_model_out_of_reach_leaves_the_size_unknown(tmp_path, capsys):
    write_shards(tmp_path / "shards", shards=1, rows=5)
    unbounded = [f"latents.selection.{name}=null" for name in ("min_width", "min_height", "min_aesthetic")]
    settings = (f"source.url={tmp_path / 'shards'}", "latents.images.min_side=8", *unbounded)
    lines = preview(capsys, tmp_path, *settings, recipe="sd15")
    assert lines[-1].startswith("their size is unknown: ")
    assert "stable-diffusion-v1-5" in lines[-1]


def test_url_lists_are_previewed_before_download(tmp_path, capsys):
    layout = next(layout for layout in LIST_LAYOUTS if layout.name == "LAION-Aesthetics V2")
    write_list(tmp_path / "lists", layout, copy=True)
    settings = (f"download.links={tmp_path}/lists", "latents.selection.min_width=250")
    lines = preview(capsys, tmp_path, *settings)
    assert lines[2:10] == [
        "sampled 12 rows of 12, from 1 of 1 lists",
        "layout: LAION-Aesthetics V2, read by URL and TEXT",
        "",
        "                     rows   share  for example",
        "kept                    6   50.0%",
        "low_resolution          2   16.7%  width 100 is below 250",
        "bad_url                 1    8.3%  not http or https: data:image/png;base64,AAAA",
        "empty_caption           1    8.3%",
    ]
    assert lines[-1] == "of 12 rows about 6 would be kept"
    write_shards(tmp_path / "shards", shards=1, rows=5)
    assert "shards" in preview(capsys, tmp_path, *settings)[2]


def test_link_sample_is_spread_over_each_list(tmp_path):
    rows = 100_000
    table = pa.table(
        {"URL": [f"http://a/{n}" for n in range(rows)], "TEXT": ["x"] * rows, "WIDTH": range(1, rows + 1)}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10_000)
    sample = preview_links(
        list_links(str(tmp_path)), rows=80, columns=LinkSettings(), selection=Selection(min_width=50_001)
    )
    assert (sample.rows, sample.accepted) == (80, 40)
    assert sorted(sample.measures["width"])[::10] == [*range(1, rows, 12_500)]


def test_without_shards_and_lists_nothing_is_sampled(tmp_path, capsys):
    assert f"no shards at {tmp_path}/run/shards" in preview(capsys, tmp_path / "run")[-1]
    assert encode_latents.main(["--dry-run", "--set", f"source.url={tmp_path}/none"]) == 2
    assert "no shards at" in capsys.readouterr().err


def test_sizes_are_read_without_weights():
    bundle = load("mini")
    assert load_sizes("mini") == ModelDimensions(
        side=bundle.image_size,
        cell=bundle.cell,
        granularity=bundle.granularity,
        channels=bundle.latent_shape[0],
    )
    assert load_sizes("random:sd15") == ModelDimensions(side=512, cell=8, granularity=64, channels=4)


def test_sizes_are_read_from_a_store(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("unet/config.json", "vae/config.json"):
        memory.pipe_file(f"/run/model/{name}", (BUNDLED["mini"] / name).read_bytes())
    assert load_sizes("memory://run") == load_sizes("mini")
    with pytest.raises(ModelError, match="configurations cannot be read"):
        load_sizes("memory://elsewhere")


def test_unsupported_image_size_is_refused(tmp_path, capsys):
    write_shards(tmp_path / "shards", shards=1, rows=10)
    assert encode_latents.main(["--dry-run", "--out", str(tmp_path), "--set", "latents.images.size=30"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("encode_latents: latents.images.size is 30; multiples of 16 are accepted")
