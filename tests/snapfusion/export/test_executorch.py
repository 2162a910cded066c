"""ExecuTorch programs: compiled, described, opened and executed as a phone's runtime does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from snapfusion.export.coreml import read_program
from snapfusion.export.executorch import (
    ExecuTorchProgram,
    ProgramPort,
    compile_executorch,
    decomposed_attention,
    describe_program,
    extract_package,
)
from snapfusion.export.mil import evaluate
from snapfusion.export.modules import FixedModule, Port, text_encoder_module
from snapfusion.export.parity import check_parity


class Words(nn.Module):
    """Token ids to what a small convolution and a linear layer make of their embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(1, 64, 3, padding=1)
        self.linear = nn.Linear(64 * 16, 128)

    def forward(self, ids, scale):
        image = torch.nn.functional.silu(self.conv(self.embedding(ids)[:, None] * scale))
        return self.linear(image.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def words():
    torch.manual_seed(0)
    return FixedModule(
        name="words",
        network=Words().eval(),
        inputs=(Port(name="ids", shape=(1, 8), kind="int32"), Port(name="scale", shape=(1,))),
        outputs=(Port(name="output", shape=(1, 8, 128)),),
    )


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return [[rng.integers(20, size=(1, 8), dtype=np.int32), rng.random(1, np.float32)] for _ in range(4)]


@pytest.fixture(scope="module")
def references(words, samples):
    return [words.reference(inputs) for inputs in samples]


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=20, max_position_embeddings=8, **sizes)
    return text_encoder_module(CLIPTextModel(config).eval(), length=8)


@pytest.fixture(scope="module")
def compiled(words):
    return compile_executorch(words)


@pytest.fixture(scope="module")
def for_core_ml(words):
    return compile_executorch(words, delegate="coreml")


@pytest.fixture(scope="module")
def path(compiled, tmp_path_factory):
    path = tmp_path_factory.mktemp("programs") / "words.pte"
    path.write_bytes(compiled)
    return path


def test_a_program_is_executed_and_agrees(words, samples, references, compiled, capfd):
    program = ExecuTorchProgram(compiled)
    outputs = [program(inputs) for inputs in samples]
    parity = check_parity(artifact="words.pte", outputs=outputs, references=references)
    assert parity.psnr_db > 100
    assert capfd.readouterr().err == ""


class Branches(nn.Module):
    """Where a convolution in 8 bits is easily lowered wrongly: after a scale, and two of one input."""

    def __init__(self):
        super().__init__()
        self.before, self.wide, self.narrow = (
            nn.Conv2d(8, 32, 3, padding=1),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.Conv2d(32, 64, 1),
        )
        self.linear = nn.Linear(64, 128)

    def forward(self, x):
        hidden = torch.nn.functional.silu(self.before(x / 0.4) * 0.5 + 0.5)
        both = self.wide(hidden) + self.narrow(hidden)
        return self.linear(both.flatten(2).transpose(1, 2))


@pytest.fixture(scope="module")
def branches():
    torch.manual_seed(1)
    return FixedModule(
        name="branches",
        network=Branches().eval(),
        inputs=(Port(name="x", shape=(2, 8, 6, 6)),),
        outputs=(Port(name="output", shape=(2, 36, 128)),),
    )


def test_convolutions_in_8_bits_agree_where_a_plain_lowering_goes_wrong(branches):
    quantized, whole = compile_executorch(branches, weights="int8"), compile_executorch(branches)
    program = ExecuTorchProgram(quantized)
    samples = list(np.random.default_rng(0).standard_normal((4, 1, 2, 8, 6, 6), dtype=np.float32))
    parity = check_parity(
        artifact="branches.pte",
        outputs=[program(inputs) for inputs in samples],
        references=[branches.reference(inputs) for inputs in samples],
    )
    assert 40 < parity.psnr_db < 70
    # The two convolutions of one input keep their float32, 81,920 bytes of it.
    assert 81_920 < len(quantized) < len(whole)
    assert set(describe_program(quantized).delegates) == {"XnnpackBackend"}


def test_a_program_in_8_bits_is_a_third_in_size_with_the_same_ports(words, samples, references, compiled):
    quantized = compile_executorch(words, weights="int8")
    program = ExecuTorchProgram(quantized)
    assert (program.inputs, program.outputs) == (
        describe_program(compiled).inputs,
        describe_program(compiled).outputs,
    )
    outputs = [program(inputs) for inputs in samples]
    assert check_parity(artifact="words.pte", outputs=outputs, references=references).psnr_db > 40
    assert 3 * len(quantized) < len(compiled)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_taken_apart_is_torchs(masked, scale):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    mask = torch.randn(1, 1, 5, 7) if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    torch.testing.assert_close(decomposed_attention(q, k, v, mask, scale=scale), expected)


