"""How the workers of a training share it, and which batches they can share."""

from typing import Literal

Sharding = Literal["none", "fsdp"]
"""Whether each worker has a copy of the networks, or a part of them."""


def unshared_batch(global_batch: int, *, world: int, sharding: Sharding) -> str | None:
    """Say why `world` workers cannot share a global batch of that many rows; None if they can.

    There may be too few rows, or shares of sharded workers would differ: those gather the network layer by
    layer together, and one of them would wait for ever.
    """
    if world > global_batch:
        return f"{world} workers cannot share a global batch of {global_batch} rows: take fewer workers"
    if sharding == "fsdp" and global_batch % world:
        return (
            f"{world} workers cannot share a global batch of {global_batch} rows evenly, which sharding=fsdp "
            "needs: choose a multiple, or trainer.sharding=none"
        )
    return None
