"""Evaluation of Core ML operations: each kind, rounding, and the observer of float16 overflow."""

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from snapfusion.export.mil import MaxAbs, MaxAbsObserver, MilProgram, Operation, Value, evaluate
from snapfusion.export.operations import UnknownOperationError
from snapfusion.export.parity import ParityError


def step(kind, *, to, dtype="float32", **inputs):
    """An operation with one result, whose shape is not used."""
    return Operation(kind=kind, inputs=inputs, outputs=(Value(name=to, shape=(), dtype=dtype),))


def program_of(*operations, outputs=None, constants=None, **ports):
    """A program of these operations; ports have the dtypes and shapes of the given arrays."""
    inputs = (Value(name=name, shape=array.shape, dtype=array.dtype.name) for name, array in ports.items())
    outputs = outputs or operations[-1].outputs[-1:]
    return MilProgram(
        inputs=tuple(inputs), outputs=tuple(outputs), constants=constants or {}, operations=operations
    )


def compute(kind, *, dtype="float32", **args):
    """The result of one operation; tensors are inputs, everything else constants."""
    tensors = {name: value.numpy() for name, value in args.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in args.items() if name not in tensors}
    operation = step(kind, to="result", dtype=dtype, **{name: name for name in args})
    return evaluate(program_of(operation, constants=constants, **tensors), list(tensors.values()))


X = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[1, 3, 0]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("kind", "args", "expected"),
    [
        ("cos", {"x": X}, X.cos()),
        ("sin", {"x": X}, X.sin()),
        ("sigmoid", {"x": X}, X.sigmoid()),
        ("gelu", {"x": X, "mode": "EXACT"}, functional.gelu(X)),
        ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}, functional.gelu(X, approximate="tanh")),
        ("tile", {"x": X, "reps": np.array([1, 2, 1, 1])}, X.repeat(1, 2, 1, 1)),
        ("expand_dims", {"x": X, "axes": np.array([0, -1])}, X[None, ..., None]),
        ("gather", {"x": X, "indices": TOKENS, "axis": 1}, X[:, TOKENS.long()]),
        ("select", {"cond": X > 0, "a": X, "b": 2 * X}, torch.where(X > 0, X, 2 * X)),
        ("greater_equal", {"x": TOKENS, "y": 1}, TOKENS >= 1),
        ("identity", {"x": TOKENS}, TOKENS),
        ("softmax", {"x": X, "axis": 2}, X.softmax(2)),
        (
            "slice_by_index",
            {
                "x": X,
                "begin": np.array([0, 1, 0, 0]),
                "end": np.array([1, 5, 0, 0]),
                "stride": np.array([1, 2, 1, 1]),
                "end_mask": np.array([False, False, True, True]),
            },
            X[:1, 1:5:2],
        ),
    ],
)
def test_operations_equal_torchs(kind, args, expected):
    dtype = str(expected.dtype).removeprefix("torch.")
    np.testing.assert_allclose(compute(kind, dtype=dtype, **args), expected, rtol=1e-6, atol=1e-6)


def test_layer_norm_over_any_axes():
    gamma, beta = torch.randn(4, 3), torch.randn(4, 3)
    result = compute(
        "layer_norm", x=X, axes=np.array([-2, -1]), gamma=gamma, beta=beta, epsilon=np.float32(1e-5)
    )
    np.testing.assert_allclose(result, functional.layer_norm(X, (4, 3), gamma, beta), atol=1e-5)
    over_channels = compute(
        "layer_norm", x=X, axes=np.array([1]), gamma=torch.arange(6.0), epsilon=np.float32(0.0)
    )
    moved = functional.layer_norm(X.movedim(1, -1), (6,), torch.arange(6.0), eps=0.0).movedim(-1, 1)
    np.testing.assert_allclose(over_channels, moved, atol=1e-5)


def test_split_and_concat_have_several_values():
    x = np.arange(6, dtype=np.float32).reshape(1, 6)
    parts = tuple(Value(name=name, shape=(), dtype="float32") for name in ("a", "b", "c"))
    constants = {"sizes": np.array([1, 2, 3]), "axis": 1}
    split = Operation(kind="split", inputs={"x": "x", "split_sizes": "sizes", "axis": "axis"}, outputs=parts)
    joined = step("concat", to="y", values=("c", "a"), axis="axis")
    result = evaluate(program_of(split, joined, constants=constants, x=x), [x])
    assert result.tolist() == [[3.0, 4.0, 5.0, 0.0]]


@pytest.mark.parametrize(
    ("dtype", "value", "rounded"),
    [
        ("float16", 998.75, 999.0),
        ("float16", 1e5, np.inf),
        ("float32", 998.75, 998.75),
        ("int32", -1.5, -1),
        ("int16", 40000.0, -25536),
        ("uint16", 65537.0, 1),
    ],
)
def test_a_cast_rounds_to_its_dtype(dtype, value, rounded):
    assert compute("cast", dtype=dtype, x=torch.tensor([value])).tolist() == [rounded]


def test_inputs_are_rounded_to_their_ports():
    double = step("add", to="y", x="x", y="x")
    x = np.array([998.75], np.float32)
    assert evaluate(program_of(double, x=x), [x]).tolist() == [1997.5]
    assert evaluate(program_of(double, x=x.astype(np.float16)), [x]).tolist() == [1998.0]


