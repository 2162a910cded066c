"""Torch implementations of the operations of Core ML programs.

Each rule takes the operation's arguments by their names in Apple's reference of the MIL operators: tensors
for values; floats, integers, strings and lists for attributes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Rule = Callable[[Mapping[str, Any]], Tensor | tuple[Tensor, ...]]


class UnknownOperationError(ValueError):
    """An operation, or a mode of it, that is not implemented here."""


def rule_of(kind: str) -> Rule:
    """The implementation of that kind of operation.

    Raises:
        UnknownOperationError: if there is none.
    """
    if kind not in _RULES:
        known = ", ".join(sorted(_RULES))
        raise UnknownOperationError(f"operation {kind!r} is not implemented; {known} are")
    return _RULES[kind]


def _accept(args: Mapping[str, Any], argument: str, *accepted: object) -> Any:  # noqa: ANN401 - as given
    """The argument, by default the first accepted value; any other value is refused."""
    value = args.get(argument, accepted[0])
    if value not in accepted:
        raise UnknownOperationError(f"{argument}={value!r} is not implemented; {accepted} are")
    return value


def _conv(args: Mapping[str, Any]) -> Tensor:
    custom = _accept(args, "pad_type", "valid", "custom") == "custom"
    top, bottom, left, right = args["pad"] if custom else (0, 0, 0, 0)
    padded = functional.pad(args["x"], (left, right, top, bottom))
    options = {"stride": args["strides"], "dilation": args["dilations"], "groups": args["groups"]}
    return functional.conv2d(padded, args["weight"], args.get("bias"), **options)


def _batch_norm(args: Mapping[str, Any]) -> Tensor:
    # coremltools turns a GroupNorm's weight and bias into this; the moments are constants, usually 0 and 1.
    moments, affine = (args["mean"], args["variance"]), (args.get("gamma"), args.get("beta"))
    return functional.batch_norm(args["x"], *moments, *affine, eps=args["epsilon"])


def _layer_norm(args: Mapping[str, Any]) -> Tensor:
    x = args["x"]
    axes = sorted(axis % x.ndim for axis in args["axes"])
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + args["epsilon"])
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    if args.get("gamma") is not None:
        normed = normed * args["gamma"].reshape(shape)
    return normed if args.get("beta") is None else normed + args["beta"].reshape(shape)


def _upsample(args: Mapping[str, Any]) -> Tensor:
    factors = (float(args["scale_factor_height"]), float(args["scale_factor_width"]))
    return functional.interpolate(args["x"], scale_factor=factors, mode="nearest")


def _matmul(args: Mapping[str, Any]) -> Tensor:
    x, y = args["x"], args["y"]
    x = x.transpose(-1, -2) if args.get("transpose_x") else x
    return x @ (y.transpose(-1, -2) if args.get("transpose_y") else y)


def _gelu(args: Mapping[str, Any]) -> Tensor:
    mode = _accept(args, "mode", "EXACT", "TANH_APPROXIMATION")
    return functional.gelu(args["x"], approximate="none" if mode == "EXACT" else "tanh")


def _gather(args: Mapping[str, Any]) -> Tensor:
    _accept(args, "batch_dims", 0)
    x, indices, axis = args["x"], args["indices"], args["axis"]
    axis %= x.ndim
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, indices.flatten()).reshape(shape)


def _slice(args: Mapping[str, Any]) -> Tensor:
    x = args["x"]
    none = [False] * x.ndim
    _accept(args, "squeeze_mask", none)
    # A masked index means the dimension's own start or end.
    begins = zip(args["begin"], args.get("begin_mask", none), strict=True)
    ends = zip(args["end"], args.get("end_mask", none), strict=True)
    begin, end = ([None if masked else index for index, masked in pairs] for pairs in (begins, ends))
    return x[tuple(map(slice, begin, end, args.get("stride", [1] * x.ndim)))]


def _concat(args: Mapping[str, Any]) -> Tensor:
    _accept(args, "interleave", False)
    return torch.cat(args["values"], dim=args["axis"])


def _expand_dims(args: Mapping[str, Any]) -> Tensor:
    x = args["x"]
    rank = x.ndim + len(args["axes"])
    for axis in sorted(axis % rank for axis in args["axes"]):
        x = x.unsqueeze(axis)
    return x


def _lut_to_dense(args: Mapping[str, Any]) -> Tensor:
    """Look up packed indices of as many bits as the table needs, lowest bit first, across byte borders."""
    table, shape = args["lut"], args["shape"]
    bits, count = len(table).bit_length() - 1, int(np.prod(shape))
    unpacked = np.unpackbits(args["indices"].numpy(), bitorder="little")[: count * bits]
    indices = np.packbits(unpacked.reshape(count, bits), axis=1, bitorder="little")[:, 0]
    return table[torch.from_numpy(indices).int()].reshape(shape)


def _affine_dequantize(args: Mapping[str, Any]) -> Tensor:
    quantized, axis = args["quantized_data"], args["axis"]
    shape = [1] * quantized.ndim
    shape[axis] = -1
    scale, zero = (torch.as_tensor(args[name]).float().reshape(shape) for name in ("scale", "zero_point"))
    return (quantized.float() - zero) * scale


_RULES: dict[str, Rule] = {
    "add": lambda args: args["x"] + args["y"],
    "batch_norm": _batch_norm,
    "cast": lambda args: args["x"],
    "clip": lambda args: args["x"].clamp(args["alpha"], args["beta"]),
    "concat": _concat,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_lut_to_dense": _lut_to_dense,
    "conv": _conv,
    "cos": lambda args: args["x"].cos(),
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gelu": _gelu,
    "greater_equal": lambda args: args["x"] >= args["y"],
    "identity": lambda args: args["x"],
    "layer_norm": _layer_norm,
    "linear": lambda args: functional.linear(args["x"], args["weight"], args.get("bias")),
    "matmul": _matmul,
    "mul": lambda args: args["x"] * args["y"],
    "real_div": lambda args: args["x"] / args["y"],
    "reduce_mean": lambda args: args["x"].mean(args["axes"], keepdim=args["keep_dims"]),
    "reshape": lambda args: args["x"].reshape(args["shape"]),
    "select": lambda args: torch.where(args["cond"], args["a"], args["b"]),
    "sigmoid": lambda args: args["x"].sigmoid(),
    "silu": lambda args: functional.silu(args["x"]),
    "sin": lambda args: args["x"].sin(),
    "slice_by_index": _slice,
    "softmax": lambda args: args["x"].softmax(args["axis"]),
    "split": lambda args: args["x"].split(args["split_sizes"], dim=args["axis"]),
    "sqrt": lambda args: args["x"].sqrt(),
    "square": lambda args: args["x"].square(),
    "sub": lambda args: args["x"] - args["y"],
    "tile": lambda args: args["x"].tile(args["reps"]),
    "transpose": lambda args: args["x"].permute(args["perm"]),
    "upsample_nearest_neighbor": _upsample,
}
