"""What each kind of operation in a Core ML program computes, in torch.

Each rule takes the operation's arguments by name, as Apple's reference of the MIL operators calls them:
tensors for values, floats, whole numbers, strings and lists for what is stated beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Rule = Callable[[Mapping[str, Any]], Tensor | tuple[Tensor, ...]]


class UnknownOperationError(ValueError):
    """An operation, or a way of it, that this file does not define."""


def rule_of(kind: str) -> Rule:
    """How that kind is computed.

    Raises:
        UnknownOperationError: if it is not defined here.
    """
    if kind not in _RULES:
        known = ", ".join(sorted(_RULES))
        raise UnknownOperationError(f"operation {kind!r} is not defined here; {known} are")
    return _RULES[kind]


def _accept(given: Mapping[str, Any], argument: str, *accepted: object) -> Any:  # noqa: ANN401 - as given
    """The argument, if it is one of those defined here."""
    value = given.get(argument, accepted[0])
    if value not in accepted:
        raise UnknownOperationError(f"{argument}={value!r} is not defined here; {accepted} are")
    return value


def _conv(given: Mapping[str, Any]) -> Tensor:
    custom = _accept(given, "pad_type", "valid", "custom") == "custom"
    top, bottom, left, right = given["pad"] if custom else (0, 0, 0, 0)
    return functional.conv2d(
        functional.pad(given["x"], (left, right, top, bottom)),
        given["weight"],
        given.get("bias"),
        stride=given["strides"],
        dilation=given["dilations"],
        groups=given["groups"],
    )


def _batch_norm(given: Mapping[str, Any]) -> Tensor:
    # What a GroupNorm's own weight and bias become: the moments are constants here, usually 0 and 1.
    x, mean, variance = given["x"], given["mean"], given["variance"]
    return functional.batch_norm(
        x, mean, variance, weight=given.get("gamma"), bias=given.get("beta"), eps=given["epsilon"]
    )


def _layer_norm(given: Mapping[str, Any]) -> Tensor:
    x = given["x"]
    axes = sorted(axis % x.ndim for axis in given["axes"])
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + given["epsilon"])
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    if given.get("gamma") is not None:
        normed = normed * given["gamma"].reshape(shape)
    return normed if given.get("beta") is None else normed + given["beta"].reshape(shape)


def _upsample(given: Mapping[str, Any]) -> Tensor:
    factors = (float(given["scale_factor_height"]), float(given["scale_factor_width"]))
    return functional.interpolate(given["x"], scale_factor=factors, mode="nearest")


def _matmul(given: Mapping[str, Any]) -> Tensor:
    x, y = given["x"], given["y"]
    x = x.transpose(-1, -2) if given.get("transpose_x") else x
    return x @ (y.transpose(-1, -2) if given.get("transpose_y") else y)


def _gelu(given: Mapping[str, Any]) -> Tensor:
    mode = _accept(given, "mode", "EXACT", "TANH_APPROXIMATION")
    return functional.gelu(given["x"], approximate="none" if mode == "EXACT" else "tanh")


def _gather(given: Mapping[str, Any]) -> Tensor:
    _accept(given, "batch_dims", 0)
    x, indices, axis = given["x"], given["indices"], given["axis"]
    axis %= x.ndim
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, indices.flatten()).reshape(shape)


def _slice(given: Mapping[str, Any]) -> Tensor:
    x = given["x"]
    none = [False] * x.ndim
    _accept(given, "squeeze_mask", none)
    from_start, to_end = given.get("begin_mask", none), given.get("end_mask", none)
    strides = given.get("stride", [1] * x.ndim)
    return x[
        tuple(
            slice(None if first else begin, None if last else end, stride)
            for begin, end, stride, first, last in zip(
                given["begin"], given["end"], strides, from_start, to_end, strict=True
            )
        )
    ]


def _concat(given: Mapping[str, Any]) -> Tensor:
    _accept(given, "interleave", False)
    return torch.cat(given["values"], dim=given["axis"])


def _expand_dims(given: Mapping[str, Any]) -> Tensor:
    x = given["x"]
    rank = x.ndim + len(given["axes"])
    for axis in sorted(axis % rank for axis in given["axes"]):
        x = x.unsqueeze(axis)
    return x


def _lut_to_dense(given: Mapping[str, Any]) -> Tensor:
    """Indices of as many bits as the table needs, the lowest bit first, without gaps between bytes."""
    table, shape = given["lut"], given["shape"]
    bits, count = len(table).bit_length() - 1, int(np.prod(shape))
    unpacked = np.unpackbits(given["indices"].numpy(), bitorder="little")[: count * bits]
    indices = np.packbits(unpacked.reshape(count, bits), axis=1, bitorder="little")[:, 0]
    return table[torch.from_numpy(indices).int()].reshape(shape)


def _affine_dequantize(given: Mapping[str, Any]) -> Tensor:
    quantized, axis = given["quantized_data"], given["axis"]
    shape = [-1 if place == axis % quantized.ndim else 1 for place in range(quantized.ndim)]
    scale, zero = (
        torch.as_tensor(given[argument]).float().reshape(shape) for argument in ("scale", "zero_point")
    )
    return (quantized.float() - zero) * scale


_RULES: dict[str, Rule] = {
    "add": lambda given: given["x"] + given["y"],
    "batch_norm": _batch_norm,
    "cast": lambda given: given["x"],
    "clip": lambda given: given["x"].clamp(given["alpha"], given["beta"]),
    "concat": _concat,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_lut_to_dense": _lut_to_dense,
    "conv": _conv,
    "cos": lambda given: given["x"].cos(),
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gelu": _gelu,
    "greater_equal": lambda given: given["x"] >= given["y"],
    "layer_norm": _layer_norm,
    "linear": lambda given: functional.linear(given["x"], given["weight"], given.get("bias")),
    "matmul": _matmul,
    "mul": lambda given: given["x"] * given["y"],
    "real_div": lambda given: given["x"] / given["y"],
    "reduce_mean": lambda given: given["x"].mean(given["axes"], keepdim=given["keep_dims"]),
    "reshape": lambda given: given["x"].reshape(given["shape"]),
    "select": lambda given: torch.where(given["cond"], given["a"], given["b"]),
    "sigmoid": lambda given: given["x"].sigmoid(),
    "silu": lambda given: functional.silu(given["x"]),
    "sin": lambda given: given["x"].sin(),
    "slice_by_index": _slice,
    "softmax": lambda given: given["x"].softmax(given["axis"]),
    "split": lambda given: given["x"].split(given["split_sizes"], dim=given["axis"]),
    "sqrt": lambda given: given["x"].sqrt(),
    "square": lambda given: given["x"].square(),
    "sub": lambda given: given["x"] - given["y"],
    "tile": lambda given: given["x"].tile(given["reps"]),
    "transpose": lambda given: given["x"].permute(given["perm"]),
    "upsample_nearest_neighbor": _upsample,
}
