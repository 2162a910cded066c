"""Batches of the same rows by this project's loader and by others'; test_peers starts a process for each.

    python peer_loaders.py LOADER FOLDER

reads an epoch for each line that comes in, and prints what it cost as a line of JSON. All yield ids, latents
in float32 and token ids in int64, as tensors. With `write` for LOADER it writes the rows of FOLDER/latents in
the other formats.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

BATCH = 64
SHAPE = (4, 64, 64)
TOKENS = 77
FILES_AT_ONCE = 8
Item = tuple[list[str], torch.Tensor, torch.Tensor]


def of_lists(rows: pa.Table) -> Item:
    """Rows whose arrays are lists of a fixed size."""
    latents, tokens = (rows[name].combine_chunks().flatten().to_numpy() for name in ("latent", "token_ids"))
    return rows["id"].to_pylist(), *tensors(latents, tokens, rows=rows.num_rows)


def of_bytes(rows: pa.Table) -> Item:
    """Rows whose arrays are bytes."""
    values = []
    for name, dtype in (("latent", np.float16), ("token_ids", np.int32)):
        column = rows[name].combine_chunks()
        _, offsets, data = column.buffers()
        starts = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
        values.append(np.frombuffer(data, np.uint8)[starts[0] : starts[-1]].view(dtype))
    return rows["id"].to_pylist(), *tensors(*values, rows=rows.num_rows)


def tensors(latents: np.ndarray, tokens: np.ndarray, *, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 [rows, 4, 64, 64] and int64 [rows, 77]."""
    # NumPy takes three times as long to widen float16.
    latent = torch.from_numpy(np.require(latents, requirements="W")).float().view(rows, *SHAPE)
    return latent, torch.from_numpy(np.require(tokens, requirements="W")).long().view(rows, TOKENS)


def in_batches(order: np.ndarray) -> Iterator[np.ndarray]:
    """Pieces of an order."""
    return (order[start : start + BATCH] for start in range(0, len(order), BATCH))


