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
    "commit",
    "save_weights",
    "read_features",
    "sum_features",
    "subset_distance",
    "image_pair",
    "lpips_image",
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

save_weights   10^6 float32 numbers saved as safetensors with their hash

These are done by a driver, after the last row:

commit           a data file of a table that is opened and whose manifests are read after the last commit
read_features    10^6 numbers of images' features, read from a table and hashed
sum_features     an image's features, added to the sums of its group
subset_distance  the Frechet distance of a subset of images to the real ones, from such sums
image_pair       two images whose features are compared, by the kernel of KID or as neighbours
lpips_image      an image through the network of LPIPS, compared with the other images of its caption
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
        gmacs: 10^9 multiply-accumulates of the network, or of the matrices, in one unit; None without them,
            or to take the rate as it was measured.
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
        workers: number of them in the recipe; of a pool that follows the cluster, the most.
        on: occupied by each: an accelerator (a core, on nodes without any), or always a core.
        max_workers: beyond which workers would idle; None for no limit.
    """

    name: str
    works: tuple[Work, ...]
    workers: int
    on: Literal["accelerator", "core"] = "core"
    max_workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class DriverCost:
    """What a stage costs the process that drives it.

    Attributes:
        works: after the last row, one after the other; all cores of its node share one, unless `replicated`.
        max_cores: that can share a work.
        peak_bytes: of memory, beyond that of a process that has imported the libraries.
        core_bytes: beside it, for each core that shares a work.
    """

    works: tuple[Work, ...] = ()
    max_cores: int = 1
    peak_bytes: float = 0.0
    core_bytes: float = 0.0

    def bytes_on(self, cores: int) -> float:
        """Peak bytes on a node of so many cores."""
        return self.peak_bytes + self.core_bytes * min(cores, self.max_cores)


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
        driver: its cost to the driver, beside the work of a `local` stage.
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
    driver: DriverCost = DriverCost()


def pool_group(name: str, pool: Pool, *works: Work, network: bool = False) -> WorkerGroup:
    """The workers of an actor pool; those with a `network` occupy an accelerator each."""
    return WorkerGroup(
        name=name, works=works, workers=pool.most_actors, on="accelerator" if network else "core"
    )


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


def loading_memory(*, unet: int, frozen: int) -> float:
    """Peak bytes of a process that loads a model of so many parameters, in float32 on the CPU.

    The file of the UNet, the last network to be read, is mapped into memory beside the network.
    """
    return (2 * unet + frozen) * WEIGHT_BYTES


def local_cost(
    verb: str,
    kind: WorkKind,
    *,
    units: int,
    rows: int = 0,
    output_bytes: float = 0.0,
    peak_bytes: float = 0.0,
) -> StageCost:
    """Cost of a stage that runs in the driver process alone."""
    group = WorkerGroup(name="driver", works=(Work(kind=kind, units=units),), workers=1, max_workers=1)
    return StageCost(
        name=verb,
        verb=verb,
        rows=rows,
        groups=(group,),
        output_bytes=output_bytes,
        local=True,
        driver=DriverCost(peak_bytes=peak_bytes),
    )


def ceil_div(whole: int, part: int) -> int:
    """Quotient rounded up."""
    return -(-whole // part)
