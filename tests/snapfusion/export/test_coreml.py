"""Core ML packages: compiled, read back, evaluated and compared with torch."""

import dataclasses

import numpy as np
import pytest
from coremltools import convert, target
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import types
from coremltools.models import MLModel
from coremltools.optimize.coreml import decompress_weights
from small_networks import inputs_of, small_decoder, small_text_encoder, small_unet, small_vae
from torch import nn

from snapfusion.export.coreml import compile_coreml, compress_package, split_package
from snapfusion.export.coreml_package import check_weights, describe_package, read_program
from snapfusion.export.mil import MaxAbsObserver, evaluate
from snapfusion.export.parity import ParityError, check_parity
from snapfusion.models.decoder import HalfDecoder

MODULES = {"text_encoder": small_text_encoder, "unet": small_unet, "decoder": small_decoder}


class Compiled:
    """A module with its package, and inputs with torch's outputs."""

    def __init__(self, module, package):
        self.module, self.package = module, package
        compile_coreml(module, package)
        self.program = read_program(package)
        self.description = describe_package(package)
        self.samples = [inputs_of(module, seed=seed) for seed in range(3)]
        self.references = [module.reference(sample) for sample in self.samples]

    def parity(self, program, *, limit_db=35.0):
        outputs = [evaluate(program, sample) for sample in self.samples]
        name = self.package.name
        return check_parity(artifact=name, outputs=outputs, references=self.references, limit_db=limit_db)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coreml")
    return {name: Compiled(make(), folder / f"{name}.mlpackage") for name, make in MODULES.items()}


@pytest.fixture
def decoder(compiled):
    return compiled["decoder"]


@pytest.fixture
def copied(decoder, tmp_path):
    """A copy of the decoder's package, to be damaged."""
    compress_package(decoder.package, tmp_path / "decoder.mlpackage", weights="float16")
    return tmp_path / "decoder.mlpackage"


def bytes_of(package):
    files = [path for path in package.rglob("*") if path.is_file()]
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("name", "inputs", "output"),
    [
        ("text_encoder", [("token_ids", (1, 6), "INT32")], ("c", (1, 6, 16), "FLOAT16")),
        (
            "unet",
            [("z_t", (1, 4, 8, 8), "FLOAT16"), ("t", (1,), "FLOAT32"), ("c", (2, 6, 16), "FLOAT16")],
            ("output", (2, 4, 8, 8), "FLOAT16"),
        ),
        ("decoder", [("latent", (1, 4, 8, 8), "FLOAT16")], ("image", (1, 3, 16, 16), "FLOAT16")),
    ],
)
def test_a_package_states_named_float16_ports(compiled, name, inputs, output):
    description = compiled[name].description
    assert [dataclasses.astuple(port) for port in description.inputs] == inputs
    assert [dataclasses.astuple(port) for port in description.outputs] == [output]
    assert description.specification_version == 8
    assert (description.float32_weights, description.float32_results) == ((), ())
    assert sorted(path.name for path in compiled[name].package.iterdir()) == ["Data", "Manifest.json"]


@pytest.mark.parametrize("name", MODULES)
def test_a_package_has_the_networks_outputs_and_weights(compiled, name):
    one = compiled[name]
    # float16 has 11 significant bits: near torch's float32, and not equal to it.
    assert 50 < one.parity(one.program).psnr_db < 90
    assert 0 < check_weights(one.program, one.module.network.state_dict()) <= 2**-10


@pytest.mark.parametrize("name", MODULES)
def test_the_largest_attention_logit_is_found(compiled, name):
    observer = MaxAbsObserver()
    evaluate(compiled[name].program, compiled[name].samples[0], observe=observer)
    assert observer.logit.kind == "matmul"
    # The causal mask's -10^4 does not count.
    assert 0 < observer.logit.value <= observer.largest.value < 1000


def test_decoder_operations_are_its_layers(decoder):
    operations = decoder.description.operations
    assert operations["conv"] == sum(isinstance(part, nn.Conv2d) for part in decoder.module.network.modules())
    # Attention is four linear layers and one softmax.
    assert (operations["linear"], operations["softmax"]) == (4, 1)


