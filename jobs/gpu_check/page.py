"""Writes the results of the check as a page of Markdown."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.gpu_check.runner import result_of
from jobs.gpu_check.settings import PARTS, CheckSize
from jobs.runtime.versions import versions

_INTRODUCTION = """\
# The check of a device

```
make gpu-check                # one CUDA device of 24 GiB, meant to take five minutes; writes this page
make gpu-check SIZE=mini      # the same parts of the miniature on the CPU; writes runs/gpu-check/mini/gpu.md
snapfusion plan --recipe sd15 --set plan.rates=runs/gpu-check/sd15/rates.json --set plan.node=NODE
```

Each part runs in a process of its own and leaves `PART.json` and `PART.log` in `runs/gpu-check/SIZE`; run
again, it repeats those that failed or were skipped. Weights are random, so nothing is downloaded and no image
means anything.

- generation: operations are those of UNet and decoder; the peak is a product of square bfloat16 matrices.
- tables: rows a second of one worker, in the time that it works; busy is what nvidia-smi reports, from the
  first to the last sample with any work.
- training: draws are made in a thread, as in a training; memory is that of one worker, with text encoder and
  VAE in float32 and the teacher in the recipe's dtype, without averaged weights but those of LCM; waits are
  the times in a step that the host waits for the device.
- fsdp, nccl: relative differences of the losses of three steps to those of one process with whole batches."""


def page(size: CheckSize, folder: Path, *, device: str) -> str:
    """The page: device and versions, then each part."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        *_INTRODUCTION.splitlines(),
        "",
        f"Size {size.name}: {device}; {found}; model `{size.model}`, batches of {size.rows}.",
    ]
    for name, about in PARTS.items():
        record = result_of(name, folder)
        lines += ["", f"## {about[0].upper()}{about[1:]}", ""]
        if record is None:
            lines.append("Not done.")
        elif record["status"] == "skipped":
            lines.append(f"Skipped: {record['reason']}.")
        else:
            lines += [f"{record['seconds']} s in all.", "", *_table(record["result"])]
    return "\n".join([*lines, ""])


def _table(result: Mapping[str, Any]) -> Iterator[str]:
    """Each value of a result, by its path."""
    yield "| | |"
    yield "|---|---|"
    for name, value in _values(result):
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        yield f"| {name} | {shown} |"


def _values(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in result.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _values(value, f"{name}, ")
        elif isinstance(value, (list, tuple)):
            for number, each in enumerate(value):
                if isinstance(each, Mapping):
                    yield from _values(each, f"{name} {number + 1}, ")
        elif value is not None:
            yield name.replace("_", " "), value
