"""Programs of Core ML's operations, evaluated: each kind, its rounding, and what is found on the way."""

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from snapfusion.export.mil import MaxAbsObserver, MilProgram, Operation, Value, evaluate, evaluate_chain
from snapfusion.export.operations import UnknownOperationError
from snapfusion.export.parity import ParityError


def step(kind, *, to, dtype="float32", **inputs):
    """An operation with one result, whose shape is of no account here."""
    return Operation(kind=kind, inputs=inputs, outputs=(Value(name=to, shape=(), dtype=dtype),))


def program_of(*operations, outputs=None, constants=None, **ports):
    """A program of these operations; ports are arrays, whose dtype and shape they take."""
    inputs = [Value(name=name, shape=array.shape, dtype=array.dtype.name) for name, array in ports.items()]
    last = operations[-1].outputs[-1]
    return MilProgram(
        inputs=tuple(inputs),
        outputs=tuple(outputs or [last]),
        constants=constants or {},
        operations=operations,
    )


def computed(kind, *, dtype="float32", **given):
    """What one operation gives; a tensor is an input, all else a constant."""
    tensors = {name: value.numpy() for name, value in given.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in given.items() if name not in tensors}
    operation = step(kind, to="result", dtype=dtype, **{name: name for name in given})
    return evaluate(program_of(operation, constants=constants, **tensors), list(tensors.values()))


X = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[1, 3, 0]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
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
def test_each_kind_computes_what_torch_does(kind, given, expected):
    dtype = str(expected.dtype).removeprefix("torch.")
    np.testing.assert_allclose(computed(kind, dtype=dtype, **given), expected, rtol=1e-6, atol=1e-6)


def test_layer_norm_is_over_any_axes():
    gamma, beta = torch.randn(4, 3), torch.randn(4, 3)
    result = computed(
        "layer_norm", x=X, axes=np.array([-2, -1]), gamma=gamma, beta=beta, epsilon=np.float32(1e-5)
    )
    np.testing.assert_allclose(result, functional.layer_norm(X, (4, 3), gamma, beta), atol=1e-5)
    over_channels = computed(
        "layer_norm", x=X, axes=np.array([1]), gamma=torch.arange(6.0), epsilon=np.float32(0.0)
    )
    moved = functional.layer_norm(X.movedim(1, -1), (6,), torch.arange(6.0), eps=0.0).movedim(-1, 1)
    np.testing.assert_allclose(over_channels, moved, atol=1e-5)


def test_split_has_several_results_and_concat_reads_several():
    x = np.arange(6, dtype=np.float32).reshape(1, 6)
    parts = tuple(Value(name=name, shape=(), dtype="float32") for name in ("a", "b", "c"))
    constants = {"sizes": np.array([1, 2, 3]), "axis": 1}
    split = Operation(kind="split", inputs={"x": "x", "split_sizes": "sizes", "axis": "axis"}, outputs=parts)
    joined = step("concat", to="y", values=("c", "a"), axis="axis")
    result = evaluate(program_of(split, joined, constants=constants, x=x), [x])
    assert result.tolist() == [[3.0, 4.0, 5.0, 0.0]]


@pytest.mark.parametrize(
    ("dtype", "given", "kept"),
    [
        ("float16", 998.75, 999.0),
        ("float16", 1e5, np.inf),
        ("float32", 998.75, 998.75),
        ("int32", -1.5, -1),
        ("int16", 40000.0, -25536),
        ("uint16", 65537.0, 1),
    ],
)
def test_a_cast_rounds_to_the_dtype_that_is_stated(dtype, given, kept):
    assert computed("cast", dtype=dtype, x=torch.tensor([given])).tolist() == [kept]


def test_inputs_are_rounded_to_their_ports():
    double = step("add", to="y", x="x", y="x")
    given = np.array([998.75], np.float32)
    assert evaluate(program_of(double, x=given), [given]).tolist() == [1997.5]
    assert evaluate(program_of(double, x=given.astype(np.float16)), [given]).tolist() == [1998.0]


def test_palettes_are_made_dense():
    # Six bits an index, the lowest first: 1, 2, 3, 62 are 000001 000010 000011 111110.
    packed = np.array([0b10_000001, 0b0011_0000, 0b111110_00], np.uint8)
    table = np.arange(64, dtype=np.float16) / 4
    dense = step("constexpr_lut_to_dense", to="w", dtype="float16", indices="i", lut="t", shape="s")
    add = step("add", to="y", x="x", y="w")
    constants = {"i": packed, "t": table, "s": np.array([2, 2], np.uint32)}
    zero = np.zeros((2, 2), np.float32)
    assert evaluate(program_of(dense, add, constants=constants, x=zero), [zero]).tolist() == [
        [0.25, 0.5],
        [0.75, 15.5],
    ]


