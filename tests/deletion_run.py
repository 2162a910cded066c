"""A run with LATENTS, TARGETS and PAIRS of a few planted rows, as jobs leave it, made in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from in_process import in_process
from latent_inputs import SETTINGS as LATENTS
from latent_inputs import noise_image as image
from pair_inputs import SETTINGS as PAIRS
from target_inputs import SETTINGS as TARGETS

from pipelines.datasets.latents import encode_latents
from pipelines.datasets.pairs import captions_of, generate_pairs, withhold_deleted
from pipelines.datasets.targets import compute_targets
from pipelines.sources.shards import ShardRow, write_shard
from pipelines.sources.webdataset import list_shards
from pipelines.stages.deletion_filter import DeletionFilter
from pipelines.tables.deletion_list import DeletionKeys, DeletionList, normalize_url, sha256_key
from pipelines.tables.table import Snapshot, open_table

ROWS = 10
TABLES = ("latents", "targets", "pairs")


def url_of(shard: int, row: int) -> str:
    """The URL of a planted image."""
    return f"http://origin.example/{shard}/secret-{row}.png"


def caption_of(shard: int, row: int) -> str:
    """A caption that no other row has."""
    return f"whisper {shard}x{row} unheard"


def id_of(shard: int, row: int) -> str:
    """The id of a row of LATENTS."""
    return f"web/{shard:05d}/{shard * 100 + row:07d}"


def make_shards(folder: Path, *, shards: int = 2) -> None:
    """Shards of ten rows, the fourth of which is no image."""
    for index in range(shards):
        rows = [
            ShardRow(
                image=b"this is text" if row == 3 else image(100 * index + row),
                caption=caption_of(index, row),
                url=url_of(index, row),
            )
            for row in range(ROWS)
        ]
        write_shard(str(folder), rows, index=index, extension="png", rows_per_shard=100)


class Run:
    """A run's folder and the jobs on it."""

    def __init__(self, out: Path, *, teacher: str) -> None:
        self.out = out
        self.teacher = teacher
        self.list = DeletionList(str(out / "forgotten"))

    @property
    def urls(self) -> list[str]:
        """The URLs of the tables."""
        return [str(self.out / name) for name in TABLES]

    def table(self, name: str) -> Snapshot:
        """The newest version."""
        return open_table(str(self.out / name))

    def encode(self, name: str = "latents") -> Snapshot:
        """As `jobs.encode_latents`."""
        return encode_latents(
            LATENTS,
            model=self.teacher,
            shards=list_shards(str(self.out / "shards")),
            source="web",
            url=str(self.out / name),
            filters=[DeletionFilter(self.list)],
            run=in_process,
        )

    def compute_targets(self, *, draws: int = 2) -> Snapshot:
        """As `jobs.compute_targets`."""
        return compute_targets(
            TARGETS.with_values([f"draws={draws}"]),
            teacher=self.teacher,
            latents=self.table("latents"),
            url=str(self.out / "targets"),
            run=in_process,
        )

    def generate_pairs(self, *, draws: int = 1) -> Snapshot:
        """As `jobs.generate_pairs`, of the captions of LATENTS."""
        return generate_pairs(
            PAIRS.with_values([f"draws={draws}"]),
            teacher=self.teacher,
            captions=withhold_deleted(captions_of(self.table("latents")), self.list.read()),
            source="captions",
            url=str(self.out / "pairs"),
            run=in_process,
        )

    def copy(self, out: Path) -> Run:
        """The same run somewhere else."""
        shutil.copytree(self.out, out)
        return Run(out, teacher=self.teacher)


def make_run(out: Path, *, teacher: str) -> Run:
    """All tables, brought up to date."""
    run = Run(out, teacher=teacher)
    make_shards(out / "shards")
    run.encode()
    run.compute_targets()
    run.generate_pairs()
    return run


def keys_of(
    *, urls: Iterable[str] = (), ids: Iterable[str] = (), hashes: Iterable[object] = ()
) -> DeletionKeys:
    """The keys of a request."""
    return DeletionKeys(
        urls=frozenset(sha256_key(normalize_url(url)) for url in urls),
        ids=frozenset(map(sha256_key, ids)),
        hashes=frozenset(sha256_key(str(value)) for value in hashes),
    )
