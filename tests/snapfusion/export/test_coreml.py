"""Core ML packages: compiled, read back, evaluated and held to torch."""

from __future__ import annotations

import numpy as np
import pytest
from coremltools import convert, target
from coremltools.converters.mil import Builder
from coremltools.converters.mil.mil import types
from coremltools.models import MLModel
from coremltools.optimize.coreml import decompress_weights
from small_networks import inputs_of, small_decoder, small_text_encoder, small_unet, small_vae
from torch import nn

from snapfusion.export.coreml import (
    check_weights,
    compile_coreml,
    compress_package,
    describe_package,
    read_program,
    split_package,
)
from snapfusion.export.mil import MaxAbsObserver, MilProgram, evaluate, evaluate_chain
from snapfusion.export.parity import ParityError, check_parity
from snapfusion.models.decoder import HalfDecoder

MODULES = {"text_encoder": small_text_encoder, "unet": small_unet, "decoder": small_decoder}


class Compiled:
    """A module with its package, what that says, and inputs with torch's outputs."""

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
def test_package_states_named_ports_and_holds_nothing_unexpected_in_float32(compiled, name, inputs, output):
    described = compiled[name].description
    assert [(p.name, p.shape, p.dtype) for p in described.inputs] == inputs
    assert [(p.name, p.shape, p.dtype) for p in described.outputs] == [output]
    assert described.specification_version == 8
    assert described.float32_weights == ()
    assert described.float32_results == ()
    assert sorted(path.name for path in compiled[name].package.iterdir()) == ["Data", "Manifest.json"]


@pytest.mark.parametrize("name", MODULES)
def test_package_read_back_and_evaluated_agrees(compiled, name):
    one = compiled[name]
    # float16 has 11 significant bits: near torch's float32, and not equal to it.
    assert 50 < one.parity(one.program).psnr_db < 90


@pytest.mark.parametrize("name", MODULES)
def test_package_holds_the_networks_weights_in_float16(compiled, name):
    one = compiled[name]
    assert 0 < check_weights(one.program, one.module.network.state_dict()) <= 2**-10


def test_decoder_is_made_of_its_layers(compiled):
    operations = compiled["decoder"].description.operations
    convolutions = sum(isinstance(part, nn.Conv2d) for part in compiled["decoder"].module.network.modules())
    assert operations["conv"] == convolutions
    # Attention is four linear layers and one softmax.
    assert (operations["linear"], operations["softmax"]) == (4, 1)


def test_the_timestep_is_exact_until_its_waves_are_taken(compiled):
    wide = {
        (operation.kind, value.dtype)
        for operation in compiled["unet"].program.operations
        for value in operation.outputs
        if value.dtype == "float32"
    }
    assert {kind for kind, _ in wide} >= {"sin", "cos", "mul"}
    assert {kind for kind, _ in wide} <= {"sin", "cos", "mul", "tile", "expand_dims"}


def test_attention_with_channels_first_moves_nothing_but_the_condition(compiled):
    assert compiled["unet"].description.operations["transpose"] == 1


def test_extremes_of_real_programs_name_attentions_logits(compiled):
    for name in MODULES:
        extremes = MaxAbsObserver()
        evaluate(compiled[name].program, compiled[name].samples[0], observe=extremes)
        assert extremes.logit.kind == "matmul"
        # The causal mask's -10^4 is none of the network's own.
        assert 0 < extremes.logit.value <= extremes.largest.value < 1000


def test_the_same_module_gives_the_same_package(compiled, tmp_path):
    package = compiled["decoder"].package
    again = tmp_path / package.name
    compile_coreml(compiled["decoder"].module, again)
    assert bytes_of(again) == bytes_of(package)