def test_only_the_timestep_embedding_is_float32(compiled):
    operations = compiled["unet"].program.operations
    wide = {each.kind for each in operations for value in each.outputs if value.dtype == "float32"}
    assert {"sin", "cos", "mul"} <= wide <= {"sin", "cos", "mul", "tile", "expand_dims"}


def test_compilation_is_deterministic(decoder, tmp_path):
    again = tmp_path / decoder.package.name
    compile_coreml(decoder.module, again)
    assert bytes_of(again) == bytes_of(decoder.package)


@pytest.mark.parametrize(
    ("weights", "kind", "bits", "least_db"),
    [
        ("palette-6", "constexpr_lut_to_dense", 6, 25),
        pytest.param("palette-8", "constexpr_lut_to_dense", 8, 35, marks=pytest.mark.slow),
        ("int8", "constexpr_affine_dequantize", 8, 35),
    ],
)
def test_compressed_weights_are_smaller_and_evaluated(decoder, tmp_path, weights, kind, bits, least_db):
    package = tmp_path / "decoder.mlpackage"
    compress_package(decoder.package, package, weights=weights)
    program, description = read_program(package), describe_package(package)
    matrices = [array for array in decoder.program.weights().values() if array.ndim > 1 and array.size > 2048]
    assert description.operations[kind] == len(matrices)
    saved = sum(array.nbytes for array in matrices) * (1 - bits / 16)
    # Besides the indices there are palettes, or scales, of at most 512 bytes, and a header for each.
    smallest = decoder.description.weight_bytes - saved
    assert smallest < description.weight_bytes < smallest + 600 * len(matrices)
    assert (description.float32_results, description.specification_version) == ((), 8)
    assert least_db < decoder.parity(program, limit_db=least_db).psnr_db < 60
    # coremltools' own decompression gives the same network.
    dense = tmp_path / "dense.mlpackage"
    decompress_weights(MLModel(str(package), skip_model_load=True)).save(str(dense))
    sample = decoder.samples[0]
    np.testing.assert_array_equal(evaluate(program, sample), evaluate(read_program(dense), sample))


@pytest.mark.slow
def test_compression_is_deterministic(decoder, copied, tmp_path):
    for folder in ("once", "again"):
        compress_package(decoder.package, tmp_path / folder / "decoder.mlpackage", weights="palette-6")
    once, again = (bytes_of(tmp_path / folder / "decoder.mlpackage") for folder in ("once", "again"))
    assert once == again
    assert bytes_of(copied) == bytes_of(decoder.package)


