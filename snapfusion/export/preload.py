"""Imports the libraries of all processes that compile; imported once, by the server that forks them."""

import threading
from contextlib import suppress

from tqdm import tqdm

from snapfusion.export import units  # noqa: F401 - what the processes run
from snapfusion.export.coreml import import_coremltools
from snapfusion.export.executorch import import_executorch
from snapfusion.export.onnx import import_onnx

# Core ML's tools are missing on Python 3.14, where nothing is compiled for Core ML.
with suppress(ImportError):
    import_coremltools()
import_executorch()
# Nor is ONNX needed where nothing is compiled for it.
with suppress(ImportError):
    import_onnx()
# By default a semaphore of the system, which a process that is ended would leave behind.
tqdm.set_lock(threading.RLock())
