"""ONNX models: exported, converted, executed in ONNX Runtime, and compared with torch."""

import logging
import shutil

import numpy as np
import onnx
import pytest
import torch
from conftest import tiny_student

from snapfusion.export.modules import TIMESTEP, FixedModule, Port, unet_module
from snapfusion.export.onnx import OPSET, convert_onnx, count_operations, export_onnx, weights_path
from snapfusion.export.onnx_runtime import OnnxProgram
from snapfusion.export.parity import psnr

KINDS = ("float32", "float16", "int8")


@pytest.fixture(scope="module")
def unet():
    return unet_module(tiny_student(seed=3).unet, condition_shape=(16, 16), conditions=2)


@pytest.fixture(scope="module")
def inputs(unet):
    rng = np.random.default_rng(0)
    z_t, _, c = (rng.standard_normal(port.shape, np.float32) for port in unet.inputs)
    return [z_t, np.array([937.0], np.float32), c]


@pytest.fixture(scope="module")
def models(unet, tmp_path_factory):
    """The UNet's models: as exported, and of each kind."""
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(unet, folder / "unet.onnx")
    for kind in KINDS:
        (folder / kind).mkdir()
        convert_onnx(folder / "unet.onnx", folder / kind / "unet.onnx", kind=kind)
    return folder


def agreement(path, unet, inputs):
    reference = unet.reference(inputs)
    return psnr(OnnxProgram(path)(inputs), reference, peak=np.abs(reference).max())


@pytest.mark.parametrize(("kind", "at_least"), [("float32", 100), ("float16", 55), ("int8", 30)])
def test_models_compute_what_torch_does(kind, at_least, models, unet, inputs):
    assert agreement(models / kind / "unet.onnx", unet, inputs) > at_least


def test_ports_are_the_modules(models, unet):
    for kind in KINDS:
        graph = onnx.load(models / kind / "unet.onnx").graph
        assert [value.name for value in graph.input] == [port.name for port in unet.inputs]
        assert [value.name for value in graph.output] == [port.name for port in unet.outputs]
        assert {value.type.tensor_type.elem_type for value in graph.input} == {onnx.TensorProto.FLOAT}


def test_models_are_valid_and_small(models):
    sizes = {}
    for kind in KINDS:
        path = models / kind / "unet.onnx"
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=kind != "int8")
        assert {entry.version for entry in model.opset_import if not entry.domain} == {OPSET}
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert count_operations(path) == len(model.graph.node)
        sizes[kind] = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert sizes["float16"] < 0.55 * sizes["float32"]
    assert sizes["int8"] < sizes["float32"]


def test_conversion_leaves_logging_alone(models, tmp_path, monkeypatch):
    """The quantizer gives advice through the root logger, which sets up a handler where there is none."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    convert_onnx(models / "unet.onnx", tmp_path / "unet.onnx", kind="int8")
    assert root.handlers == []


def test_sinusoids_of_the_timestep_stay_float32(models):
    graph = onnx.load(models / "float16/unet.onnx").graph
    dtypes = {tensor.name: tensor.data_type for tensor in graph.initializer}
    known, found = {TIMESTEP}, []
    for node in graph.node:
        if node.op_type == "Cast" and known & set(node.input):
            break
        if known & set(node.input):
            known.update(node.output)
            found.append(node.op_type)
            floats = [dtypes[name] for name in node.input if name in dtypes]
            assert onnx.TensorProto.FLOAT16 not in floats
    assert {"Sin", "Cos"} <= set(found)


def test_rounded_angles_would_be_noticed(models, unet, inputs, tmp_path):
    """At t = 937 an angle that is rounded to float16 is off by up to a quarter."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    plain = convert_float_to_float16(onnx.load(models / "unet.onnx"), keep_io_types=True)
    onnx.save(plain, tmp_path / "unet.onnx")
    difference = agreement(models / "float16/unet.onnx", unet, inputs) - agreement(
        tmp_path / "unet.onnx", unet, inputs
    )
    assert difference > 3


@pytest.fixture(scope="module")
def beside(unet, tmp_path_factory):
    """The exported UNet with its weights in a file beside it."""
    path = tmp_path_factory.mktemp("large") / "unet.onnx"
    export_onnx(unet, path, max_file_bytes=1000)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_large_weights_are_beside_the_model(kind, models, beside, inputs, tmp_path):
    assert weights_path(beside).stat().st_size > 40_000
    path = tmp_path / kind / "unet.onnx"
    path.parent.mkdir()
    convert_onnx(beside, path, kind=kind, max_file_bytes=1000)
    assert weights_path(path).exists()
    moved = shutil.copytree(path.parent, tmp_path / "elsewhere")
    whole = OnnxProgram(models / kind / "unet.onnx")(inputs)
    np.testing.assert_array_equal(OnnxProgram(moved / "unet.onnx")(inputs), whole)


def test_lost_weights_are_named(beside, tmp_path):
    shutil.copy(beside, tmp_path)
    with pytest.raises(ValueError, match=r"unet\.onnx\.data"):
        OnnxProgram(tmp_path / "unet.onnx")


class Rows(torch.nn.Module):
    """Rows of a table, times a number that float16 rounds to 2048."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(8, 4)

    def forward(self, ids):
        return 2049.0 * self.table(ids)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A module without timestep, and its model."""
    torch.manual_seed(0)
    ids, row = Port(name="ids", shape=(1, 3), kind="int32"), Port(name="row", shape=(1, 3, 4))
    module = FixedModule(name="rows", network=Rows(), inputs=(ids,), outputs=(row,))
    path = tmp_path_factory.mktemp("rows") / "rows.onnx"
    export_onnx(module, path)
    return module, path


def test_token_ids_are_int32(rows):
    module, path = rows
    program, ids = OnnxProgram(path), np.array([[3, 0, 7]], np.int32)
    np.testing.assert_allclose(program([ids]), module.reference([ids]), rtol=1e-6)
    with pytest.raises(ValueError, match="input ids is int64; int32 is accepted"):
        program([ids.astype(np.int64)])
    with pytest.raises(ValueError, match=r"inputs of shapes \[\(1, 2\)\] given"):
        program([ids[:, :2]])


def test_weights_are_rounded_to_float16(rows, tmp_path):
    module, path = rows
    convert_onnx(path, tmp_path / "half.onnx", kind="float16")
    ids = np.arange(3, dtype=np.int32)[None]
    table = module.network.table.weight.detach().half().numpy()[:3]
    # A product of two numbers of float16, before or after it is rounded itself.
    expected = 2048.0 * table[None].astype(np.float32)
    np.testing.assert_allclose(OnnxProgram(tmp_path / "half.onnx")([ids]), expected, rtol=2**-11)


@pytest.mark.parametrize("content", [b"not a model", None])
def test_what_is_no_model_is_refused(content, tmp_path):
    path = tmp_path / "unet.onnx"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^not a model for ONNX Runtime: .*unet\.onnx"):
        OnnxProgram(path)
