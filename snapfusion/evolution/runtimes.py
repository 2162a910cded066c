"""Runtimes for latency measurements: torch, compiled torch, ExecuTorch."""

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
    """Return `network` as a function of tensors shaped like `inputs`, which returns its first output.

    The output is on `device` in `precision`; on an accelerator its computation may still be in progress.

    Args:
        network: moved to `device` and `precision`, in place.
        inputs: float32 on the CPU.
        runtime: the backend.
        precision: of the network, to which its inputs are converted.
        device: of the network; ExecuTorch runs on the CPU.

    Raises:
        LatencyError: if the runtime does not support the precision or the device.
    """
    if runtime == "executorch-xnnpack":
        return _executorch(network, inputs, precision=precision, device=device)
    dtype: torch.dtype = getattr(torch, precision)
    nn.Module.to(network, device=device, dtype=dtype)
    run = torch.compile(network, dynamic=False) if runtime == "torch-compiled" else network

    @torch.inference_mode()
    def call(*arguments: Tensor) -> Tensor:
        return _first(run(*(tensor.to(device=device, dtype=dtype) for tensor in arguments)))

    return call


def make_benchmark(
    network: nn.Module,
    inputs: Sequence[Tensor],
    *,
    runtime: Runtime,
    precision: Precision,
    device: torch.device,
) -> Callable[[], None]:
    """Return a function that runs `network` once on `inputs` and waits for the result.

    Args and errors as of `make_runner`.
    """
    call = make_runner(network, inputs, runtime=runtime, precision=precision, device=device)
    dtype: torch.dtype = getattr(torch, precision)
    arguments = [tensor.to(device=device, dtype=dtype) for tensor in inputs]

    def run() -> None:
        call(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _executorch(
    network: nn.Module, inputs: Sequence[Tensor], *, precision: Precision, device: torch.device
) -> Callable[..., Tensor]:
    if precision != "float32" or device.type != "cpu":
        raise LatencyError(
            f"ExecuTorch's XNNPACK runs here in float32 on the CPU, not in {precision} on {device.type}"
        )
    ports = (Port(name=f"input{number}", shape=tuple(tensor.shape)) for number, tensor in enumerate(inputs))
    module = FixedModule(name="part", network=_FirstOutput(network), inputs=tuple(ports), outputs=())
    # ExecuTorch's thread pool ignores torch's setting and would use every core.
    set_num_threads(torch.get_num_threads())
    program = ExecuTorchProgram(compile_executorch(module))

    def call(*arguments: Tensor) -> Tensor:
        return torch.from_numpy(program([tensor.numpy() for tensor in arguments]))

    return call


class _FirstOutput(nn.Module):
    """A network with only the first of its outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        return _first(self.network(*inputs))


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
