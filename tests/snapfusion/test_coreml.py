"""Core ML packages: compiled, read back, evaluated and held to torch."""

from __future__ import annotations

import numpy as np
import pytest
from small_networks import inputs_of, small_decoder, small_text_encoder, small_unet, small_vae
from torch import nn

from snapfusion.export.coreml import check_weights, compile_coreml, describe_package, read_program
from snapfusion.export.mil import Extremes, Program, evaluate
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
        extremes = Extremes()
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
    return Program(
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
        evaluate(overflowing, sample, observe=Extremes())


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
