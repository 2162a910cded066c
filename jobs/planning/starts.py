"""What passes before work begins and after it ends: measured on the miniature, through Ray, on a few rows."""

from __future__ import annotations

import time

from jobs.cluster import Cluster, connect
from jobs.finetune_vpred import VpredSettings, finetune_vpred
from jobs.planning.rates import Starts
from jobs.trainer import TrainerSettings
from pipelines.latents import Latents, encode_latents
from pipelines.schemas import to_png
from pipelines.sources.shards import Picture, write_shard
from pipelines.stages.image import ImageSettings
from pipelines.tables import unit_records
from snapfusion.mini.scenes import sample
from snapfusion.training.loop import LoopSettings

_ROWS = 64
_MODEL, _V_MODEL = "mini", "mini-v"
_TRAINING = VpredSettings(
    loop=LoopSettings(num_steps=2, global_batch=2, learning_rate=1e-6, ema_decay=0.9),
    trainer=TrainerSettings(micro_batch=2),
)


def measure_starts(cluster: Cluster, *, place: str) -> Starts:
    """Start Ray, encode a few scenes, and train for two steps on them; all but the work itself is counted.

    Args:
        cluster: to connect to, or to start.
        place: an empty folder.
    """
    began = time.monotonic()
    connect(cluster)
    ray = time.monotonic() - began
    pictures = (
        Picture(image=to_png(image), caption=caption, url=f"scene:{index}")
        for index, (image, caption) in enumerate(map(sample, range(_ROWS)))
    )
    shard = write_shard(f"{place}/shards", pictures, index=0, extension="png", rows_per_shard=_ROWS)
    began = time.monotonic()
    settings = Latents(images=ImageSettings(min_side=16), rows_per_unit=_ROWS)
    latents = encode_latents(settings, model=_MODEL, shards=[shard], source="probe", url=f"{place}/latents")
    job = time.monotonic() - began - sum(record["seconds"] or 0.0 for record in unit_records(latents.url))
    began = time.monotonic()
    finetune_vpred(
        _TRAINING, model=_V_MODEL, latents_url=latents.url, out_url=f"{place}/trained", further=True
    )
    return Starts(ray=ray, job=job, training=time.monotonic() - began)