def test_linear_quantization_is_undone_for_each_channel():
    constants = {
        "q": np.array([[1, -2], [100, 127]], np.int8),
        "z": np.int8(0),
        "s": np.array([0.5, 0.25], np.float16),
        "a": np.int32(0),
    }
    dense = step(
        "constexpr_affine_dequantize",
        to="w",
        dtype="float16",
        quantized_data="q",
        zero_point="z",
        scale="s",
        axis="a",
    )
    add = step("add", to="y", x="x", y="w")
    zero = np.zeros((2, 2), np.float32)
    result = evaluate(program_of(dense, add, constants=constants, x=zero), [zero])
    assert result.tolist() == [[0.5, -1.0], [25.0, 31.75]]


def test_a_chain_takes_by_name_what_went_before_and_the_inputs_of_the_whole():
    x, c = np.array([2.0], np.float32), np.array([10.0], np.float32)
    middle = Value(name="h", shape=(1,), dtype="float32")
    first = program_of(step("square", to="h", x="x"), outputs=[middle], x=x)
    second = program_of(step("sub", to="d", x="c", y="h"), step("add", to="y", x="d", y="x"), h=x, c=c, x=x)
    assert evaluate_chain([first, second], [x, c]).tolist() == [8.0]
    with pytest.raises(ValueError, match=r"shapes \[\(1,\)\] given; \[\(1,\), \(1,\)\] is accepted"):
        evaluate_chain([first, second], [x])


def test_other_shapes_and_kinds_are_refused():
    tokens = np.zeros((1, 3), np.int32)
    program = program_of(step("add", to="y", x="x", y="x", dtype="int32"), x=tokens)
    with pytest.raises(ValueError, match=r"\(1, 4\).* given; .*\(1, 3\)"):
        evaluate(program, [np.zeros((1, 4), np.int32)])
    with pytest.raises(ValueError, match="x given as float32; it takes whole numbers, as int32"):
        evaluate(program, [np.zeros((1, 3), np.float32)])


def test_an_unknown_operation_is_named():
    x = np.zeros(1, np.float32)
    with pytest.raises(UnknownOperationError, match="gelu_of_tomorrow"):
        evaluate(program_of(step("gelu_of_tomorrow", to="y", x="x"), x=x), [x])
    with pytest.raises(UnknownOperationError, match="mode='SIGMOID"):
        computed("gelu", x=X, mode="SIGMOID_APPROXIMATION")


SQUARE = step("square", to="y", dtype="float16", x="x")


def test_overflow_of_float16_reaches_the_output():
    x = np.array([[200.0, 300.0]], np.float32)
    assert evaluate(program_of(SQUARE, x=x), [x]).tolist() == [[40000.0, np.inf]]


def test_overflow_is_named_with_its_operation_and_sample():
    samples = [np.array([[1.0, size]], np.float32) for size in (200.0, 300.0)]
    program = program_of(SQUARE, x=samples[0])
    extremes = MaxAbsObserver()
    evaluate(program, [samples[0]], observe=extremes)
    with pytest.raises(
        ParityError, match=r"y \(square\) gives 1 values .* on sample 1: float16 ends at 65504"
    ):
        evaluate(program, [samples[1]], observe=extremes)


def test_the_largest_result_and_the_largest_logit_are_kept_over_all_samples():
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
    extremes = MaxAbsObserver()
    for size in (1.0, 10.0, 2.0):
        evaluate(program, [np.diag([size, size]).astype(np.float32)], observe=extremes)
    # Neither the float32 result nor what the mask adds is among them.
    assert extremes.logit.value == 1000.0
    assert (extremes.logit.operation, extremes.logit.kind) == ("logits", "matmul")
    assert extremes.largest == extremes.logit
    told = extremes.to_values()
    assert told["attention_logit"]["headroom"] == pytest.approx(65.504)
    assert told["largest_by_kind"] == {"matmul": 1000.0, "mul": 100.0, "softmax": 1.0}


def test_values_are_let_go_once_nobody_reads_them():
    x = np.zeros((4, 4), np.float32)
    names = ["x", *(f"h{place}" for place in range(5))]
    chain = [step("square", to=name, x=before) for before, name in pairwise(names)]
    held = []

    def observe(operation, value, result):
        held.append(weakref.ref(result))
        # The one before is read by this operation, those before it by none.
        assert sum(result() is not None for result in held) <= 2

    evaluate(program_of(*chain, x=x), [x], observe=observe)
    assert len(held) == 5
