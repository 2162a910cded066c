"""A script that ends while loaders still read the tables of a run, whose folder it is given."""

import sys

from pipelines.loading.branches import BranchLoader
from pipelines.loading.loader import BatchLoader
from pipelines.loading.settings import LoaderSettings
from pipelines.tables.table import open_table

latents, targets = (open_table(f"{sys.argv[1]}/{name}") for name in ("latents", "targets"))
settings = LoaderSettings(window_units=1)
loaders = [
    BatchLoader(latents, columns=["latent"], global_batch=4, seed=0, settings=settings),
    BatchLoader(latents, columns=["latent"], global_batch=4, seed=1, settings=settings),
    BranchLoader(targets, guided=lambda step: step % 2 == 1, global_batch=4, seed=0, settings=settings),
]
streams = [loader.stream(0) for loader in loaders]
for stream in streams:
    next(stream)
    next(stream)
prefetched = loaders[-1].batches(0)
next(prefetched)
