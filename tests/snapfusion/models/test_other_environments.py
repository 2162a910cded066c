"""Saved models open in new environments with diffusers from the package registry, without this package."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stock_comparison import assert_equal, generate_here, generate_in_diffusers, save_table_3_student

from snapfusion.models.load import load
from snapfusion.models.save import save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ENVIRONMENTS = {
    "today's": tuple(f"{name}=={version(name)}" for name in ("diffusers", "transformers")),
    "transformers 4": ("diffusers==0.36.0", "transformers==4.57.6"),
}
RANK = 4
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def python(request, tmp_path_factory):
    """The interpreter of a new environment. torch, of gigabytes, is that of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    interpreter = folder / "bin" / "python"
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    shared = folder / "torch"
    shared.mkdir()
    link_distribution("torch", shared)
    (site_packages / "torch.pth").write_text(f"{shared}\n")
    packages = [*ENVIRONMENTS[request.param], "peft", "pillow"]
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *packages], check=True)
    # Not imported: `transformers` would take seconds.
    absent = "import importlib.util as u, sys; sys.exit(u.find_spec('snapfusion') is not None)"
    subprocess.run([interpreter, "-P", "-c", absent], check=True, env=os.environ | {"PYTHONPATH": ""})
    return interpreter


def link_distribution(name: str, folder: Path) -> None:
    """Link the files of an installed distribution, and of all that it requires, into `folder`."""
    try:
        found = distribution(name)
    except PackageNotFoundError:  # of another platform, or an extra
        return
    if (folder / f"{found.name}.seen").exists():
        return
    (folder / f"{found.name}.seen").touch()
    for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if not (folder / top).is_symlink():
            (folder / top).symlink_to(found.locate_file(top))
    for requirement in found.requires or ():
        link_distribution(re.match(r"[\w.-]+", requirement)[0], folder)


def write_lora(path: Path, unet: torch.nn.Module) -> str:
    """Write a LoRA of two projections in peft's format, without alpha, so that its scale is 1."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in (f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_v"):
        rows, columns = unet.get_submodule(name).weight.shape
        tensors[f"unet.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / 10
    save_file(tensors, path)
    return str(path)


def test_a_student_with_and_without_a_lora(python, tmp_path):
    student = tmp_path / "student"
    save_table_3_student(student)
    plain = generate_here(student)
    assert_equal(generate_in_diffusers(student, "--trust", scratch=tmp_path, python=python), plain)
    lora = write_lora(tmp_path / "lora.safetensors", load(str(student)).unet)
    options = ("--trust", "--lora", lora, "--scale", "0.5")
    adapted = generate_in_diffusers(student, *options, scratch=tmp_path, python=python)
    assert abs(adapted[0] - plain[0]).max() > 0.1
    assert_equal(adapted, generate_here(f"{student}?lora={lora}:0.5"))


def test_a_model_with_merged_loras_needs_no_consent(python, tmp_path):
    lora = write_lora(tmp_path / "lora.safetensors", load("mini-v").unet)
    merged = load(f"mini-v?lora={lora}:0.5")
    save(merged, tmp_path / "merged", dtype=torch.float32)
    assert_equal(
        generate_in_diffusers(tmp_path / "merged", scratch=tmp_path, python=python),
        generate_here(tmp_path / "merged"),
    )
