"""Downloads a list in this process, so that a test can kill it. Arguments: list, shards, interpreter."""

import sys

from in_process import in_process

from pipelines.download.downloads import download_shards
from pipelines.download.settings import DownloadSettings, FetchLimits, FetchSettings
from pipelines.stages.settings import Selection

links, url, python = sys.argv[1:]
fetching = FetchSettings(
    python=python,
    image_size=32,
    threads=8,
    private_networks=("127.0.0.1/32",),
    limits=FetchLimits(seconds=2.0, tries=1, max_bytes=100_000, max_pixels=1 << 20),
)
settings = DownloadSettings(links=links, rows_per_shard=4, fetching=fetching)
download_shards(settings, selection=Selection(min_caption_chars=4), url=url, run=in_process)
