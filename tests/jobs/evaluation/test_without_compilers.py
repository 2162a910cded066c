"""Without the extra `mobile` images are generated, and what compiles for phones says what it lacks."""

import subprocess
import sys

import pytest
from PIL import Image

from snapfusion.export.coreml_package import open_package, open_packages
from snapfusion.export.executorch import compile_executorch, describe_program, set_num_threads
from snapfusion.export.installed import NotInstalledError, check_compilers
from snapfusion.export.onnx import count_operations, export_onnx
from snapfusion.export.onnx_runtime import OnnxProgram
from snapfusion.export.settings import MobileSettings

# Finders that do not see the packages of the extra, as if it were not installed.
WITHOUT = """
import sys

ABSENT = ("coremltools", "executorch", "torchao", "onnx", "onnxruntime", "onnxscript")

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

    def find_distributions(self, *context):
        found = getattr(self.finder, "find_distributions", lambda *context: ())(*context)
        return [one for one in found if one.metadata["Name"] not in ABSENT]

sys.meta_path[:] = map(Without, sys.meta_path)
from jobs.command import entry
entry()
"""
LICENCE = ("--set", "mobile.licence.weights=MIT", "--set", "mobile.licence.data=CC0")


def snapfusion(*arguments, program=WITHOUT):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def absent(monkeypatch):
    """A function that makes a package impossible to find."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


def test_images_are_generated_without_compilers(tmp_path):
    path = tmp_path / "image.png"
    done = snapfusion("generate", "a red circle", "--steps", 1, "--out", path)
    assert done.returncode == 0, done.stderr
    with Image.open(path) as image:
        assert image.width >= 32


def test_versions_leave_out_what_is_absent():
    program = WITHOUT.replace(
        "from jobs.command import entry\nentry()",
        "from jobs.runtime.versions import versions; print(*versions())",
    )
    done = snapfusion(program=program)
    assert done.stdout.split() == ["snapfusion-ray", "ray", "torch", "diffusers", "transformers", "deltalake"]


def test_compilation_is_refused_before_any_work(tmp_path):
    command = ("compile-mobile", "mini", "--out", tmp_path, "--set", "mobile.decoder=null", *LICENCE)
    # Nor is torch found: the refusal does not wait for it.
    done = snapfusion(*command, program=WITHOUT.replace('"torchao",', '"torchao", "torch",'))
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("compile_mobile: executorch is not installed; install snapfusion-ray[mobile]")
    assert done.returncode == 2
    assert "compiling" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings"]


@pytest.mark.parametrize(
    "variants",
    [{"executorch": ("float32",), "coreml": ("float16",)}, {"executorch": ("coreml",), "coreml": ()}],
)
def test_variants_for_core_ml_need_its_tools(variants, absent):
    check_compilers(MobileSettings(**variants))
    absent("coremltools")
    check_compilers(MobileSettings(executorch=("float32", "int8"), coreml=()))
    with pytest.raises(NotInstalledError, match=r"^coremltools is not installed"):
        check_compilers(MobileSettings(**variants))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_variants_need_its_packages(package, absent):
    absent(package)
    check_compilers(MobileSettings(coreml=()))
    with pytest.raises(NotInstalledError, match=rf"^{package} is not installed"):
        check_compilers(MobileSettings(coreml=(), onnx=("float16",)))


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("executorch", lambda path: compile_executorch(None)),
        ("executorch", describe_program),
        ("executorch", lambda path: set_num_threads(1)),
        ("onnxruntime", OnnxProgram),
        ("onnxscript", lambda path: export_onnx(None, path)),
        ("onnx", count_operations),
        ("coremltools", open_package),
        ("coremltools", lambda path: open_packages([path])),
    ],
)
def test_functions_name_the_package_they_lack(package, call, absent, tmp_path):
    absent(package)
    path = tmp_path / "program"
    path.write_bytes(b"")
    with pytest.raises(NotInstalledError, match=rf"^{package} is not installed.*\[mobile\]"):
        call(path)


def test_core_ml_is_not_offered_on_314(absent, monkeypatch):
    absent("coremltools")
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    with pytest.raises(NotInstalledError, match=r"no release for Python 3\.14.*mobile\.coreml=\[\]"):
        check_compilers(MobileSettings(executorch=(), coreml=("float16",)))