@pytest.fixture(scope="module")
def halves(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    return split_package(compiled["unet"].package, folder, names=("unet-1", "unet-2"))


def test_two_halves_compute_the_wholes_output(compiled, halves):
    assert [half.name for half in halves] == ["unet-1.mlpackage", "unet-2.mlpackage"]
    unet = compiled["unet"]
    programs = [read_program(half) for half in halves]
    for sample in unet.samples:
        np.testing.assert_array_equal(evaluate(programs, sample), evaluate(unet.program, sample))
    assert 0 < check_weights(programs, unet.module.network.state_dict()) <= 2**-10
    with pytest.raises(ParityError, match="lacks the network's weight"):
        check_weights(programs[:1], unet.module.network.state_dict())


def test_each_half_has_half_the_weights(compiled, halves):
    first, second = (describe_package(half) for half in halves)
    whole = compiled["unet"].description
    for half in (first, second):
        assert half.weight_bytes == pytest.approx(whole.weight_bytes / 2, rel=0.2)
        assert (half.float32_weights, half.float32_results, half.specification_version) == ((), (), 8)
    assert set(first.outputs) <= set(second.inputs)
    assert {port.dtype for port in first.outputs} == {"FLOAT16"}
    assert second.outputs == whole.outputs


def test_packages_are_split_before_they_are_compressed(halves, tmp_path):
    compress_package(halves[0], tmp_path / "unet-1.mlpackage", weights="palette-8")
    assert describe_package(tmp_path / "unet-1.mlpackage").inputs == describe_package(halves[0]).inputs
    with pytest.raises(ValueError, match="compressed"):
        split_package(tmp_path / "unet-1.mlpackage", tmp_path, names=("a", "b"))
    assert [path.name for path in tmp_path.iterdir()] == ["unet-1.mlpackage"]


def test_splitting_is_deterministic(compiled, halves, tmp_path):
    again = split_package(compiled["unet"].package, tmp_path, names=("unet-1", "unet-2"))
    assert [bytes_of(half) for half in again] == [bytes_of(half) for half in halves]


def test_token_ids_beyond_int16_are_accepted(tmp_path):
    module = small_text_encoder(vocabulary=49408)
    compile_coreml(module, tmp_path / "text_encoder.mlpackage")
    token_ids = np.array([[49406, 320, 40000, 49407, 49407, 49407]], np.int32)
    output = evaluate(read_program(tmp_path / "text_encoder.mlpackage"), [token_ids])
    np.testing.assert_allclose(output, module.reference([token_ids]), atol=0.02)


def test_weights_of_another_network_are_refused(decoder):
    other = HalfDecoder.from_vae(small_vae(seed=1))
    with pytest.raises(ParityError, match=r"lacks the network's weight .*weight"):
        check_weights([decoder.program], other.state_dict())


def with_scaled_kernel(program, factor):
    """The program with its first 3x3 kernel scaled, and the kernel's name."""
    name = next(name for name, array in program.weights().items() if array.ndim == 4 and array.shape[-1] == 3)
    constants = {**program.constants, name: program.constants[name] * np.float16(factor)}
    return dataclasses.replace(program, constants=constants), name


def test_one_altered_kernel_is_refused(decoder):
    altered, _ = with_scaled_kernel(decoder.program, 1.5)
    with pytest.raises(ParityError, match=r"PSNR [-0-9.]+ dB .* 35 dB is the limit"):
        decoder.parity(altered)


def test_an_overflow_inside_the_network_is_named(decoder):
    overflowing, name = with_scaled_kernel(decoder.program, 3e4)
    reader = next(operation for operation in decoder.program.operations if name in operation.reads())
    with pytest.raises(ParityError, match=rf"{reader.name} \(conv\) gives \d+ values .* sample 0"):
        evaluate(overflowing, decoder.samples[0], observe=MaxAbsObserver())


@pytest.mark.parametrize("value", [np.inf, 1e5])
def test_a_weight_beyond_float16_is_refused(tmp_path, value):
    module = small_decoder()
    module.network.decode.decoder.conv_in.weight.data[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"decoder.conv_in.weight of decoder holds (inf|100000)"):
        compile_coreml(module, tmp_path / "decoder.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_not_overwritten(decoder):
    with pytest.raises(ValueError, match="exists"):
        compile_coreml(decoder.module, decoder.package)


def test_an_empty_folder_is_no_package(tmp_path):
    with pytest.raises(ValueError, match="not a readable Core ML package"):
        read_program(tmp_path)


@pytest.mark.parametrize("name", ["weight.bin", "model.mlmodel", "Manifest.json"])
def test_a_damaged_package_is_refused(copied, name):
    (file,) = copied.rglob(name)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(ValueError, match=r"decoder.mlpackage is not a readable Core ML package"):
        describe_package(copied)


def test_an_infinite_weight_is_named(decoder, copied):
    name, array = next((name, array) for name, array in decoder.program.weights().items() if array.ndim == 4)
    kernel = array.tobytes()
    (file,) = copied.rglob("weight.bin")
    infinite = np.float16(np.inf).tobytes() + kernel[2:]
    file.write_bytes(file.read_bytes().replace(kernel, infinite))
    with pytest.raises(ValueError, match=rf"weight {name} .* is not finite"):
        describe_package(copied)


def test_an_operation_after_ios_17_is_named(tmp_path):
    port = Builder.TensorSpec(shape=(1, 2, 8, 8), dtype=types.fp16)

    @Builder.program(input_specs=[port], opset_version=target.iOS18)
    def attention(x):
        return Builder.scaled_dot_product_attention(query=x, key=x, value=x)

    model = convert(attention, minimum_deployment_target=target.iOS18, skip_model_load=True)
    model.save(str(tmp_path / "later.mlpackage"))
    with pytest.raises(ValueError, match="operations scaled_dot_product_attention"):
        describe_package(tmp_path / "later.mlpackage")
