"""Students of any architecture open in stock diffusers, in a process that cannot import this package."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from stock_comparison import assert_equal, generate_here, generate_in_diffusers, save_table_3_student

from snapfusion.models import snapfusion_unet_v1
from snapfusion.models.checksums import CHECKSUMS_FILE, ChecksumError
from snapfusion.models.load import load

MODULE = "unet/snapfusion_unet_v1.py"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "model"
    save_table_3_student(folder)
    return folder


@pytest.fixture(scope="module")
def expected(student):
    return generate_here(student)


@pytest.fixture
def copy(student, tmp_path):
    return shutil.copytree(student, tmp_path / "model")


def test_a_student_generates_the_same_without_this_package(student, expected, tmp_path):
    assert_equal(generate_in_diffusers(student, "--trust", scratch=tmp_path), expected)


def test_diffusers_executes_the_module_only_with_consent(student):
    with pytest.raises(ValueError, match=r"snapfusion_unet_v1.py(.|\n)*Pass `trust_remote_code=True`"):
        DiffusionPipeline.from_pretrained(student)


def test_the_module_in_a_folder_is_the_source_of_this_package(student):
    index = json.loads((student / "model_index.json").read_text())
    assert index["unet"] == ["snapfusion_unet_v1", "BlockUNet"]
    assert (student / MODULE).read_bytes() == Path(snapfusion_unet_v1.__file__).read_bytes()


def test_the_module_imports_torch_and_diffusers_only():
    tree = ast.parse(Path(snapfusion_unet_v1.__file__).read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    roots = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert roots == {"torch", "diffusers"}


def test_an_altered_module_is_refused(copy):
    (copy / MODULE).write_text("raise SystemExit\n")
    with pytest.raises(ChecksumError, match=r"snapfusion_unet_v1.py was altered"):
        load(str(copy))


def test_the_module_in_a_folder_is_never_executed_here(copy, expected):
    (copy / MODULE).write_text("raise SystemExit\n")
    (copy / CHECKSUMS_FILE).unlink()
    assert_equal(generate_here(copy), expected)


def test_students_of_version_0_1_open(copy, expected):
    """They have no module, and the index names one of this package."""
    for name in (MODULE, CHECKSUMS_FILE):
        (copy / name).unlink()
    index = json.loads((copy / "model_index.json").read_text())
    index["unet"] = ["snapfusion.models.unet", "BlockUNet"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert_equal(generate_here(copy), expected)
    assert type(DiffusionPipeline.from_pretrained(copy).unet) is snapfusion_unet_v1.BlockUNet
