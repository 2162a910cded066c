"""Times the programs of `measure_latency --export` on this device. README.md explains it.

python time_programs.py FOLDER RUNTIME DEVICE times.json [THREADS]

RUNTIME executorch-xnnpack needs numpy, torch and executorch; coreml, on a Mac, needs numpy and coremltools.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], object]
"""Runs a program once, and returns when its output is there."""
Open = Callable[[Path, Sequence[Sequence[int]]], Run]
"""Opens a program that takes inputs of these shapes."""

TIMESTEP = 999.0
NAMES = "input{}"
"""Of the inputs of a Core ML package."""


def inputs_of(shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Inputs of these shapes, float32; those of one dimension are timesteps."""
    rng = np.random.default_rng(0)
    return [
        np.full(shape, TIMESTEP, np.float32)
        if len(shape) == 1
        else rng.standard_normal(tuple(shape), np.float32)
        for shape in shapes
    ]


def open_executorch(threads: int) -> Open:
    """Opens `.pte` files in ExecuTorch on the CPU."""
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)

    def open_program(path: Path, shapes: Sequence[Sequence[int]]) -> Run:
        program = Runtime.get().load_program(path)
        method, inputs = program.load_method("forward"), [torch.from_numpy(one) for one in inputs_of(shapes)]

        def run() -> object:
            # An application takes the output away before the next run overwrites it; `program` stays open.
            return program and method.execute(inputs)[0].clone()

        return run

    return open_program


def open_coreml(threads: int) -> Open:
    """Opens `.mlpackage` folders in Core ML, on its Neural Engine where possible; it chooses its threads."""
    import coremltools

    units = coremltools.ComputeUnit.CPU_AND_NE

    def open_program(path: Path, shapes: Sequence[Sequence[int]]) -> Run:
        model = coremltools.models.MLModel(str(path), compute_units=units)
        inputs = {NAMES.format(index): array for index, array in enumerate(inputs_of(shapes))}
        return lambda: model.predict(inputs)

    return open_program


RUNTIMES = {"executorch-xnnpack": open_executorch, "coreml": open_coreml}


def repeats_of(run: Run, *, least_seconds: float) -> int:
    """Runs in a turn, so that it takes `least_seconds` or more; the first run is a warm-up."""
    run()
    began = time.perf_counter()
    run()
    return max(1, int(least_seconds / max(time.perf_counter() - began, 1e-9)))


def time_in_turns(runs: Mapping[str, Run], *, turns: int, least_seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a run in each turn: all programs once, then again."""
    repeats = {name: repeats_of(run, least_seconds=least_seconds) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append(1000.0 * (time.perf_counter() - began) / repeats[name])
    return times


def measure(folder: Path, *, runtime: str, device: str, threads: int) -> dict[str, Any]:
    """The content of the file of times."""
    listed = json.loads((folder / "jobs.json").read_text())
    open_program = RUNTIMES[runtime](threads)
    runs = {
        program["name"]: open_program(folder / program["files"][runtime], program["inputs"])
        for program in listed["programs"]
    }
    return {
        "version": 1,
        "of": listed["of"],
        "device": device,
        "runtime": runtime,
        "threads": threads,
        "date": datetime.now(UTC).date().isoformat(),
        "times_ms": time_in_turns(runs, turns=listed["turns"], least_seconds=listed["least_seconds"]),
    }


def main(folder: str, runtime: str, device: str, out: str, threads: str = "1") -> None:
    """Write the file of times."""
    times = measure(Path(folder), runtime=runtime, device=device, threads=int(threads))
    Path(out).write_text(json.dumps(times, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
