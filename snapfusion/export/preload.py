"""Imports the libraries of all processes that compile; imported once, by the server that forks them."""

import threading

from tqdm import tqdm

from snapfusion.export import units  # noqa: F401 - what the processes run
from snapfusion.export.coreml import import_coremltools
from snapfusion.export.executorch import import_executorch

import_coremltools()
import_executorch()
# By default a semaphore of the system, which a process that is ended would leave behind.
tqdm.set_lock(threading.RLock())
