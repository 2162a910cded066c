"""Time a mobile bundle's modules on this machine, and its model's in torch. SnapFusion Table 1 and 4.

Each module runs by each runtime in a process of its own, on the bundle's test vectors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime.arguments import OneLineParser
from jobs.runtime.exit_codes import run_guarded
from snapfusion.settings import SettingsError

if TYPE_CHECKING:
    import numpy as np

    from jobs.evaluation.module_benchmark import ModuleBenchmark, ModuleRuntime
    from snapfusion.export.bundle import MobileBundle

MIN_REPEATS = 20
"""Of fewer runs one alone would be the 95th percentile."""
_IN_RUN = "run:"
_NO_COREML = "not executed here: Core ML runs on Apple's systems only"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `snapfusion benchmark`."""
    return run_guarded("benchmark", lambda: _benchmark(_options(argv)))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="snapfusion benchmark", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a folder that compile_mobile made")
    parser.add_argument("--model", help="of torch's rows (default: what the bundle was made from)")
    parser.add_argument("--decoder", metavar="URL", help="half-width, of torch's rows (default: likewise)")
    parser.add_argument(
        "--variant", nargs="+", action="extend", metavar="NAME", help="of the bundle (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=50, help="timed runs of each module (default: 50)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of ExecuTorch (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="the same figures, for programs")
    options = parser.options(argv)
    if options.repeats < MIN_REPEATS:
        raise SettingsError(
            f"--repeats {options.repeats}: at least {MIN_REPEATS} is accepted: fewer have no 95th centile"
        )
    if options.threads < 1:
        raise SettingsError(f"--threads {options.threads}: at least 1 is accepted")
    if options.json and Path(options.json).is_dir():
        raise SettingsError(f"--json {options.json}: it is a folder; a file is accepted")
    return options


def _benchmark(options: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistake answer at once.
    from jobs.reports.benchmark_table import benchmark_lines
    from pipelines.storage.objects import StorageError, replace_object
    from snapfusion.export.bundle import BundleError, open_bundle

    try:
        bundle = open_bundle(options.bundle)
    except BundleError as error:
        raise SettingsError(f"BUNDLE {error}") from None
    rows = list(_rows(bundle, options))
    told = {
        **_benchmark_setting(bundle, options),
        "rows": [_measure_row(row, bundle=bundle, options=options) for row in rows],
    }
    print("\n".join(["", *benchmark_lines(told)]))
    if options.json:
        try:
            replace_object(options.json, f"{json.dumps(told, indent=1)}\n".encode())
        except StorageError as error:
            raise SettingsError(f"--json {error}") from None
        print(f"\n{options.json}")


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A line of the table.

    Attributes:
        name: of the runtime or the variant.
        weights: in words.
        runtimes: of each module; empty where nothing runs it.
        note: why that is.
    """

    name: str
    weights: str
    runtimes: Mapping[str, ModuleRuntime]
    note: str | None = None


def _rows(bundle: MobileBundle, options: argparse.Namespace) -> Iterator[_Row]:
    known = bundle.manifest["variants"]
    for name in options.variant or ():
        if name not in known:
            raise SettingsError(f"--variant {name}: the bundle has {', '.join(known)}")
    yield from _torch_rows(bundle, options)
    for name in options.variant or known:
        yield _variant_row(bundle, name)


def _torch_rows(bundle: MobileBundle, options: argparse.Namespace) -> Iterator[_Row]:
    """Two, without runtimes if what the bundle was made from is not here."""
    from jobs.evaluation.module_benchmark import TorchRuntime
    from snapfusion.export.bundle import MODULES

    parents = bundle.manifest["identity"]["parents"]
    model = options.model or _parent_url(parents["model"], bundle=bundle)
    decoder = options.decoder or (
        _parent_url(parents["decoder"], bundle=bundle) if parents["decoder"] else None
    )
    note, absent = None, None
    try:
        note = _weight_mismatch(model, decoder=decoder, bundle=bundle)
    except _UnusableModelError as error:
        if getattr(options, error.option):
            raise SettingsError(f"--{error.option} {error}") from None
        absent = f"not run: the bundle's {error.option} {error}; give --{error.option}"
    for name, compiled in (("torch eager", False), ("torch compiled", True)):
        runtime = TorchRuntime(model=model, decoder=decoder, compiled=compiled)
        runtimes = {} if absent else dict.fromkeys(MODULES, runtime)
        yield _Row(name=name, weights="float32", runtimes=runtimes, note=absent or note)


def _parent_url(parent: Mapping[str, Any], *, bundle: MobileBundle) -> str:
    """Where a model is that the manifest names; what is told as in the run lies beside the bundle."""
    source = str(parent["source"])
    if source.startswith(_IN_RUN):
        return str(bundle.folder.resolve().parent / source.removeprefix(_IN_RUN))
    return source


class _UnusableModelError(ValueError):
    """A model or decoder that torch's rows cannot be made of; `option` would name another."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(reason)
        self.option = option


def _weight_mismatch(model: str, *, decoder: str | None, bundle: MobileBundle) -> str | None:
    """Whether these are the bundle's own weights: if not, which are not, in words.

    Raises:
        _Unusable: if one cannot be loaded, or does not take what the bundle's modules take.
    """
    from snapfusion.models.bundle import weight_hash
    from snapfusion.models.decoder import load_decoder
    from snapfusion.models.load import load

    identity = bundle.manifest["identity"]
    try:
        loaded = load(model)
    except ValueError as error:
        raise _UnusableModelError("model", f"{model}: {str(error).removeprefix(f'{model}: ')}") from None
    length, width = bundle.vectors.arrays["c"].shape[1:]
    text = loaded.text_encoder.config.hidden_size
    found = (loaded.tokenizer.model_max_length, text, loaded.latent_shape)
    if found != (length, width, bundle.latent_shape):
        raise _UnusableModelError(
            "model",
            f"{model}: it has tokens, numbers a token and latents {found}; the bundle's programs take "
            f"{(length, width, bundle.latent_shape)}",
        )
    same = loaded.fingerprint() == identity["model"]["weights"]
    half = None
    if decoder is not None:
        try:
            half = load_decoder(decoder)
        except (ValueError, OSError) as error:
            raise _UnusableModelError("decoder", f"{decoder}: {str(error).removeprefix(decoder)}") from None
        if half.config.latent_channels != bundle.latent_shape[0]:
            raise _UnusableModelError(
                "decoder", f"{decoder}: it takes {half.config.latent_channels} channels"
            )
    differing = [] if same else [f"the model {model}"]
    if (None if half is None else weight_hash(half)) != identity["decoder"]:
        differing.append(f"the decoder {decoder}" if decoder else "the model's own decoder")
    return f"not the bundle's weights: {' and '.join(differing)}" if differing else None


def _variant_row(bundle: MobileBundle, name: str) -> _Row:
    from jobs.evaluation.module_benchmark import CoreMLRuntime, ExecuTorchRuntime
    from snapfusion.export.bundle import EXECUTORCH, MODULES

    told = bundle.manifest["variants"][name]
    files = {module: bundle.files(name, module) for module in MODULES}
    runtimes: dict[str, ModuleRuntime] = {}
    note = None
    if told["runtime"] == EXECUTORCH:
        runtimes = {module: ExecuTorchRuntime(program=path) for module, (path,) in files.items()}
    elif sys.platform == "darwin":
        runtimes = {module: CoreMLRuntime(packages=tuple(paths)) for module, paths in files.items()}
    else:
        note = _NO_COREML
    return _Row(name=name, weights=told["weights"], runtimes=runtimes, note=note)


def _inputs(bundle: MobileBundle) -> dict[str, tuple[np.ndarray, ...]]:
    """Of each module, from the test vectors: the caption, the first step, the latent at the end."""
    import numpy as np

    vectors, steps = bundle.vectors, bundle.steps.steps
    conditions = bundle.manifest["conditions"]
    t = np.array([steps[0].t], np.float32)
    return {
        "text_encoder": (vectors.arrays["token_ids"][1:],),
        "unet": (vectors.arrays["noise"], t, vectors.arrays["c"][2 - conditions :]),
        "decoder": (vectors.arrays[f"z-{len(steps) - 1}"],),
    }


def calls_of(*, steps: int, conditions: int) -> dict[str, int]:
    """How often each module runs for a picture: the empty caption and the caption, the steps, the image."""
    return {"text_encoder": 2, "unet": steps * 2 // conditions, "decoder": 1}


def _benchmark_setting(bundle: MobileBundle, options: argparse.Namespace) -> dict[str, Any]:
    from jobs.evaluation.module_benchmark import WARM_UPS
    from jobs.evaluation.settings import TimingSettings
    from jobs.evaluation.timing import setting_of
    from jobs.runtime.versions import versions

    steps, conditions = len(bundle.steps.steps), bundle.manifest["conditions"]
    return {
        "bundle": str(options.bundle),
        "settings_hash": bundle.manifest["settings_hash"],
        "date": datetime.now(UTC).date().isoformat(),
        "device": setting_of(TimingSettings()).device,
        "threads": options.threads,
        "repeats": options.repeats,
        "warm_ups": WARM_UPS,
        "versions": versions(),
        "steps": steps,
        "calls": calls_of(steps=steps, conditions=conditions),
        "conditions": conditions,
        "tokens": bundle.vectors.arrays["token_ids"].shape[1],
        "latent_shape": list(bundle.latent_shape),
        "parameters": bundle.manifest["parameters"],
    }


def _measure_row(row: _Row, *, bundle: MobileBundle, options: argparse.Namespace) -> dict[str, Any]:
    """The row's figures; what cannot run is told in its notes, and the next module goes on."""
    from jobs.evaluation.memory import FootprintError
    from jobs.evaluation.module_benchmark import ModuleRun, RuntimeUnavailableError, benchmark_module

    figures: dict[str, ModuleBenchmark] = {}
    notes = [row.note] if row.note else []
    inputs = _inputs(bundle)
    for module, runtime in row.runtimes.items():
        work = ModuleRun(
            module=module, inputs=inputs[module], threads=options.threads, repeats=options.repeats
        )
        try:
            figures[module] = found = benchmark_module(runtime, work)
        except FootprintError as error:
            notes.append(f"{module}: {error}")
        except RuntimeUnavailableError as error:
            notes.append(str(error))
            break
        else:
            print(f"  {row.name}, {module}: {found.median_ms:.4g} ms", flush=True)
    conditions = bundle.manifest["conditions"]
    calls = calls_of(steps=len(bundle.steps.steps), conditions=conditions)
    whole = figures.keys() == calls.keys()
    return {
        "name": row.name,
        "weights": row.weights,
        "modules": {module: found.to_values() for module, found in figures.items()},
        "overall_s": sum(calls[name] * found.median_ms for name, found in figures.items()) / 1000
        if whole
        else None,
        "notes": notes,
    }
