"""ExecuTorch programs, lowered to XNNPACK: made, and executed where they are made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from snapfusion.export.modules import FixedModule
from snapfusion.export.quiet import quiet


def compile_executorch(module: FixedModule) -> bytes:
    """The module as the bytes of a `.pte`; what XNNPACK does not take runs in ExecuTorch's own kernels."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(module.trace(), partitioner=[XnnpackPartitioner()])
        return bytes(lowered.to_executorch().buffer)


class ExecuTorchProgram:
    """A `.pte` in ExecuTorch's runtime on this machine.

    Raises:
        ValueError: if the bytes are not an ExecuTorch program.
    """

    def __init__(self, program: bytes) -> None:
        with quiet():
            from executorch.runtime import Runtime, Verification

            try:
                # The runtime reads from these bytes for as long as the program lives.
                self._bytes = program
                self._program = Runtime.get().load_program(
                    program, verification=Verification.InternalConsistency
                )
                self._method = self._program.load_method("forward")
            except RuntimeError as error:
                raise ValueError(f"not an ExecuTorch program of {len(program):,} bytes: {error}") from error

    def __call__(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Execute on one set of inputs, float32 of the program's shapes; the first output, float32.

        Raises:
            ValueError: if the program refuses the inputs.
        """
        tensors = [torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for array in inputs]
        try:
            # A copy, because the runtime gives its own memory, which the next execution overwrites.
            return self._method.execute(tensors)[0].numpy().copy()
        except RuntimeError as error:
            shapes = [array.shape for array in inputs]
            raise ValueError(f"the program refuses inputs of shapes {shapes}: {error}") from error
