"""ExecuTorch programs: compiled, described, opened and executed as a phone's runtime does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from snapfusion.export.executorch import (
    ExecuTorchProgram,
    ProgramPort,
    compile_executorch,
    describe_program,
)
from snapfusion.export.modules import FixedModule, Port
from snapfusion.export.parity import check_parity


class Words(nn.Module):
    """Token ids to what a small convolution and a linear layer make of their embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(1, 64, 3, padding=1)
        self.linear = nn.Linear(64 * 16, 128)

    def forward(self, ids, scale):
        image = torch.relu(self.conv(self.embedding(ids)[:, None] * scale))
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
def compiled(words):
    return compile_executorch(words)


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
