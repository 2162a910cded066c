"""Settings of downloads by img2dataset."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipelines.fetching.addresses import parse_networks
from pipelines.ray_data.settings import Pool
from pipelines.sources.settings import LinkSettings
from snapfusion.settings import Settings

Directive = Literal["noai", "noimageai", "noindex", "noimageindex", "tdm-reservation"]


class FetchLimits(Settings):
    """What one picture may cost.

    Attributes:
        seconds: of one try, from the look-up of the name to the last byte, redirections included.
        tries: of one picture at a time; only what may pass, such as a busy server, is tried again.
        pause: seconds before the second try; twice as long before each further one.
        max_bytes: of a picture's file.
        max_pixels: that a picture's header may announce; decoding takes up to 72 bytes for each.
        max_redirects: that are followed.
        decode_seconds: for decoding, resizing and encoding; a process that needs longer is ended.
    """

    seconds: float = Field(20.0, gt=0)
    tries: int = Field(2, ge=1)
    pause: float = Field(1.0, ge=0)
    max_bytes: int = Field(16 << 20, ge=1)
    max_pixels: int = Field(1 << 25, ge=1)
    max_redirects: int = Field(5, ge=0)
    decode_seconds: float = Field(60.0, gt=0)


class FetchSettings(Settings):
    """How a shard's pictures are fetched and stored.

    Attributes:
        python: the interpreter of img2dataset's environment, on the machines that download.
        image_size: pixels; which side it is of is `resize_mode`'s matter.
        resize_mode: img2dataset's; "keep_ratio" makes the shorter side `image_size`.
        resize_only_if_bigger: whether smaller pictures stay as they are.
        encode_quality: of the JPEGs that are written.
        threads: pictures that are fetched at a time, by one process.
        limits: of each picture.
        user_agent_token: the name that servers are given, and by which they may ask us to stay away.
        respected: requests in a server's headers that are respected: directives of X-Robots-Tag, and
            "tdm-reservation" for TDM-Reservation. () respects none, and is recorded in each receipt.
        private_networks: addresses that may be fetched from although they are not of the open internet, such
            as 10.20.0.0/16.
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
    def _are_networks(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        parse_networks(given)
        return given


class DownloadSettings(Settings):
    """How URL lists become shards.

    Attributes:
        links: Parquet lists of URLs and captions: one file, a folder of them or a glob.
        place: where in the run the shards go.
        columns: what is read of the lists.
        rows_per_shard: rows of a list that one shard is made of; what is refused of them leaves it smaller.
        fetching: how pictures are fetched and stored.
        retry_rounds: how often rows that failed for a cause that may pass are tried again, after all others.
            A run with more rounds than the last one tries again what is left.
        max_failed: fraction of the rows asked for that may fail in a first try. Old lists lose half.
        judged_after: rows asked for before the fraction is judged.
        pool: the actors that download; each runs one process of `fetching.threads` threads.
    """

    links: str | None = None
    place: str = Field("shards", pattern=r"^[A-Za-z0-9_.-]+$")
    columns: LinkSettings = LinkSettings()
    rows_per_shard: int = Field(10_000, ge=1)
    fetching: FetchSettings = FetchSettings()
    retry_rounds: int = Field(0, ge=0)
    max_failed: float = Field(0.9, ge=0.0, le=1.0)
    judged_after: int = Field(1_000, ge=0)
    pool: Pool = Pool(cpus=1.0)
