"""What a network can be run by, for its time to be taken: torch as it is or compiled, ExecuTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from snapfusion.evolution.latency import LatencyError
from snapfusion.evolution.settings import Precision, Runtime
from snapfusion.export.executorch import ExecuTorchProgram, compile_executorch, set_num_threads
from snapfusion.export.modules import FixedModule, Port


def make_runner(
    network: nn.Module,
    inputs: Sequence[Tensor],
    *,
    runtime: Runtime,
    precision: Precision,
    device: torch.device,
) -> Callable[..., Tensor]:
    """`network` as a function of tensors shaped as `inputs`, which gives its first output.

    The output is on `device` in `precision`, and may not be computed yet where that is an accelerator.

    Args:
        network: moved to `device` and `precision`, in place.
        inputs: float32 on the CPU.
        runtime: what computes.
        precision: of the network, to which what it is given is brought.
        device: where; ExecuTorch runs on the CPU.

    Raises:
        LatencyError: if the runtime cannot run in that precision or on that device.
    """
    if runtime == "executorch-xnnpack":
        return _executorch(network, inputs, precision=precision, device=device)
    dtype: torch.dtype = getattr(torch, precision)
    nn.Module.to(network, device=device, dtype=dtype)
    run = torch.compile(network, dynamic=False) if runtime == "torch-compiled" else network

    @torch.inference_mode()
    def call(*given: Tensor) -> Tensor:
        output = run(*(tensor.to(device=device, dtype=dtype) for tensor in given))
        return output if isinstance(output, Tensor) else output[0]

    return call


def make_benchmark(
    network: nn.Module,
    inputs: Sequence[Tensor],
    *,
    runtime: Runtime,
    precision: Precision,
    device: torch.device,
) -> Callable[[], None]:
    """Something that runs `network` once on `inputs`, and returns when that is done.

    Raises:
        LatencyError: as `make_runner`, whose arguments these are.
    """
    call = make_runner(network, inputs, runtime=runtime, precision=precision, device=device)
    dtype: torch.dtype = getattr(torch, precision)
    given = [tensor.to(device=device, dtype=dtype) for tensor in inputs]

    def once() -> None:
        call(*given)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return once


def _executorch(
    network: nn.Module, inputs: Sequence[Tensor], *, precision: Precision, device: torch.device
) -> Callable[..., Tensor]:
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
    # Its pool would have a thread for each core, whatever torch was told.
    set_num_threads(torch.get_num_threads())
    program = ExecuTorchProgram(compile_executorch(module))

    def call(*given: Tensor) -> Tensor:
        return torch.from_numpy(program([tensor.numpy() for tensor in given]))

    return call


class _First(nn.Module):
    """A network whose output is one tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.network(*inputs)
        return output if isinstance(output, Tensor) else output[0]
