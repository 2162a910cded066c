"""Formats a benchmark as the paper's tables: a line for each runtime, a column for each module.

SnapFusion Table 1 (modules, their sizes and calls) and Table 4 (latency).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_COLUMNS = {"text_encoder": "Text Encoder", "unet": "UNet", "decoder": "Image Decoder"}
_WIDTH = 16
_RUNTIMES = ("torch", "executorch", "onnxruntime")
_MISSING = "-"


def benchmark_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The tables of a record of `jobs.benchmark`, line by line."""
    yield from _setting(record)
    names = [f"{row['name']} ({row['weights']})" for row in record["rows"]]
    model = _model(record)
    width = max(len(name) for name in [*names, *model]) + 2

    def line(name: str, cells: Sequence[str]) -> str:
        return f"{name:{width}}{''.join(f'{cell:>{_WIDTH}}' for cell in cells)}".rstrip()

    yield line("", [*_COLUMNS.values(), "Overall"])
    for name, cells in model.items():
        yield line(name, cells)
    for title, unit, cell_of in _BLOCKS:
        yield ""
        yield line(title, ["", "", "", unit])
        for name, row in zip(names, record["rows"], strict=True):
            cells = [cell_of(row["modules"].get(module)) for module in _COLUMNS]
            # Only medians are added up: percentiles and memory of a whole image were not measured.
            overall = _number(row, "overall_s") if unit else ""
            yield line(name, [*cells, overall])
    notes = [f"{row['name']}: {note}" for row in record["rows"] for note in row["notes"]]
    yield from ["", *notes] if notes else ()


def _setting(record: Mapping[str, Any]) -> Iterator[str]:
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    versions = ", ".join(
        f"{name} {record['versions'][name]}" for name in _RUNTIMES if name in record["versions"]
    )
    yield f"{record['bundle']} on {record['device']}, {threads}; {versions}"
    yield (
        f"{record['repeats']} runs of each module after {record['warm_ups'] + 1} warm-up runs, each in its "
        "own process; memory is resident memory beyond that of the process without the module"
    )
    yield ""


def _model(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """The upper lines of Table 1."""
    _, height, width = record["latent_shape"]
    side = f"{height} x {width}"
    return {
        "Input": [f"{record['tokens']} tokens", side, side],
        "Parameters (M)": [f"{record['parameters'][module] / 1e6:,.3g}" for module in _COLUMNS],
        f"Calls per image, {record['steps']} steps": [f"{record['calls'][module]}" for module in _COLUMNS],
    }


def _number(values: Mapping[str, Any] | None, name: str) -> str:
    return _MISSING if values is None or values[name] is None else f"{values[name]:,.4g}"


def _memory(module: Mapping[str, Any] | None) -> str:
    return _MISSING if module is None else f"{module['loading_mb']:,.1f} / {module['running_mb']:,.1f}"


_BLOCKS = (
    ("Latency, median (ms)", "(s)", lambda module: _number(module, "median_ms")),
    ("Latency, 95th percentile (ms)", "", lambda module: _number(module, "p95_ms")),
    ("Load to the first output (s)", "", lambda module: _number(module, "load_s")),
    ("Peak memory, loading / running (MB)", "", _memory),
)
