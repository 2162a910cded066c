"""Settings of downloads with img2dataset."""

from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from pipelines.fetching.addresses import parse_networks
from pipelines.ray_data.settings import Pool
from pipelines.sources.settings import LinkSettings
from snapfusion.settings import FOLDER_NAME, Settings

Directive = Literal["noai", "noimageai", "noindex", "noimageindex", "tdm-reservation"]

RESIZING: Final = ("image_size", "resize_mode", "resize_only_if_bigger", "encode_quality")
"""The settings of `FetchSettings` that img2dataset's resizer takes."""


class FetchLimits(Settings):
    """Bounds on one image.

    Attributes:
        seconds: of one attempt, from the name's look-up to the last byte, redirects included.
        tries: attempts in one round; only transient causes, such as a busy server, are retried.
        pause: seconds before the second attempt, doubled before each further one.
        max_bytes: of an image file.
        max_pixels: that an image's header may announce; decoding takes up to 72 bytes for each.
        max_redirects: that are followed.
        decode_seconds: for decoding, resizing and encoding; a process that takes longer is killed.
    """

    seconds: float = Field(20.0, gt=0)
    tries: int = Field(2, ge=1)
    pause: float = Field(1.0, ge=0)
    max_bytes: int = Field(16 << 20, ge=1)
    max_pixels: int = Field(1 << 25, ge=1)
    max_redirects: int = Field(5, ge=0)
    decode_seconds: float = Field(60.0, gt=0)


class FetchSettings(Settings):
    """Settings of fetching and storing the images of a shard.

    Attributes:
        python: the interpreter of img2dataset's environment, on the machines that download.
        image_size: pixels of the side that `resize_mode` determines.
        resize_mode: img2dataset's; "keep_ratio" resizes the shorter side to `image_size`.
        resize_only_if_bigger: whether smaller images keep their size.
        encode_quality: of the JPEGs that are written.
        threads: concurrent requests of one process.
        limits: of each image.
        user_agent_token: the user agent's name, which opt-outs may address.
        respected: opt-outs in response headers that are respected: directives of X-Robots-Tag, and
            "tdm-reservation" for TDM-Reservation. () respects none, and is recorded in each receipt.
        private_networks: networks that may be reached although they are not on the open internet, such as
            10.20.0.0/16.
    """

    python: str = ".venv-img2dataset/bin/python"
    image_size: int = Field(512, ge=1)
    resize_mode: Literal["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"] = "keep_ratio"
    resize_only_if_bigger: bool = True
    encode_quality: int = Field(95, ge=1, le=100)
    threads: int = Field(64, ge=1)
    limits: FetchLimits = FetchLimits()
    user_agent_token: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "img2dataset"
    respected: tuple[Directive, ...] = ("noai", "noimageai", "noindex", "noimageindex", "tdm-reservation")
    private_networks: tuple[str, ...] = ()

    @field_validator("private_networks")
    @classmethod
    def _are_networks(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        parse_networks(texts)
        return texts


class DownloadSettings(Settings):
    """Settings of downloading URL lists.

    Attributes:
        links: Parquet lists of URLs and captions: one file, a folder of them or a glob.
        folder: of the shards, in the run.
        columns: the columns of the lists.
        rows_per_shard: rows of a list per shard; rows that are refused make the shard smaller.
        fetching: settings of fetching and storing images.
        retry_rounds: rounds of retries of rows that failed for a transient cause, after all others. A run
            with more rounds than the last one retries what is left.
        max_failed: fraction of the requested rows that may fail in the first attempt. Old lists lose half.
        judged_after: requested rows before that fraction is checked.
        pool: the actors that download; each runs one process of `fetching.threads` threads.
    """

    links: str | None = None
    folder: str = Field("shards", pattern=FOLDER_NAME)
    columns: LinkSettings = LinkSettings()
    rows_per_shard: int = Field(10_000, ge=1)
    fetching: FetchSettings = FetchSettings()
    retry_rounds: int = Field(0, ge=0)
    max_failed: float = Field(0.9, ge=0.0, le=1.0)
    judged_after: int = Field(1_000, ge=0)
    pool: Pool = Pool(cpus=1.0)
