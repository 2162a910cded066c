"""What a network can be run by, for its time to be taken: torch as it is or compiled, ExecuTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from snapfusion.evolution.latency import LatencyError, Precision
from snapfusion.export.executorch import ExecuTorchProgram, compile_executorch
from snapfusion.export.modules import FixedModule, Port

Runtime = Literal["torch", "torch-compiled", "executorch-xnnpack"]


def ready(
    network: nn.Module,
    inputs: Sequence[Tensor],
    *,
    runtime: Runtime,
    precision: Precision,
    device: torch.device,
) -> Callable[[], None]:
    """Something that runs `network` once on `inputs`, and returns when that is done.

    Args:
        network: moved to `device` and `precision`, in place.
        inputs: float32 on the CPU.
        runtime: what computes.
        precision: of the network and its inputs.
        device: where; ExecuTorch runs on the CPU.

    Raises:
        LatencyError: if the runtime cannot run in that precision or on that device.
    """
    if runtime == "executorch-xnnpack":
        return _executorch(network, inputs, precision=precision, device=device)
    dtype: torch.dtype = getattr(torch, precision)
    nn.Module.to(network, device=device, dtype=dtype)
    given = [tensor.to(device=device, dtype=dtype) for tensor in inputs]
    run = torch.compile(network, dynamic=False) if runtime == "torch-compiled" else network

    @torch.inference_mode()
    def once() -> None:
        run(*given)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return once


def _executorch(
    network: nn.Module, inputs: Sequence[Tensor], *, precision: Precision, device: torch.device
) -> Callable[[], None]:
    if precision != "float32" or device.type != "cpu":
        raise LatencyError(
            f"ExecuTorch's XNNPACK runs here in float32 on the CPU, not in {precision} on {device.type}"
        )
    names = [f"input{number}" for number in range(len(inputs))]
    module = FixedModule(
        name="part",
        network=_First(network),
        inputs=tuple(
            Port(name=name, shape=tuple(tensor.shape)) for name, tensor in zip(names, inputs, strict=True)
        ),
        outputs=(),
    )
    program = ExecuTorchProgram(compile_executorch(module))
    given = [tensor.numpy() for tensor in inputs]

    def once() -> None:
        program(given)

    return once


class _First(nn.Module):
    """A network whose output is one tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.network(*inputs)
        return output if isinstance(output, Tensor) else output[0]
