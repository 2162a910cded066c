"""Compiled programs: executed or read back, held to torch, and refused when they differ."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from snapfusion.export.coreml import check_weights, compile_coreml, describe_package, read_program
from snapfusion.export.mil import Operation, Program, UnknownOperationError, evaluate
from snapfusion.export.modules import Port, decoder_module
from snapfusion.export.parity import ParityError, check_parity
from snapfusion.models.decoder import HalfDecoder

LATENT = (4, 8, 8)
SCALING = 0.4


def small_vae(seed=0):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=SCALING,
        sample_size=16,
    )
    # Fresh networks have unit GroupNorms and zero biases, which a converter may fold away.
    for parameter in vae.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return vae.eval()


@pytest.fixture(scope="module")
def half():
    return decoder_module(HalfDecoder.from_vae(small_vae()), latent_shape=LATENT)


@pytest.fixture(scope="module")
def latents():
    return list(np.random.default_rng(0).standard_normal((4, 1, *LATENT), dtype=np.float32))


@pytest.fixture(scope="module")
def references(half, latents):
    return [half.reference([latent]) for latent in latents]


@pytest.fixture(scope="module")
def package(half, tmp_path_factory):
    path = tmp_path_factory.mktemp("coreml") / "decoder.mlpackage"
    compile_coreml(half, path)
    return path


@pytest.fixture(scope="module")
def program(package):
    return read_program(package)


def test_decoder_takes_a_scaled_latent_and_gives_an_image_from_0_to_1(latents):
    vae = small_vae()
    module = decoder_module(vae, latent_shape=LATENT)
    with torch.no_grad():
        image = vae.decode(torch.from_numpy(latents[0]) / SCALING).sample
    assert (module.inputs[0].shape, module.outputs[0].shape) == ((1, 4, 8, 8), (1, 3, 16, 16))
    np.testing.assert_allclose(module.reference([latents[0]]), (image / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_half_decoder_differs_from_its_own_output_in_range_alone(half, latents, references):
    image = half.network.decode.decode(torch.from_numpy(latents[0]))
    np.testing.assert_allclose(references[0], image / 2 + 0.5, atol=1e-6)


def test_other_shapes_are_refused(half):
    with pytest.raises(ValueError, match=r"\(1, 4, 9, 8\).* given; .*\(1, 4, 8, 8\)"):
        half.reference([np.zeros((1, 4, 9, 8), np.float32)])


def test_package_states_named_float16_ports_and_holds_nothing_in_float32(package, half):
    described = describe_package(package)
    assert [(p.name, p.shape, p.dtype) for p in described.inputs] == [("latent", (1, 4, 8, 8), "FLOAT16")]
    assert [(p.name, p.shape, p.dtype) for p in described.outputs] == [("image", (1, 3, 16, 16), "FLOAT16")]
    assert described.specification_version == 8
    assert described.float32_weights == ()
    # Attention is four linear layers and one softmax.
    assert described.operations["conv"] == sum(isinstance(m, nn.Conv2d) for m in half.network.modules())
    assert (described.operations["linear"], described.operations["softmax"]) == (4, 1)
    assert sorted(path.name for path in package.iterdir()) == ["Data", "Manifest.json"]


def test_the_same_module_gives_the_same_package(half, package, tmp_path):
    again = tmp_path / "decoder.mlpackage"
    compile_coreml(half, again)
    for path in (path for path in package.rglob("*") if path.is_file()):
        assert path.read_bytes() == (again / path.relative_to(package)).read_bytes(), path.name


def test_package_read_back_and_evaluated_agrees(program, latents, references):
    outputs = [evaluate(program, [latent]) for latent in latents]
    parity = check_parity(artifact="decoder.mlpackage", outputs=outputs, references=references)
    # float16 has 11 significant bits: near torch's float32, and not equal to it.
    assert 50 < parity.psnr_db < 90


def test_package_holds_the_networks_weights_in_float16(program, half):
    assert 0 < check_weights(program, half.network.state_dict()) <= 2**-10


def test_weights_of_another_network_are_not_found(program):
    other = HalfDecoder.from_vae(small_vae(seed=1))
    with pytest.raises(ParityError, match=r"lacks the network's weight .*weight"):
        check_weights(program, other.state_dict())


def test_one_altered_kernel_is_refused(program, latents, references):
    name = next(name for name, array in program.weights().items() if array.ndim == 4 and array.shape[-1] == 3)
    altered = {**program.constants, name: program.constants[name] * np.float16(1.5)}
    perturbed = Program(
        inputs=program.inputs, outputs=program.outputs, constants=altered, operations=program.operations
    )
    outputs = [evaluate(perturbed, [latent]) for latent in latents]
    with pytest.raises(ParityError, match=r"PSNR [-0-9.]+ dB .* 35 dB is the limit"):
        check_parity(artifact="decoder.mlpackage", outputs=outputs, references=references)


def test_overflow_of_float16_reaches_the_output():
    x, y = Port(name="x", shape=(1, 2)), Port(name="y", shape=(1, 2))
    square = Operation(kind="square", inputs={"x": "x"}, output="y", dtype="float16")
    program = Program(inputs=(x,), outputs=(y,), constants={}, operations=(square,))
    result = evaluate(program, [np.array([[200.0, 300.0]], np.float32)])
    assert result.tolist() == [[40000.0, np.inf]]


def test_an_unknown_operation_is_named():
    port = Port(name="x", shape=(1,))
    step = Operation(kind="gelu_of_tomorrow", inputs={"x": "x"}, output="x", dtype="float32")
    program = Program(inputs=(port,), outputs=(port,), constants={}, operations=(step,))
    with pytest.raises(UnknownOperationError, match="gelu_of_tomorrow"):
        evaluate(program, [np.zeros(1, np.float32)])


def test_a_package_is_never_written_over(half, package):
    with pytest.raises(ValueError, match="exists"):
        compile_coreml(half, package)


def test_a_folder_that_is_no_package_is_refused(tmp_path):
    (tmp_path / "decoder.mlpackage").mkdir()
    with pytest.raises(ValueError, match="not a readable Core ML package"):
        read_program(tmp_path / "decoder.mlpackage")


def test_the_gate_opens_at_its_limit_and_not_below():
    reference = np.ones((1, 1000), np.float32)
    # An error of 1 % of the peak is 40 dB.
    parity = check_parity(artifact="a", outputs=[reference + 0.01], references=[reference], limit_db=39.9)
    assert parity.psnr_db == pytest.approx(40.0, abs=1e-3)
    assert parity.max_abs_error == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(ParityError, match=r"a does not agree with torch: PSNR 40.00 dB .* 40.1 dB"):
        check_parity(artifact="a", outputs=[reference + 0.01], references=[reference], limit_db=40.1)


def test_the_worst_sample_decides():
    reference = np.ones((1, 10), np.float32)
    outputs = [reference] * 99 + [reference * 0.9]
    with pytest.raises(ParityError, match=r"20\.00 dB on sample 99 of 100"):
        check_parity(artifact="a", outputs=outputs, references=[reference] * 100)


def test_equal_outputs_have_no_finite_figure():
    reference = np.ones((1, 4), np.float32)
    parity = check_parity(artifact="a", outputs=[reference], references=[reference])
    assert (parity.psnr_db, parity.max_abs_error) == (None, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused(value):
    reference = np.ones((1, 4), np.float32)
    output = reference.copy()
    output[0, 1] = value
    with pytest.raises(ParityError, match="1 values that are not finite"):
        check_parity(artifact="a", outputs=[output], references=[reference])


@pytest.mark.parametrize("values", [[np.nan, 1.0], [0.0, 0.0]])
def test_a_reference_that_measures_nothing_is_refused(values):
    reference = np.array([values], np.float32)
    with pytest.raises(ValueError, match="not usable"):
        check_parity(artifact="a", outputs=[reference], references=[reference])


def test_no_samples_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        check_parity(artifact="a", outputs=[], references=[])
    with pytest.raises(ParityError, match="gives shapes"):
        check_parity(artifact="a", outputs=[np.ones((1, 3))], references=[np.ones((1, 4))])
