"""What is compiled for a phone: networks with fixed shapes and named inputs and outputs.

decoder   latent [1,4,h,w] float32, scaled as our tables store it -> image [1,3,H,W] float32 in 0 .. 1

The division by the VAE's scaling factor, the change of range and the clamp are part of the program, so that
an application needs no constant of ours and cannot forget one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from snapfusion.models.decoder import HalfDecoder


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or an output of a program: its name and its fixed shape. Values are floating point."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FixedModule:
    """A network with its ports: the torch side of a compiled program, and the reference it is held to."""

    name: str
    network: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def example(self) -> tuple[Tensor, ...]:
        """Inputs of the right shapes, float32 zeros, for tracing."""
        return tuple(torch.zeros(port.shape) for port in self.inputs)

    def trace(self) -> torch.export.ExportedProgram:
        """The network as a graph of ATen operations with these shapes."""
        with torch.no_grad():
            return torch.export.export(self.network, self.example(), strict=False)

    @torch.inference_mode()
    def reference(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """What torch makes of one set of inputs in float32: the first output.

        Raises:
            ValueError: if a shape is not the port's.
        """
        check_inputs(inputs, ports=self.inputs)
        image: Tensor = self.network(*(torch.from_numpy(array).float() for array in inputs))
        return image.numpy()


def check_inputs(inputs: Sequence[np.ndarray], *, ports: Sequence[Port]) -> None:
    """Compare arrays with the ports they are meant for.

    Raises:
        ValueError: if their number or a shape differs.
    """
    given = [array.shape for array in inputs]
    accepted = [port.shape for port in ports]
    if given != accepted:
        raise ValueError(f"inputs of shapes {given} given; {accepted} is accepted: shapes are fixed")


class DecoderProgram(nn.Module):
    """Scaled latent -> image in 0 .. 1, from either decoder."""

    def __init__(self, decoder: HalfDecoder | AutoencoderKL) -> None:
        super().__init__()
        self.decode = decoder if isinstance(decoder, HalfDecoder) else _FullDecoder(decoder)

    def forward(self, latent: Tensor) -> Tensor:
        """[1,4,h,w] -> [1,3,H,W]."""
        image: Tensor = self.decode(latent)
        return (image * 0.5 + 0.5).clamp(0.0, 1.0)


class _FullDecoder(nn.Module):
    """The decoding half of an AutoencoderKL alone, so that the encoder is not compiled with it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.scaling_factor = float(vae.config["scaling_factor"])
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.decoder(self.post_quant_conv(latent / self.scaling_factor))
        return image


def decoder_module(
    decoder: HalfDecoder | AutoencoderKL, *, latent_shape: tuple[int, int, int]
) -> FixedModule:
    """The decoder, half-width or full, for latents of `latent_shape` = (4, h, w)."""
    _, height, width = latent_shape
    factor = 2 ** (len(decoder.config.block_out_channels) - 1)
    return FixedModule(
        name="decoder",
        network=DecoderProgram(decoder).float().eval(),
        inputs=(Port(name="latent", shape=(1, *latent_shape)),),
        outputs=(Port(name="image", shape=(1, 3, height * factor, width * factor)),),
    )
