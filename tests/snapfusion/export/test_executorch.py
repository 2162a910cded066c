"""ExecuTorch programs: compiled, described, opened and executed as a phone's runtime does."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import snapfusion.export.executorch as executorch
from snapfusion.export.coreml_package import read_program
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
    """Token ids, embedded, through a small convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(1, 64, 3, padding=1)
        self.linear = nn.Linear(64 * 16, 128)

    def forward(self, ids, scale):
        image = torch.nn.functional.silu(self.conv(self.embedding(ids)[:, None] * scale))
        return self.linear(image.transpose(1, 2).flatten(2))


class Branches(nn.Module):
    """8-bit convolutions that are easily lowered wrongly: after a scale, and two of one input."""

    def __init__(self):
        super().__init__()
        self.before = nn.Conv2d(8, 32, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(32, 64, 1)
        self.linear = nn.Linear(64, 128)

    def forward(self, x):
        hidden = torch.nn.functional.silu(self.before(x / 0.4) * 0.5 + 0.5)
        both = self.wide(hidden) + self.narrow(hidden)
        return self.linear(both.flatten(2).transpose(1, 2))


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
def compiled(words):
    return compile_executorch(words)


@pytest.fixture(scope="module")
def for_core_ml(words):
    return compile_executorch(words, kind="coreml")


@pytest.fixture(scope="module")
def path(compiled, tmp_path_factory):
    path = tmp_path_factory.mktemp("programs") / "words.pte"
    path.write_bytes(compiled)
    return path


def psnr_of(run, module, samples):
    outputs, references = [run(inputs) for inputs in samples], [module.reference(each) for each in samples]
    return check_parity(artifact="words.pte", outputs=outputs, references=references).psnr_db


def test_a_program_agrees_with_torch(words, samples, compiled, capfd):
    assert psnr_of(ExecuTorchProgram(compiled), words, samples) > 100
    assert capfd.readouterr().err == ""


def test_deferred_code_changes_no_byte(words, compiled, monkeypatch):
    monkeypatch.setattr(executorch, "deferred_code", contextlib.nullcontext)
    assert compile_executorch(words) == compiled


def test_8_bit_convolutions_are_lowered_correctly():
    torch.manual_seed(1)
    module = FixedModule(
        name="branches",
        network=Branches().eval(),
        inputs=(Port(name="x", shape=(2, 8, 6, 6)),),
        outputs=(Port(name="output", shape=(2, 36, 128)),),
    )
    quantized, whole = compile_executorch(module, kind="int8"), compile_executorch(module)
    samples = list(np.random.default_rng(0).standard_normal((4, 1, 2, 8, 6, 6), dtype=np.float32))
    assert 40 < psnr_of(ExecuTorchProgram(quantized), module, samples) < 70
    # The two convolutions of one input stay in float32, 81,920 bytes of it.
    assert 81_920 < len(quantized) < len(whole)
    assert set(describe_program(quantized).delegates) == {"XnnpackBackend"}


def test_8_bit_programs_are_a_third_in_size(words, samples, compiled):
    quantized = compile_executorch(words, kind="int8")
    program, whole = ExecuTorchProgram(quantized), ExecuTorchProgram(compiled)
    assert (program.inputs, program.outputs) == (whole.inputs, whole.outputs)
    assert psnr_of(program, words, samples) > 40
    assert 3 * len(quantized) < len(compiled)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_decomposed_attention_equals_torchs(masked, scale):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    mask = torch.randn(1, 1, 5, 7) if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    torch.testing.assert_close(decomposed_attention(q, k, v, mask, scale=scale), expected)


def test_attention_leaves_nothing_to_slow_kernels():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=20, max_position_embeddings=8, **sizes)
    module = text_encoder_module(CLIPTextModel(config).eval(), length=8)
    assert set(describe_program(compile_executorch(module)).kernels) == {
        "aten::embedding",
        "aten::native_layer_norm",
    }


