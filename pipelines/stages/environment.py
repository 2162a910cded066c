"""Where a network runs, and what of that its outputs' bits depend on."""

from __future__ import annotations

from typing import Any, Literal

import torch

from snapfusion.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Device(Settings):
    """Where a stage's network runs.

    Attributes:
        kind: "auto" takes the accelerator if there is one.
        dtype: of the network; arithmetic round it is float32.
        threads: CPU threads of one actor.
    """

    kind: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 1

    def prepare(self) -> str:
        """Set the number of threads; the torch device to use."""
        torch.set_num_threads(self.threads)
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.kind == "auto" else self.kind

    @property
    def torch_dtype(self) -> torch.dtype:
        """The network's dtype."""
        return DTYPES[self.dtype]

    def environment(self) -> dict[str, Any]:
        """What the account of a unit records: bits are promised to be the same within equal environments."""
        device = self.prepare()
        kind = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
        return {
            "device": f"{device} {kind}",
            "dtype": self.dtype,
            "threads": self.threads,
            "torch": torch.__version__,
        }