def bytes_of(package):
    files = [path for path in package.rglob("*") if path.is_file()]
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("weights", "kind", "bits", "least_db"),
    [
        ("palette-6", "constexpr_lut_to_dense", 6, 25),
        ("palette-8", "constexpr_lut_to_dense", 8, 35),
        ("int8", "constexpr_affine_dequantize", 8, 35),
    ],
)
def test_compressed_weights_are_smaller_and_evaluated_as_what_they_stand_for(
    compiled, tmp_path, weights, kind, bits, least_db
):
    one = compiled["decoder"]
    package = tmp_path / "decoder.mlpackage"
    compress_package(one.package, package, weights=weights)
    program, described = read_program(package), describe_package(package)
    matrices = [array for array in one.program.weights().values() if array.ndim > 1 and array.size > 2048]
    assert described.operations[kind] == len(matrices)
    saved = sum(array.nbytes for array in matrices) * (1 - bits / 16)
    # Beside the indices there are palettes, or scales, of at most 512 bytes, and a header for each.
    smallest = one.description.weight_bytes - saved
    assert smallest < described.weight_bytes < smallest + 600 * len(matrices)
    assert (described.float32_results, described.specification_version) == ((), 8)
    assert least_db < one.parity(program, limit_db=least_db).psnr_db < 60
    # coremltools' own undoing of the compression gives the same network.
    dense = tmp_path / "dense.mlpackage"
    decompress_weights(MLModel(str(package), skip_model_load=True)).save(str(dense))
    np.testing.assert_array_equal(
        evaluate(program, one.samples[0]), evaluate(read_program(dense), one.samples[0])
    )


def test_the_same_package_is_compressed_to_the_same_bytes(compiled, tmp_path):
    package = compiled["decoder"].package
    for folder in ("once", "again"):
        compress_package(package, tmp_path / folder / package.name, weights="palette-6")
    assert bytes_of(tmp_path / "once" / package.name) == bytes_of(tmp_path / "again" / package.name)
    compress_package(package, tmp_path / "copy" / package.name, weights="float16")
    assert bytes_of(tmp_path / "copy" / package.name) == bytes_of(package)


