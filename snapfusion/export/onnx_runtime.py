"""Executes ONNX models in ONNX Runtime on this machine's CPU."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from snapfusion.export.installed import check_installed
from snapfusion.export.modules import check_shapes

_DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
_ERRORS_ONLY = 3


class OnnxProgram:
    """An ONNX model, open in ONNX Runtime with as many threads as torch has.

    Args:
        path: of the model; weights in a file beside it are found.

    Raises:
        NotInstalledError: if ONNX Runtime is not installed.
        ValueError: if it is no ONNX model that this version of ONNX Runtime can run.
    """

    def __init__(self, path: Path) -> None:
        check_installed("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        try:
            # By the name of the file, beside which it looks for weights.
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(f"not a model for ONNX Runtime: {_one_line(error)}") from error
        self.inputs = self._session.get_inputs()

    def __call__(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Execute on one set of inputs, in the order of the module's ports; returns the first output.

        Args:
            inputs: of the shapes that the model states; any precision for floating-point inputs, the exact
                dtype for integer inputs.

        Raises:
            ValueError: if a shape or dtype is not the model's.
        """
        check_shapes(inputs, accepted=[tuple(port.shape) for port in self.inputs])
        values = {}
        for array, port in zip(inputs, self.inputs, strict=True):
            dtype = _DTYPES[port.type]
            if not (np.issubdtype(array.dtype, np.floating) and dtype is np.float32) and array.dtype != dtype:
                raise ValueError(f"input {port.name} is {array.dtype}; {dtype.__name__} is accepted")
            values[port.name] = np.ascontiguousarray(array, dtype=dtype)
        output: np.ndarray = self._session.run(None, values)[0]
        return output


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