def own(folder: Path, epoch: int, *, window: int) -> Iterator[Item]:
    """This project's loader; files are checked anew in each epoch, if at all."""
    from pipelines.loading.loader import BatchLoader
    from pipelines.loading.settings import LoaderSettings
    from pipelines.tables import integrity
    from pipelines.tables.table import open_table

    integrity._checked.clear()
    settings = LoaderSettings(window_units=window)
    columns = ["latent", "token_ids"]
    table = open_table(str(folder / "latents"))
    loader = BatchLoader(table, columns=columns, global_batch=BATCH, seed=epoch, settings=settings)
    for batch in itertools.islice(loader.stream(0), table.num_rows // BATCH):
        yield list(batch.ids), batch["latent"], batch["token_ids"]


def by_pyarrow(folder: Path, epoch: int) -> Iterator[Item]:
    """Eight whole files at a time, joined and shuffled."""
    random = np.random.default_rng(epoch)
    files = random.permutation(sorted((folder / "latents").glob("*.parquet")))
    for start in range(0, len(files), FILES_AT_ONCE):
        parts = [
            pq.ParquetFile(file).read(["id", "latent", "token_ids"], use_threads=False)
            for file in files[start : start + FILES_AT_ONCE]
        ]
        rows = pa.concat_tables(parts).combine_chunks()
        for indices in in_batches(random.permutation(rows.num_rows)):
            yield of_bytes(rows.take(indices))


def by_datasets(folder: Path, epoch: int) -> Iterator[Item]:
    """A permutation of a memory map, read in batches of Arrow."""
    from datasets import load_from_disk

    rows = load_from_disk(str(folder / "datasets")).with_format("arrow")
    for indices in in_batches(np.random.default_rng(epoch).permutation(len(rows))):
        yield of_lists(rows[indices])


def by_lance(folder: Path, epoch: int) -> Iterator[Item]:
    """A permutation of all rows, by `take`."""
    import lance

    rows = lance.dataset(str(folder / "lance"))
    for indices in in_batches(np.random.default_rng(epoch).permutation(rows.count_rows())):
        yield of_lists(rows.take(indices, columns=["id", "latent", "token_ids"]))


def by_streaming(folder: Path, epoch: int) -> Iterator[Item]:
    """MDS shards with the default shuffle, through PyTorch's DataLoader."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    rows = StreamingDataset(local=str(folder / "mds"), batch_size=BATCH, shuffle=True, shuffle_seed=epoch)
    for batch in torch.utils.data.DataLoader(rows, batch_size=BATCH):
        yield batch["id"], batch["latent"].float(), batch["token_ids"].long()


def by_webdataset(folder: Path, epoch: int) -> Iterator[Item]:
    """Tar shards, in another order each epoch, with a buffer of 1,024 rows."""
    import webdataset

    shards = sorted(map(str, (folder / "webdataset").glob("*.tar")))
    rows = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=epoch).shuffle(1024).decode()
    for ids, latents, tokens in rows.to_tuple("txt", "latent.npy", "token_ids.npy").batched(BATCH):
        yield ids, *tensors(np.asarray(latents), np.asarray(tokens), rows=len(ids))


LOADERS = {
    "own-8": lambda folder, epoch: own(folder, epoch, window=8),
    "own-64": lambda folder, epoch: own(folder, epoch, window=64),
    "pyarrow": by_pyarrow,
    "datasets": by_datasets,
    "lance": by_lance,
    "mosaicml-streaming": by_streaming,
    "webdataset": by_webdataset,
}


def write(folder: Path) -> None:
    """The rows of FOLDER/latents in the formats of the others."""
    import datasets
    import lance
    import webdataset
    from streaming import MDSWriter

    files = sorted((folder / "latents").glob("*.parquet"))
    latent, token_ids = pa.list_(pa.float16(), math.prod(SHAPE)), pa.list_(pa.int32(), TOKENS)
    kinds = {"id": pa.string(), "latent": latent, "token_ids": token_ids}
    schema = pa.schema(kinds)

    def tables() -> Iterator[pa.Table]:
        for file in files:
            ids, latents, tokens = of_bytes(pq.read_table(file, columns=list(kinds)))
            flat = (latents.half().numpy().ravel(), tokens.int().numpy().ravel())
            lists = [pa.FixedSizeListArray.from_arrays(pa.array(one), len(one) // len(ids)) for one in flat]
            yield pa.table([pa.array(ids), *lists], schema=schema)

    batches = (batch for table in tables() for batch in table.to_batches())
    lance.write_dataset(batches, str(folder / "lance"), schema=schema)
    parts = [datasets.Dataset(datasets.table.InMemoryTable(table)) for table in tables()]
    datasets.concatenate_datasets(parts).save_to_disk(str(folder / "datasets"))
    (folder / "webdataset").mkdir()
    columns = {"id": "str", "latent": "ndarray:float16:4,64,64", "token_ids": "ndarray:int32:77"}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as mds:
        for number, table in enumerate(tables()):
            ids, latents, tokens = of_lists(table)
            with webdataset.TarWriter(str(folder / "webdataset" / f"{number:06d}.tar")) as tar:
                for row, latent, token in zip(ids, latents.half().numpy(), tokens.int().numpy(), strict=True):
                    mds.write({"id": row, "latent": latent, "token_ids": token})
                    key = row.replace("/", "-")
                    tar.write({"__key__": key, "txt": row, "latent.npy": latent, "token_ids.npy": token})


def peak_mib() -> int:
    """The process's highest memory; `getrusage` would count that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


def epoch_costs(loader: str, folder: Path, epoch: int) -> dict[str, float | int]:
    """What it costs to open the rows and read each once; the sum is of numbers of all rows."""
    wall, cpu = time.perf_counter(), time.process_time()
    first, seen, total = 0.0, list[str](), 0.0
    for ids, latents, tokens in LOADERS[loader](folder, epoch):
        first = first or time.perf_counter() - wall
        assert (latents.dtype, latents.shape[1:], tokens.dtype) == (torch.float32, SHAPE, torch.int64)
        seen += ids
        total += float(latents[:, 0, 0, 0].double().sum() + tokens[:, 0].sum())
    cpu = time.process_time() - cpu
    assert len(seen) == len(set(seen))
    return {
        "rows": len(seen),
        "cpu_seconds": cpu,
        "first_batch_seconds": first,
        "peak_mib": peak_mib(),
        "sum": total,
    }


def main() -> None:
    """Write, or read an epoch for each line."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name == "write":
        write(folder)
        return
    torch.set_num_threads(1)
    for epoch, _ in enumerate(sys.stdin):
        print("\n" + json.dumps(epoch_costs(name, folder, epoch)), flush=True)


if __name__ == "__main__":
    main()
