"""`jobs.download_shards` on Ray."""

from pathlib import Path

import local_web as pages
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from set_options import set_options

from jobs import download_shards
from pipelines.sources.webdataset import list_shards

PYTHON = Path(__file__).parent.parent.parent / ".venv-img2dataset/bin/python"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(not PYTHON.exists(), reason="img2dataset is not installed: `make downloader`")
def test_shards_are_downloaded_on_ray_and_not_again(ray_cluster, tmp_path, capsys):
    with pages.local_web() as web:
        urls = [web.serve(f"/{number}.jpg", pages.image(number)) for number in range(5)]
        rows = {"url": [*urls, web.url("/none"), urls[0]], "text": [f"picture {row}" for row in range(7)]}
        pq.write_table(pa.table(rows), tmp_path / "coyo.parquet")
        settings = {
            "links": str(tmp_path / "coyo.parquet"),
            "rows_per_shard": "4",
            "fetching.python": str(PYTHON),
            "fetching.private_networks": '["127.0.0.1"]',
            "fetching.threads": "4",
        }
        options = set_options(f"download.{key}={value}" for key, value in settings.items())
        for _ in range(2):
            assert download_shards.main([*options, "--out", str(tmp_path / "run")]) == 0
            output = capsys.readouterr().out
            for line in ("7 rows: 5 images in 2 shards", "rejected: 1 repeated_url", "failed: 1 gone"):
                assert line in output
        assert web.requests.total() == 6
    assert [shard.name for shard in list_shards(str(tmp_path / "run/shards"))] == ["00000", "00001"]