def test_core_ml_programs_are_described_only(for_core_ml):
    description = describe_program(for_core_ml)
    assert (description.delegates, description.kernels) == ({"CoreMLBackend": 1}, {})
    with pytest.raises(ValueError, match=r"lowered for CoreMLBackend, but ExecuTorch has .*XnnpackBackend"):
        ExecuTorchProgram(for_core_ml)


def test_the_package_of_a_core_ml_program_agrees(words, for_core_ml, samples, tmp_path):
    (tmp_path / "words.pte").write_bytes(for_core_ml)
    extract_package(tmp_path / "words.pte", tmp_path / "words.mlpackage")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.mlpackage", "words.pte"]
    program = read_program(tmp_path / "words.mlpackage")
    assert 50 < psnr_of(lambda inputs: evaluate(program, inputs), words, samples) < 100
    with pytest.raises(ValueError, match="exists"):
        extract_package(for_core_ml, tmp_path / "words.mlpackage")


def test_an_xnnpack_program_has_no_package(compiled, tmp_path):
    with pytest.raises(ValueError, match=r"calls \{'XnnpackBackend': \d\}; one call of CoreMLBackend"):
        extract_package(compiled, tmp_path / "words.mlpackage")
    assert list(tmp_path.iterdir()) == []


def test_a_program_states_its_ports(compiled):
    program = ExecuTorchProgram(compiled)
    ids, scale = ProgramPort(shape=(1, 8), dtype="int32"), ProgramPort(shape=(1,), dtype="float32")
    assert program.inputs == (ids, scale)
    assert program.outputs == (ProgramPort(shape=(1, 8, 128), dtype="float32"),)


def test_a_description_counts_delegated_and_other_calls(compiled, path):
    description = describe_program(path)
    assert description == describe_program(compiled)
    assert set(description.delegates) == {"XnnpackBackend"}
    assert description.kernels["aten::embedding"] == 1
    assert not any("convolution" in kernel or "addmm" in kernel for kernel in description.kernels)


def test_a_file_is_memory_mapped(path, samples, compiled):
    program, read = ExecuTorchProgram(path), ExecuTorchProgram(compiled)
    np.testing.assert_array_equal(program(samples[0]), read(samples[0]))
    assert str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("ids", "scale", "message"),
    [
        (np.zeros((1, 9), np.int32), np.zeros(1, np.float32), r"\[\(1, 9\), \(1,\)\] given; .*\(1, 8\)"),
        (np.zeros((1, 8), np.int64), np.zeros(1, np.float32), "input 0 is int64; the program accepts int32"),
        (np.zeros((1, 8), np.float32), np.zeros(1, np.float32), "input 0 is float32"),
        (np.zeros((1, 8), np.int32), np.zeros(1, np.int32), "input 1 is int32; the program accepts float32"),
        (np.zeros((1, 8), np.int32), None, r"\[\(1, 8\)\] given"),
    ],
)
def test_wrong_inputs_are_refused(compiled, ids, scale, message):
    with pytest.raises(ValueError, match=message):
        ExecuTorchProgram(compiled)([ids] if scale is None else [ids, scale])


def test_float64_inputs_are_converted(compiled, samples):
    program, (ids, scale) = ExecuTorchProgram(compiled), samples[0]
    np.testing.assert_array_equal(program([ids, scale.astype(np.float64)]), program([ids, scale]))


@pytest.mark.parametrize("opened", [ExecuTorchProgram, describe_program])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:40], lambda b: b"", lambda b: b"x" * 999]
)
def test_damaged_programs_are_refused(compiled, tmp_path, opened, damage):
    damaged = damage(compiled)
    with pytest.raises(ValueError, match=f"not an ExecuTorch program: {len(damaged):,} bytes"):
        opened(damaged)
    (tmp_path / "damaged.pte").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"not an ExecuTorch program: .*damaged\.pte"):
        opened(tmp_path / "damaged.pte")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*missing\.pte"):
        ExecuTorchProgram(tmp_path / "missing.pte")
