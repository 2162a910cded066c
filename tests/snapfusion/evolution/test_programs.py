"""Programs of a UNet's parts: what they compute, and with which inputs."""

import pytest
import torch
from torch import nn

from snapfusion.evolution.parts import Part, UNetDimensions, inputs_of, module_of
from snapfusion.evolution.programs import write_programs
from snapfusion.export.coreml_package import describe_package
from snapfusion.export.executorch import describe_program
from snapfusion.export.parity import ParityError

DIMENSIONS = UNetDimensions(
    batch=2,
    tokens=6,
    context=16,
    embedding=32,
    groups=4,
    latent=4,
    linear_projection=False,
    upcast_attention=False,
)
ENDS = Part(kind="ends", side=8, in_channels=8, out_channels=8)
ATTENTION = Part(kind="attention", side=8, in_channels=16, out_channels=16, heads=2)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    for part in (ENDS, ATTENTION):
        network, inputs = module_of(part, dimensions=DIMENSIONS), inputs_of(part, dimensions=DIMENSIONS)
        files = write_programs(network, inputs, name=part.kind, folder=folder, layout="channels-first")
        assert files == {"executorch-xnnpack": f"{part.kind}.pte", "coreml": f"{part.kind}.mlpackage"}
    return folder


@pytest.mark.slow
def test_packages_take_float16_but_timesteps(written):
    ports = {
        kind: [(port.shape, port.dtype) for port in describe_package(written / f"{kind}.mlpackage").inputs]
        for kind in ("ends", "attention")
    }
    assert ports["ends"] == [((2, 4, 8, 8), "FLOAT16"), ((2,), "FLOAT32")]
    assert ports["attention"] == [((2, 16, 8, 8), "FLOAT16"), ((2, 6, 16), "FLOAT16")]


@pytest.mark.slow
def test_a_package_has_the_layout_of_a_bundles(written):
    operations = describe_package(written / "attention.mlpackage").operations
    # Linear layers are convolutions there: in, out, q, k, v, out twice, gate and feed.
    assert operations["conv"] == 12
    assert "linear" not in operations


@pytest.mark.slow
def test_programs_run_in_the_delegate(written):
    for kind in ("ends", "attention"):
        assert describe_program(written / f"{kind}.pte").delegates.keys() == {"XnnpackBackend"}


class Different(nn.Module):
    """A network that computes something else when it is exported."""

    def forward(self, x):
        return x if torch.compiler.is_exporting() else 1.1 * x


def test_a_program_that_differs_is_refused(tmp_path):
    with pytest.raises(ParityError, match=r"x\.pte does not agree with torch"):
        write_programs(Different(), [torch.randn(1, 4)], name="x", folder=tmp_path, layout="diffusers")
