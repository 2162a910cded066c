"""A part of a UNet, or a whole one, as programs that another device runs and times. SnapFusion Sec. 2.2.

FOLDER/NAME.pte         ExecuTorch, lowered to XNNPACK in float32
FOLDER/NAME.mlpackage   Core ML in float16, for iOS 17 or later
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from snapfusion.evolution.settings import DeviceRuntime
from snapfusion.export.attention import set_attention_layout
from snapfusion.export.coreml import compile_coreml
from snapfusion.export.coreml_package import read_program
from snapfusion.export.executorch import ExecuTorchProgram, compile_executorch
from snapfusion.export.mil import evaluate
from snapfusion.export.modules import FixedModule, Port
from snapfusion.export.parity import check_parity
from snapfusion.export.settings import AttentionLayout


class FirstOutput(nn.Module):
    """A network with only the first of its outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs and output as of the network."""
        return first_output(self.network(*inputs))


def first_output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The only or the first output of a network."""
    return output if isinstance(output, Tensor) else output[0]


def fixed_module(network: nn.Module, inputs: Sequence[Tensor], *, name: str) -> FixedModule:
    """The network with ports of the shapes of `inputs`; only the first of its outputs is computed.

    Args:
        network: in evaluation mode, float32 on the CPU.
        inputs: float32 on the CPU. Those of one dimension are timesteps, which float16 would round.
        name: of the module.
    """
    ports = (
        Port(
            name=f"input{index}",
            shape=tuple(tensor.shape),
            coreml="float32" if tensor.ndim == 1 else "float16",
        )
        for index, tensor in enumerate(inputs)
    )
    return FixedModule(name=name, network=FirstOutput(network), inputs=tuple(ports), outputs=())


def write_programs(
    network: nn.Module, inputs: Sequence[Tensor], *, name: str, folder: Path, layout: AttentionLayout
) -> dict[DeviceRuntime, str]:
    """Compile a network for each runtime, and compare what the files compute with torch.

    Args:
        network: in evaluation mode, float32 on the CPU; its attention gets the layout, in place.
        inputs: float32 on the CPU.
        name: of the files, without suffix.
        folder: that they are written into.
        layout: of attention in the Core ML package.

    Returns:
        The file or folder by its runtime.

    Raises:
        ParityError: if a program does not agree with torch.
        NotInstalledError: if a compiler is not installed.
        ValueError: if the network cannot be compiled, or the package exists.
    """
    module, arrays = fixed_module(network, inputs, name=name), [tensor.numpy() for tensor in inputs]
    reference = module.reference(arrays)
    program, package = folder / f"{name}.pte", folder / f"{name}.mlpackage"
    program.write_bytes(compile_executorch(module))
    _check(program, ExecuTorchProgram(program)(arrays), reference)
    set_attention_layout(module.network, layout=layout)
    compile_coreml(replace(module, outputs=(Port(name="output", shape=reference.shape),)), package)
    _check(package, evaluate(read_program(package), arrays), reference)
    return {"executorch-xnnpack": program.name, "coreml": package.name}


def _check(file: Path, output: np.ndarray, reference: np.ndarray) -> None:
    check_parity(artifact=file.name, outputs=[output], references=[reference])