def test_palettes_are_decompressed():
    # Six bits per index, the lowest first: 1, 2, 3, 62 are 000001 000010 000011 111110.
    packed = np.array([0b10_000001, 0b0011_0000, 0b111110_00], np.uint8)
    table = np.arange(64, dtype=np.float16) / 4
    dense = step("constexpr_lut_to_dense", to="w", dtype="float16", indices="i", lut="t", shape="s")
    constants = {"i": packed, "t": table, "s": np.array([2, 2], np.uint32)}
    assert decompressed(dense, constants) == [[0.25, 0.5], [0.75, 15.5]]


def decompressed(operation, constants):
    """The 2x2 weight `w` that the operation computes, added to zeros."""
    zero = np.zeros((2, 2), np.float32)
    program = program_of(operation, step("add", to="y", x="x", y="w"), constants=constants, x=zero)
    return evaluate(program, [zero]).tolist()


def test_linear_quantization_has_a_scale_per_channel():
    constants = {
        "q": np.array([[1, -2], [100, 127]], np.int8),
        "z": np.int8(0),
        "s": np.array([0.5, 0.25], np.float16),
        "a": np.int32(0),
    }
    names = {"quantized_data": "q", "zero_point": "z", "scale": "s", "axis": "a"}
    dense = step("constexpr_affine_dequantize", to="w", dtype="float16", **names)
    assert decompressed(dense, constants) == [[0.5, -1.0], [25.0, 31.75]]


def test_a_chain_passes_values_by_name():
    x, c = np.array([2.0], np.float32), np.array([10.0], np.float32)
    middle = Value(name="h", shape=(1,), dtype="float32")
    first = program_of(step("square", to="h", x="x"), outputs=[middle], x=x)
    second = program_of(step("sub", to="d", x="c", y="h"), step("add", to="y", x="d", y="x"), h=x, c=c, x=x)
    assert evaluate([first, second], [x, c]).tolist() == [8.0]
    with pytest.raises(ValueError, match=r"shapes \[\(1,\)\] given; \[\(1,\), \(1,\)\] is accepted"):
        evaluate([first, second], [x])


def test_wrong_shapes_and_dtypes_are_refused():
    program = program_of(step("add", to="y", x="x", y="x", dtype="int32"), x=np.zeros((1, 3), np.int32))
    with pytest.raises(ValueError, match=r"\(1, 4\).* given; .*\(1, 3\)"):
        evaluate(program, [np.zeros((1, 4), np.int32)])
    with pytest.raises(ValueError, match=r"x is given as float32; .*int32"):
        evaluate(program, [np.zeros((1, 3), np.float32)])


def test_unknown_operations_and_modes_are_named():
    x = np.zeros(1, np.float32)
    with pytest.raises(UnknownOperationError, match="gelu_of_tomorrow"):
        evaluate(program_of(step("gelu_of_tomorrow", to="y", x="x"), x=x), [x])
    with pytest.raises(UnknownOperationError, match="mode='SIGMOID"):
        compute("gelu", x=X, mode="SIGMOID_APPROXIMATION")


SQUARE = step("square", to="y", dtype="float16", x="x")


def test_overflow_of_float16_reaches_the_output():
    x = np.array([[200.0, 300.0]], np.float32)
    assert evaluate(program_of(SQUARE, x=x), [x]).tolist() == [[40000.0, np.inf]]


def test_overflow_names_operation_and_sample():
    samples = [np.array([[1.0, size]], np.float32) for size in (200.0, 300.0)]
    program = program_of(SQUARE, x=samples[0])
    observer = MaxAbsObserver()
    evaluate(program, [samples[0]], observe=observer)
    with pytest.raises(ParityError, match=r"y \(square\) gives 1 values .* on sample 1: .* 65504"):
        evaluate(program, [samples[1]], observe=observer)


def test_largest_result_and_logit_over_all_samples():
    mask = np.array([[0.0, -1e4]], np.float32)
    operations = (
        step("square", to="wide", dtype="float32", x="x"),
        step("mul", to="k", dtype="float16", x="x", y="x"),
        step("matmul", to="logits", dtype="float16", x="x", y="k"),
        step("add", to="masked", dtype="float16", x="logits", y="mask"),
        step("softmax", to="p", dtype="float16", x="masked", axis="axis"),
        step("matmul", to="y", dtype="float16", x="p", y="k"),
    )
    program = program_of(*operations, constants={"mask": mask, "axis": -1}, x=np.zeros((2, 2), np.float32))
    observer = MaxAbsObserver()
    for size in (1.0, 10.0, 2.0):
        evaluate(program, [np.diag([size, size]).astype(np.float32)], observe=observer)
    # Neither the float32 result nor the values that the mask adds count.
    assert observer.largest == observer.logit == MaxAbs(value=1000.0, operation="logits", kind="matmul")
    record = observer.to_values()
    assert record["attention_logit"]["headroom"] == pytest.approx(65.504)
    assert record["largest_by_kind"] == {"matmul": 1000.0, "mul": 100.0, "softmax": 1.0}


def test_values_are_released_after_their_last_use():
    x = np.zeros((4, 4), np.float32)
    names = ["x", *(f"h{index}" for index in range(5))]
    chain = [step("square", to=name, x=before) for before, name in pairwise(names)]
    results = []

    def observe(operation, value, result):
        results.append(weakref.ref(result))
        # This operation reads the previous result, and no operation reads the earlier ones.
        assert sum(each() is not None for each in results) <= 2

    evaluate(program_of(*chain, x=x), [x], observe=observe)
    assert len(results) == 5
