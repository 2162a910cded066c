"""The sizes of the check, and its parts."""

from dataclasses import dataclass
from typing import Final, Literal

SizeName = Literal["sd15", "mini"]
PartName = Literal["tests", "generation", "tables", "training", "fsdp", "nccl", "table5", "rates"]


@dataclass(frozen=True, kw_only=True)
class CheckSize:
    """A model, a device, and how much of each part is done.

    Attributes:
        name: of the size.
        device: that the networks run on.
        recipe: whose settings are taken where nothing else is said.
        model: source of the model; weights are random where none are at hand.
        rows: of a batch.
        steps: of a sampler.
        images: that the Ray jobs read.
        unit_rows: rows of their units.
        precision: of Table 5.
        product_side: rows and columns of the matrices whose product gives the device's peak.
        least_gib: of the device's memory.
        disk_gb: that the results take meanwhile.
        minutes: that all parts take.
    """

    name: SizeName
    device: Literal["cuda", "cpu"]
    recipe: str
    model: str
    rows: int
    steps: int
    images: int
    unit_rows: int
    precision: Literal["float16", "float32"]
    product_side: int
    least_gib: float
    disk_gb: float
    minutes: int


SIZES: Final[dict[SizeName, CheckSize]] = {
    "sd15": CheckSize(
        name="sd15",
        device="cuda",
        recipe="sd15-1gpu",
        model="random:sd15-v",
        rows=4,
        steps=10,
        images=256,
        unit_rows=32,
        precision="float16",
        product_side=8192,
        least_gib=24.0,
        disk_gb=2.0,
        minutes=5,
    ),
    "mini": CheckSize(
        name="mini",
        device="cpu",
        recipe="mini",
        model="mini-v",
        rows=4,
        steps=2,
        images=16,
        unit_rows=8,
        precision="float32",  # XNNPACK's and torch's float16 on a CPU say nothing of a device's
        product_side=512,
        least_gib=0.0,
        disk_gb=0.1,
        minutes=10,
    ),
}

PARTS: Final[dict[PartName, str]] = {
    "tests": "tests marked gpu",
    "generation": "generation in bfloat16, eager and compiled, as a share of the device's peak",
    "tables": "encode_latents and generate_pairs through Ray, with the device's busy share",
    "training": "a training step of each objective: time, memory, waits for the device",
    "fsdp": "a sharded training beside a plain one",
    "nccl": "a training by two devices beside a plain one",
    "table5": "the paper's Table 5",
    "rates": "rates for the planner",
}
"""In their order: what each does."""


class PartSkipped(Exception):
    """A part that is not possible here; the message says why."""
