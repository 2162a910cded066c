"""Runtimes for latency measurements: torch, compiled torch, ExecuTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snapfusion.evolution.latency import LatencyError
from snapfusion.evolution.programs import first_output, fixed_module
from snapfusion.evolution.settings import Precision, Runtime
from snapfusion.export.executorch import ExecuTorchProgram, compile_executorch, set_num_threads


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Runtime and device of networks.

    Attributes:
        runtime: that computes them.
        precision: of the networks, to which their inputs are converted.
        device: of the networks; ExecuTorch runs on the CPU.
    """

    runtime: Runtime
    precision: Precision
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of torch's tensors."""
        return getattr(torch, self.precision)

    def runner(self, network: nn.Module, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
        """Return `network` as a function of tensors shaped like `inputs`, which returns its first output.

        The output is on the device in the precision; on an accelerator its computation may be in progress.

        Args:
            network: moved to the device and precision, in place.
            inputs: float32 on the CPU.

        Raises:
            LatencyError: if the runtime does not support the precision or the device.
        """
        if self.runtime == "executorch-xnnpack":
            program = self._program(network, inputs)
            return lambda *arguments: torch.from_numpy(program([tensor.numpy() for tensor in arguments]))
        nn.Module.to(network, device=self.device, dtype=self.dtype)
        run = torch.compile(network, dynamic=False) if self.runtime == "torch-compiled" else network

        @torch.inference_mode()
        def call(*arguments: Tensor) -> Tensor:
            return first_output(
                run(*(tensor.to(device=self.device, dtype=self.dtype) for tensor in arguments))
            )

        return call

    def benchmark(self, network: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """Return a function that runs `network` once on `inputs` and waits for the result.

        Args and errors as of `runner`.
        """
        if self.runtime == "executorch-xnnpack":
            # Checked once, so that the checks are not timed: a small part takes no longer than they do.
            return self._program(network, inputs).prepared([tensor.numpy() for tensor in inputs])
        call = self.runner(network, inputs)
        # Converted once, so that the conversion is not timed.
        arguments = [tensor.to(device=self.device, dtype=self.dtype) for tensor in inputs]

        def run() -> None:
            call(*arguments)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return run

    def _program(self, network: nn.Module, inputs: Sequence[Tensor]) -> ExecuTorchProgram:
        if self.precision != "float32" or self.device.type != "cpu":
            given = f"{self.precision} on {self.device.type}"
            raise LatencyError(f"ExecuTorch's XNNPACK runs here in float32 on the CPU, not in {given}")
        module = fixed_module(network, inputs, name="part")
        # ExecuTorch's thread pool ignores torch's setting and would use every core.
        set_num_threads(torch.get_num_threads())
        return ExecuTorchProgram(compile_executorch(module))
