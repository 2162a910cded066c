"""The latency of a UNet's parts on another device: programs that it runs, and the times that it returns.

FOLDER/jobs.json        what to time and how, with the inputs and files of each program
FOLDER/NAME.pte         the programs (`snapfusion.evolution.programs`)
FOLDER/NAME.mlpackage
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.evaluation.latency import is_disturbed, unet_records
from jobs.evaluation.settings import LatencySettings
from jobs.evaluation.timing import architectures_of, load_measured_model, unet_inputs
from pipelines.storage.folders import publish_folder
from pipelines.storage.objects import exists
from pipelines.storage.records import read_record
from snapfusion.evolution.device_times import DeviceTimes, TimedUNets
from snapfusion.evolution.latency import LatencyError
from snapfusion.evolution.parts import Part, UNetDimensions, dimensions_of, inputs_of, module_of
from snapfusion.evolution.programs import write_programs
from snapfusion.evolution.settings import DEVICE_PRECISION
from snapfusion.evolution.stopwatch import MIN_SECONDS
from snapfusion.export.settings import AttentionLayout
from snapfusion.models.architecture import Architecture
from snapfusion.models.unet import build_unet
from snapfusion.settings import differences

JOB_LIST = "jobs.json"
_SEED = 0
"""Of the weights and inputs, whose values do not matter."""

Timed = tuple[nn.Module, tuple[Tensor, ...]]
"""A network and its inputs."""


def timed_unets(settings: LatencySettings, *, source: str) -> TimedUNets:
    """The UNets of a measurement: a model's own and, if it has enough levels, Table 3's of it."""
    model = load_measured_model(source, settings=settings)
    dimensions = dimensions_of(model.architecture, batch=settings.batch, tokens=model.tokens)
    return TimedUNets(dimensions=dimensions, unets=architectures_of(model.architecture))


def export_programs(
    unets: TimedUNets,
    *,
    settings: LatencySettings,
    layout: AttentionLayout,
    whole: bool,
    url: str,
    on_program: Callable[[str], None] = lambda name: None,
) -> bool:
    """Publish the programs of all parts with their job list, all or nothing.

    Args:
        unets: whose parts they are.
        settings: of the measurement.
        layout: of attention in Core ML packages.
        whole: whether to add programs of the whole UNets.
        url: of the folder.
        on_program: receives the name of each program before it is compiled.

    Returns:
        Whether they were written; programs of the same UNets that exist are kept.

    Raises:
        LatencyError: if there are programs of other UNets, or without the whole ones that are required.
        ParityError: if a program does not agree with torch.
        NotInstalledError: if a compiler is not installed.
        StorageError: if the folder cannot be written.
    """
    names = [name for name, _ in _programs(unets, settings=settings, whole=whole)]
    if exists(f"{url}/{JOB_LIST}"):
        _check_exported(f"{url}/{JOB_LIST}", unets=unets, names=names)
        return False
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        folder, programs = Path(scratch), []
        for name, make in _programs(unets, settings=settings, whole=whole):
            on_program(name)
            torch.manual_seed(_SEED)
            network, inputs = make()
            files = write_programs(network, inputs, name=name, folder=folder, layout=layout)
            programs.append({"name": name, "inputs": [list(one.shape) for one in inputs], "files": files})
        listed = {
            "version": 1,
            "of": unets.to_values(),
            "precision": DEVICE_PRECISION,
            "turns": settings.turns,
            "least_seconds": MIN_SECONDS,
            "programs": programs,
        }
        (folder / JOB_LIST).write_text(f"{json.dumps(listed, indent=1)}\n")
        publish_folder(folder, url, last=JOB_LIST)
    return True


def _check_exported(url: str, *, unets: TimedUNets, names: Iterable[str]) -> None:
    listed = read_record(url)
    problems = list(differences(listed["of"], unets.to_values()))
    exported = {program["name"] for program in listed["programs"]}
    problems += [f"there is no program {name}" for name in names if name not in exported]
    if problems:
        raise LatencyError(
            f"{url} lists programs of something else: {'; '.join(problems[:3])}; remove its folder, or give "
            "another --out"
        )


def _programs(
    unets: TimedUNets, *, settings: LatencySettings, whole: bool
) -> Iterator[tuple[str, Callable[[], Timed]]]:
    for name, part in unets.parts().items():
        yield name, partial(_part, part, dimensions=unets.dimensions)
    for name, architecture in unets.whole().items() if whole else ():
        yield name, partial(_unet, architecture, settings=settings, tokens=unets.dimensions.tokens)


def _part(part: Part, *, dimensions: UNetDimensions) -> Timed:
    return module_of(part, dimensions=dimensions), inputs_of(part, dimensions=dimensions)


def _unet(architecture: Architecture, *, settings: LatencySettings, tokens: int) -> Timed:
    network = build_unet(architecture).eval().requires_grad_(requires_grad=False)
    return network, unet_inputs(settings, architecture, tokens=tokens)


def import_times(times: DeviceTimes, *, expected: TimedUNets) -> dict[str, Any]:
    """The record of a device's times, as `measure_latency` makes it of this machine's.

    Whole UNets that the device did not time have no entry.

    Raises:
        LatencyError: if the times are of other UNets, or a part's are missing.
    """
    times.check(expected)
    table = times.table()
    record = {
        "table": table.to_values(),
        "unets": unet_records(expected.unets, table=table, measured=times.whole_unets()),
    }
    return {**record, "disturbed": is_disturbed(record)}


def file_name(times: DeviceTimes) -> str:
    """Name of the record's file: runtime, precision and device."""
    device = re.sub(r"[^A-Za-z0-9.]+", "-", times.device).strip("-.") or "device"
    return f"{times.runtime}-{DEVICE_PRECISION[times.runtime]}-{device}.json"


def read_times(url: str) -> DeviceTimes:
    """The file of times at a path or URL.

    Raises:
        LatencyError: if it cannot be read, or is of another form.
    """
    try:
        return DeviceTimes.parse(read_record(url))
    except ValueError as error:
        raise LatencyError(f"--import {url}: it holds no times of programs: {error}") from None


def check_kept(record: Mapping[str, Any], *, url: str) -> None:
    """Check that the record would not take the place of another one.

    Raises:
        LatencyError: if there is another one.
    """
    if exists(url) and list(differences(read_record(url), dict(record))):
        raise LatencyError(f"{url} has other times of this device; remove it, or rename the device")