def test_attention_leaves_nothing_to_slow_kernels(text):
    description = describe_program(compile_executorch(text))
    assert set(description.kernels) == {"aten::embedding", "aten::native_layer_norm"}


def test_a_program_for_core_ml_is_described_and_refused(for_core_ml):
    description = describe_program(for_core_ml)
    assert (description.delegates, description.kernels) == ({"CoreMLBackend": 1}, {})
    assert [port.dtype for port in description.inputs] == ["int32", "float32"]
    with pytest.raises(ValueError, match=r"lowered for CoreMLBackend, but ExecuTorch has .*XnnpackBackend"):
        ExecuTorchProgram(for_core_ml)


def test_the_package_that_core_mls_delegate_is_handed_agrees(for_core_ml, samples, references, tmp_path):
    (tmp_path / "words.pte").write_bytes(for_core_ml)
    extract_package(tmp_path / "words.pte", tmp_path / "words.mlpackage")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.mlpackage", "words.pte"]
    program = read_program(tmp_path / "words.mlpackage")
    outputs = [evaluate(program, inputs) for inputs in samples]
    parity = check_parity(artifact="words.pte", outputs=outputs, references=references)
    assert 50 < parity.psnr_db < 100
    with pytest.raises(ValueError, match="exists"):
        extract_package(for_core_ml, tmp_path / "words.mlpackage")


def test_a_program_without_a_package_has_none_to_write(compiled, tmp_path):
    with pytest.raises(ValueError, match=r"calls \{'XnnpackBackend': \d\}; one call of CoreMLBackend"):
        extract_package(compiled, tmp_path / "words.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_8_bits_for_core_ml_are_refused(words):
    with pytest.raises(ValueError, match="lowered to XNNPACK alone"):
        compile_executorch(words, weights="int8", delegate="coreml")


def test_a_program_states_its_inputs_and_outputs_with_their_types(compiled):
    program = ExecuTorchProgram(compiled)
    assert program.inputs == (
        ProgramPort(shape=(1, 8), dtype="int32"),
        ProgramPort(shape=(1,), dtype="float32"),
    )
    assert program.outputs == (ProgramPort(shape=(1, 8, 128), dtype="float32"),)


def test_a_description_counts_what_the_delegate_took_and_what_it_left(compiled, path):
    description = describe_program(path)
    assert description == describe_program(compiled)
    assert set(description.delegates) == {"XnnpackBackend"}
    assert description.kernels["aten::embedding"] == 1
    assert not any("convolution" in kernel or "addmm" in kernel for kernel in description.kernels)
    assert description.planned_bytes > 8 * 128 * 4


def test_a_program_opened_by_its_path_is_mapped_and_agrees(path, samples, compiled):
    program, read = ExecuTorchProgram(path), ExecuTorchProgram(compiled)
    np.testing.assert_array_equal(program(samples[0]), read(samples[0]))
    assert str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("number", "given", "message"),
    [
        (0, np.zeros((1, 9), np.int32), r"refuses inputs of shapes \[\(1, 9\), \(1,\)\]; .*\(1, 8\)"),
        (0, np.zeros((1, 8), np.int64), "input 0 is int64; the program accepts int32"),
        (0, np.zeros((1, 8), np.float32), "input 0 is float32; the program accepts int32"),
        (1, np.zeros(1, np.int32), "input 1 is int32; the program accepts float32"),
    ],
)
def test_inputs_of_other_shapes_or_kinds_are_refused(compiled, samples, number, given, message):
    inputs = [*samples[0]]
    inputs[number] = given
    with pytest.raises(ValueError, match=message):
        ExecuTorchProgram(compiled)(inputs)


def test_too_few_inputs_are_refused(compiled, samples):
    with pytest.raises(ValueError, match=r"refuses inputs of shapes \[\(1, 8\)\]"):
        ExecuTorchProgram(compiled)(samples[0][:1])


def test_a_double_is_brought_to_the_programs_precision(compiled, samples):
    program = ExecuTorchProgram(compiled)
    doubled = [samples[0][0], samples[0][1].astype(np.float64)]
    np.testing.assert_array_equal(program(doubled), program(samples[0]))


@pytest.mark.parametrize("opened", [ExecuTorchProgram, describe_program])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:40], lambda b: b"", lambda b: b"x" * 999]
)
def test_what_is_no_program_is_refused(compiled, tmp_path, opened, damage):
    damaged = damage(compiled)
    with pytest.raises(ValueError, match=f"not an ExecuTorch program: {len(damaged):,} bytes"):
        opened(damaged)
    (tmp_path / "damaged.pte").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"not an ExecuTorch program: .*damaged\.pte"):
        opened(tmp_path / "damaged.pte")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*missing\.pte"):
        ExecuTorchProgram(tmp_path / "missing.pte")