@pytest.fixture(scope="module")
def halves(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    return split_package(compiled["unet"].package, folder, names=("unet-1", "unet-2"))


def test_two_halves_compute_what_the_whole_does(compiled, halves):
    assert [half.name for half in halves] == ["unet-1.mlpackage", "unet-2.mlpackage"]
    unet = compiled["unet"]
    programs = [read_program(half) for half in halves]
    for sample in unet.samples:
        whole = evaluate(unet.program, sample)
        np.testing.assert_array_equal(evaluate_chain(programs, sample), whole)
    assert 0 < check_weights(programs, unet.module.network.state_dict()) <= 2**-10
    with pytest.raises(ParityError, match="lacks the network's weight"):
        check_weights(programs[:1], unet.module.network.state_dict())


def test_each_half_has_about_half_the_weights_and_float16_ports(compiled, halves):
    first, second = (describe_package(half) for half in halves)
    whole = compiled["unet"].description
    for half in (first, second):
        assert half.weight_bytes == pytest.approx(whole.weight_bytes / 2, rel=0.2)
        assert (half.float32_weights, half.float32_results, half.specification_version) == ((), (), 8)
    crossing = {(port.name, port.shape, port.dtype) for port in first.outputs}
    assert crossing <= {(port.name, port.shape, port.dtype) for port in second.inputs}
    assert {dtype for _, _, dtype in crossing} == {"FLOAT16"}
    assert second.outputs == whole.outputs


def test_halves_are_cut_before_they_are_compressed(halves, tmp_path):
    compress_package(halves[0], tmp_path / "unet-1.mlpackage", weights="palette-8")
    assert describe_package(tmp_path / "unet-1.mlpackage").inputs == describe_package(halves[0]).inputs
    with pytest.raises(ValueError, match="cut it in two first, and compress the halves"):
        split_package(tmp_path / "unet-1.mlpackage", tmp_path, names=("a", "b"))
    assert [path.name for path in tmp_path.iterdir()] == ["unet-1.mlpackage"]


def test_the_same_package_is_cut_into_the_same_bytes(compiled, halves, tmp_path):
    again = split_package(compiled["unet"].package, tmp_path, names=("unet-1", "unet-2"))
    assert [bytes_of(half) for half in again] == [bytes_of(half) for half in halves]


def test_a_full_vocabulary_is_looked_up_whole(tmp_path):
    # Token ids of CLIP's vocabulary are beyond int16.
    module = small_text_encoder(vocabulary=49408)
    compile_coreml(module, tmp_path / "text_encoder.mlpackage")
    token_ids = np.array([[49406, 320, 40000, 49407, 49407, 49407]], np.int32)
    output = evaluate(read_program(tmp_path / "text_encoder.mlpackage"), [token_ids])
    np.testing.assert_allclose(output, module.reference([token_ids]), atol=0.02)


def test_weights_of_another_network_are_not_found(compiled):
    other = HalfDecoder.from_vae(small_vae(seed=1))
    with pytest.raises(ParityError, match=r"lacks the network's weight .*weight"):
        check_weights([compiled["decoder"].program], other.state_dict())


def with_constants(program, **altered):
    return MilProgram(
        inputs=program.inputs,
        outputs=program.outputs,
        constants={**program.constants, **altered},
        operations=program.operations,
    )


def test_one_altered_kernel_is_refused(compiled):
    program = compiled["decoder"].program
    name = next(name for name, array in program.weights().items() if array.ndim == 4 and array.shape[-1] == 3)
    perturbed = with_constants(program, **{name: program.constants[name] * np.float16(1.5)})
    with pytest.raises(ParityError, match=r"PSNR [-0-9.]+ dB .* 35 dB is the limit"):
        compiled["decoder"].parity(perturbed)


def test_an_overflow_inside_the_network_is_named(compiled):
    program, sample = compiled["decoder"].program, compiled["decoder"].samples[0]
    name = next(name for name, array in program.weights().items() if array.ndim == 4 and array.shape[-1] == 3)
    reader = next(operation for operation in program.operations if name in operation.reads())
    overflowing = with_constants(program, **{name: program.constants[name] * np.float16(3e4)})
    with pytest.raises(
        ParityError, match=rf"{reader.name} \(conv\) gives \d+ values .* not finite on sample 0"
    ):
        evaluate(overflowing, sample, observe=MaxAbsObserver())


@pytest.mark.parametrize("value", [np.inf, 1e5])
def test_a_weight_beyond_float16_is_refused_by_name(tmp_path, value):
    module = small_decoder()
    module.network.decode.decoder.conv_in.weight.data[0, 0, 0, 0] = value
    with pytest.raises(
        ValueError, match=r"decoder.conv_in.weight of decoder holds (inf|100000), and float16"
    ):
        compile_coreml(module, tmp_path / "decoder.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_never_written_over(compiled):
    with pytest.raises(ValueError, match="exists"):
        compile_coreml(compiled["decoder"].module, compiled["decoder"].package)


def test_a_folder_that_is_no_package_is_refused(tmp_path):
    (tmp_path / "decoder.mlpackage").mkdir()
    with pytest.raises(ValueError, match="not a readable Core ML package"):
        read_program(tmp_path / "decoder.mlpackage")


@pytest.mark.parametrize("name", ["weight.bin", "model.mlmodel", "Manifest.json"])
def test_a_damaged_package_is_refused(compiled, tmp_path, name):
    package = tmp_path / "decoder.mlpackage"
    compress_package(compiled["decoder"].package, package, weights="float16")
    (file,) = package.rglob(name)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(ValueError, match=r"decoder.mlpackage is not a readable Core ML package"):
        describe_package(package)


def test_a_package_with_an_infinite_weight_is_refused_by_name(compiled, tmp_path):
    package = tmp_path / "decoder.mlpackage"
    compress_package(compiled["decoder"].package, package, weights="float16")
    weights = compiled["decoder"].program.weights()
    name = next(name for name, array in weights.items() if array.ndim == 4)
    kernel = weights[name].tobytes()
    (file,) = package.rglob("weight.bin")
    infinite = np.float16(np.inf).tobytes() + kernel[2:]
    file.write_bytes(file.read_bytes().replace(kernel, infinite))
    with pytest.raises(ValueError, match=rf"weight {name} of shape .* holds values not finite"):
        describe_package(package)


def test_an_operation_that_ios_17_lacks_is_refused_by_name(tmp_path):
    port = Builder.TensorSpec(shape=(1, 2, 8, 8), dtype=types.fp16)

    @Builder.program(input_specs=[port], opset_version=target.iOS18)
    def attention(x):
        return Builder.scaled_dot_product_attention(query=x, key=x, value=x)

    model = convert(attention, minimum_deployment_target=target.iOS18, skip_model_load=True)
    model.save(str(tmp_path / "later.mlpackage"))
    with pytest.raises(ValueError, match="after iOS 17: operations scaled_dot_product_attention"):
        describe_package(tmp_path / "later.mlpackage")
