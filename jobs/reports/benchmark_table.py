"""A benchmark's figures as the paper's tables: a line for each runtime, a column for each module.

SnapFusion Table 1 (what runs, and how often) and Table 4 (how long it takes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_COLUMNS = {"text_encoder": "Text Encoder", "unet": "UNet", "decoder": "Image Decoder"}
_WIDTH = 16
_MISSING = "-"


def benchmark_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Lines that show what `jobs.benchmark` measured."""
    yield from _setting(told)
    names = [f"{row['name']} ({row['weights']})" for row in told["rows"]]
    width = max(len(name) for name in [*names, _calls_name(told)]) + 2

    def line(name: str, cells: Sequence[str]) -> str:
        return f"{name:{width}}{''.join(f'{cell:>{_WIDTH}}' for cell in cells)}".rstrip()

    yield line("", [*_COLUMNS.values(), "Overall"])
    for name, cells in _model(told):
        yield line(name, cells)
    for title, unit, cells_of in _BLOCKS:
        yield ""
        yield line(title, ["", "", "", unit])
        for name, row in zip(names, told["rows"], strict=True):
            yield line(
                name, [*(cells_of(row["modules"].get(module)) for module in _COLUMNS), _last(unit, row)]
            )
    yield from _notes(told)


def _setting(told: Mapping[str, Any]) -> Iterator[str]:
    threads = "1 thread" if told["threads"] == 1 else f"{told['threads']} threads"
    versions = ", ".join(f"{name} {told['versions'][name]}" for name in ("torch", "executorch"))
    yield f"{told['bundle']} on {told['device']}, {threads}; {versions}"
    yield (
        f"{told['repeats']} runs of each module after {told['warm_ups'] + 1}, in a process of its own; "
        "memory is resident, beyond that of the process without the module"
    )
    yield ""


def _calls_name(told: Mapping[str, Any]) -> str:
    return f"Calls a picture, {told['steps']} steps"


def _model(told: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The upper lines of Table 1."""
    _, height, width = told["latent_shape"]
    yield "Input", [f"{told['tokens']} tokens", f"{height} x {width}", f"{height} x {width}"]
    yield "Parameters (M)", [f"{told['parameters'][module] / 1e6:,.3g}" for module in _COLUMNS]
    yield _calls_name(told), [f"{told['calls'][module]}" for module in _COLUMNS]


def _number(name: str, module: Mapping[str, Any] | None) -> str:
    return _MISSING if module is None else f"{module[name]:,.4g}"


def _memory(module: Mapping[str, Any] | None) -> str:
    return _MISSING if module is None else f"{module['loading_mb']:,.1f} / {module['running_mb']:,.1f}"


def _last(unit: str, row: Mapping[str, Any]) -> str:
    """Only medians are added up: the rest of a whole picture was not measured."""
    if not unit:
        return ""
    return _MISSING if row["overall_s"] is None else f"{row['overall_s']:,.4g}"


_BLOCKS = (
    ("Latency, median (ms)", "(s)", lambda module: _number("median_ms", module)),
    ("Latency, 95th percentile (ms)", "", lambda module: _number("p95_ms", module)),
    ("Load to the first output (s)", "", lambda module: _number("load_s", module)),
    ("Highest memory, loading / running (MB)", "", _memory),
)


def _notes(told: Mapping[str, Any]) -> Iterator[str]:
    """Why a line is empty, or not what it seems."""
    noted = [(row["name"], note) for row in told["rows"] for note in row["notes"]]
    if noted:
        yield ""
    for name, note in noted:
        yield f"{name}: {note}"
