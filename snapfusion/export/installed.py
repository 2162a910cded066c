"""Checks that what the extras bring, such as the compilers of a mobile bundle, is installed."""

import sys
from importlib.util import find_spec

from snapfusion.export.settings import MobileSettings

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class NotInstalledError(ValueError):
    """A package of an extra that is not installed."""


def check_installed(package: str, *, extra: str = "mobile") -> None:
    """Check that a package of an extra is installed, without importing it.

    Raises:
        NotInstalledError: if it is not; the message says how to install it.
    """
    if _is_installed(package):
        return
    if package == "coremltools" and sys.version_info >= (3, 14):
        raise NotInstalledError(
            "coremltools is not installed and has no release for Python 3.14; take Python 3.11 to 3.13, or "
            "compile without Core ML: --set mobile.coreml=[]"
        )
    raise NotInstalledError(
        f"{package} is not installed; install snapfusion-ray[{extra}], in a checkout by "
        f"pip install -c infra/constraints.txt -e '.[{extra}]'"
    )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        # A finder that refuses it, or an entry of sys.modules that blocks it.
        return False


def check_compilers(settings: MobileSettings) -> None:
    """Check that what compiles the variants of a bundle is installed; ExecuTorch also sets up the processes.

    Raises:
        NotInstalledError: naming what is not.
    """
    check_installed("executorch")
    if settings.coreml or "coreml" in settings.executorch:
        check_installed("coremltools")
    for package in ONNX_PACKAGES if settings.onnx else ():
        check_installed(package)
