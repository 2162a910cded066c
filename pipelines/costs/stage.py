"""Describes what a stage of a run costs: units of work, worker groups, bytes, memory and storage requests."""

from dataclasses import dataclass
from typing import Literal

from pipelines.costs.requests import TableWrites, TrainingReads
from pipelines.ray_data.settings import Pool
from snapfusion.models.architecture import Architecture
from snapfusion.models.network_sizes import NetworkSizes

WorkKind = Literal[
    "render",
    "read",
    "write",
    "write_image",
    "encode",
    "pass",
    "decode",
    "judge",
    "train",
    "train_decoder",
    "update",
    "compile",
]
"""The unit of each kind of work.

render         a scene rendered and written into a shard, on a core
read           a row of a shard streamed, selected and decoded, on a core
write          a row packed and written, on a core
write_image    an image encoded as PNG, on a core
encode         an image through the VAE's encoder
pass           a latent through the UNet, without gradients; a guided step is two
decode         a latent through the VAE's decoder
judge          an image through the metric networks of an evaluation
train          a latent through the UNet, forward and backward
train_decoder  a latent through the half-width decoder, forward and backward
update         10^6 parameters updated by the optimizer and averaged, once a step
compile        a mobile bundle
"""

ALLOCATOR_SLACK = 1.2
"""Factor on activations: allocator fragmentation, and norms that a GPU's autocast keeps in float32.

An assumption: no GPU was at hand to measure it."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
WEIGHT_BYTES = DTYPE_BYTES["float32"]
"""Bytes of a weight in training and in a saved folder."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A number of units of one kind of work.

    Attributes:
        kind: of work.
        units: their number.
        gmacs: 10^9 multiply-accumulates of the network in one unit; None without a network, or to take the
            rate as it was measured.
        replicated: whether every worker does all units (or one does, and the others wait); else they share.
    """

    kind: WorkKind
    units: float
    gmacs: float | None = None
    replicated: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """Workers of one kind in a stage, each doing its works one after the other.

    Attributes:
        name: of the group.
        works: of the whole group.
        workers: number of them in the recipe.
        on: occupied by each: an accelerator (a core, on nodes without any), or always a core.
        max_workers: beyond which workers would idle; None for no limit.
    """

    name: str
    works: tuple[Work, ...]
    workers: int
    on: Literal["accelerator", "core"] = "core"
    max_workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """The work of one stage of a run.

    Attributes:
        name: of the stage.
        verb: the job that runs it.
        rows: read.
        groups: worker groups, which run concurrently.
        startup: kind of the fixed time around the work.
        output_bytes: size of the result.
        writes: commits of a table; None for none.
        reads: of a training; None for none.
        peak_bytes: memory of a worker with a network; None without one.
        local: whether it runs in the driver process alone.
    """

    name: str
    verb: str
    rows: int
    groups: tuple[WorkerGroup, ...]
    startup: Literal["none", "job", "training"] = "none"
    output_bytes: float = 0.0
    writes: TableWrites | None = None
    reads: TrainingReads | None = None
    peak_bytes: float | None = None
    local: bool = False


def pool_group(name: str, pool: Pool, *works: Work, network: bool = False) -> WorkerGroup:
    """The workers of an actor pool; those with a `network` occupy an accelerator each."""
    return WorkerGroup(name=name, works=works, workers=pool.actors, on="accelerator" if network else "core")


def unet_passes(
    units: float, architecture: Architecture, *, sizes: NetworkSizes, replicated: bool = False
) -> Work:
    """Forward passes of a UNet."""
    return Work(kind="pass", units=units, gmacs=sizes.of(architecture).gmacs, replicated=replicated)


def vae_decodes(units: float, *, sizes: NetworkSizes) -> Work:
    """Latents decoded by the VAE."""
    return Work(kind="decode", units=units, gmacs=sizes.decoder_gmacs)


def network_memory(*, parameters: int, dtype: str, batch_bytes: int) -> float:
    """Peak bytes of one worker that only runs networks forward.

    Args:
        parameters: of its networks.
        dtype: of weights and activations.
        batch_bytes: activation bytes of one batch, two a number.
    """
    size = DTYPE_BYTES[dtype]
    return parameters * size + batch_bytes * size / 2 * ALLOCATOR_SLACK


def driver_cost(
    verb: str, kind: WorkKind, *, units: int, rows: int = 0, output_bytes: float = 0.0
) -> StageCost:
    """Cost of a stage that runs in the driver process alone."""
    group = WorkerGroup(name="driver", works=(Work(kind=kind, units=units),), workers=1, max_workers=1)
    return StageCost(name=verb, verb=verb, rows=rows, groups=(group,), output_bytes=output_bytes, local=True)


def ceil_div(whole: int, part: int) -> int:
    """Quotient rounded up."""
    return -(-whole // part)
