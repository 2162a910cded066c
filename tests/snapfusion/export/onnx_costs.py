"""Measures ONNX models of the miniature: opsets and kinds of weights, beside ExecuTorch, on one thread.

python tests/snapfusion/export/onnx_costs.py [MODEL DECODER]

MODEL and DECODER are folders such as runs/demo/student/model and runs/demo/decoder; by default mini-v
with Table 3's blocks, and a half-width decoder of its weights. All programs of a module take turns, so that
each ratio is of one run.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from snapfusion.export.executorch import ExecuTorchProgram, compile_executorch, set_num_threads
from snapfusion.export.modules import decoder_module, text_encoder_module, unet_module
from snapfusion.export.onnx import convert_onnx, count_operations, export_onnx
from snapfusion.export.onnx_runtime import OnnxProgram
from snapfusion.export.parity import psnr
from snapfusion.models.architecture import efficient_architecture
from snapfusion.models.decoder import HalfDecoder, load_decoder
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of, build_unet, inherit_weights

OPSETS = (18, 20, 21, 23)
TURNS = 100
CAPTION = "a large red circle at the top on a white background"
EIGHT_BITS = {
    "int8, all operations, signed": {"weight_type": QuantType.QInt8, "per_channel": True},
    "int8, all operations": {"weight_type": QuantType.QUInt8, "per_channel": True},
    "int8, one scale a channel": {
        "weight_type": QuantType.QUInt8,
        "per_channel": True,
        "op_types_to_quantize": ["MatMul", "Gemm", "Gather"],
    },
}


def modules_and_inputs(arguments):
    if arguments:
        model, half = load(arguments[0]), load_decoder(arguments[1])
    else:
        model = load("mini-v")
        half = HalfDecoder.from_vae(model.vae)
        torch.manual_seed(0)
        unet = build_unet(efficient_architecture(architecture_of(model.unet)))
        inherit_weights(unet, model.unet)
        model.unet = unet
    ids = model.tokenize(["", CAPTION])
    c = model.encode_text(ids).numpy()
    shape = (ids.shape[1], c.shape[-1])
    z_t = np.random.default_rng(0).standard_normal((1, *model.latent_shape), np.float32)
    text_encoder = text_encoder_module(model.text_encoder, length=shape[0])
    unet = unet_module(model.unet, condition_shape=shape, conditions=2)
    return [
        (text_encoder, [ids[1:].numpy().astype(np.int32)]),
        (unet, [z_t, np.array([749.0], np.float32), c]),
        (decoder_module(half, latent_shape=model.latent_shape), [0.5 * z_t]),
    ]


def programs_of(module, folder):
    """Paths of all models of a module by what they are."""
    paths = {}
    for opset in OPSETS:
        paths[f"opset {opset}"] = folder / f"{module.name}-{opset}.onnx"
        export_onnx(module, paths[f"opset {opset}"], opset=opset)
    for kind in ("float16", "int8"):
        paths[kind] = folder / f"{module.name}-{kind}.onnx"
        convert_onnx(paths["opset 20"], paths[kind], kind=kind)
    for number, (name, options) in enumerate(EIGHT_BITS.items()):
        paths[name] = folder / f"{module.name}-{number}.onnx"
        quantize_dynamic(paths["opset 20"], paths[name], **options)
    return paths


def measure(module, inputs, folder):
    reference = module.reference(inputs)
    peak = float(np.abs(reference).max())
    paths = programs_of(module, folder)
    runs = {"ExecuTorch": ExecuTorchProgram(compile_executorch(module))}
    runs |= {name: OnnxProgram(path) for name, path in paths.items()}
    seconds = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            run(inputs)
            began = time.perf_counter()
            run(inputs)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, run in runs.items():
        path = paths.get(name)
        operations = "" if path is None else count_operations(path)
        size = "" if path is None else sum(len(one.raw_data) for one in onnx.load(path).graph.initializer)
        ratio = medians[name] / medians["ExecuTorch"]
        agreement = psnr(run(inputs), reference, peak=peak)
        cells = (module.name, name, operations, size, f"{ratio:.2f}", f"{agreement:.1f} dB")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    set_num_threads(1)
    print("| module | program | operations | bytes of weights | time, ExecuTorch = 1 | to torch |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for module, inputs in modules_and_inputs(sys.argv[1:]):
            measure(module, inputs, Path(scratch))
