"""Benchmarks the modules of a mobile bundle, and of its model in torch, on the bundle's test vectors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from jobs.evaluation.memory import FootprintError
from jobs.evaluation.module_benchmark import (
    WARM_UPS,
    CoreMLRuntime,
    ExecuTorchRuntime,
    ModuleBenchmark,
    ModuleRun,
    ModuleRuntime,
    OnnxRuntime,
    RuntimeUnavailableError,
    TorchRuntime,
    benchmark_module,
)
from jobs.evaluation.settings import TimingSettings
from jobs.evaluation.timing import setting_of
from jobs.runtime.logs import logger
from jobs.runtime.versions import versions
from snapfusion.export.bundle import EXECUTORCH, MODULES, ONNX_RUNTIME, MobileBundle
from snapfusion.export.installed import check_installed
from snapfusion.models.bundle import weight_hash
from snapfusion.models.decoder import load_decoder
from snapfusion.models.load import load
from snapfusion.settings import SettingsError

_RUN_PREFIX = "run:"
_PACKAGES = {EXECUTORCH: "executorch", ONNX_RUNTIME: "onnxruntime"}


@dataclass(frozen=True, kw_only=True)
class BundleBenchmark:
    """A benchmark of a bundle.

    Attributes:
        bundle: to benchmark.
        model: source of torch's model; None takes the one that the bundle was made from.
        decoder: source of torch's half-width decoder; None likewise.
        variants: of the bundle; None takes all.
        repeats: timed runs of each module.
        threads: of torch, ExecuTorch and ONNX Runtime.
    """

    bundle: MobileBundle
    model: str | None
    decoder: str | None
    variants: tuple[str, ...] | None
    repeats: int
    threads: int

    def measure(self) -> dict[str, Any]:
        """Measure all rows; returns JSON values.

        Raises:
            SettingsError: if there is no such variant, or a given model or decoder cannot be used.
            NotInstalledError: if the runtime of a variant is not installed.
        """
        names = self.bundle.manifest["variants"]
        for name in self.variants or ():
            if name not in names:
                raise SettingsError(f"--variant {name}: the bundle has {', '.join(names)}")
        for name in self.variants or names:
            if (runtime := names[name]["runtime"]) in _PACKAGES:
                check_installed(_PACKAGES[runtime])
        # All rows are checked before the first one is measured.
        rows = [*self._torch_rows(), *(self._variant_row(name) for name in self.variants or names)]
        return {**self._setup(), "rows": [self._measure_row(row) for row in rows]}

    def _torch_rows(self) -> Iterator[_Row]:
        """Eager and compiled torch; without runtimes if the bundle's model is not available here."""
        parents = self.bundle.manifest["identity"]["parents"]
        model = self.model or self._parent_url(parents["model"])
        decoder = self.decoder or (self._parent_url(parents["decoder"]) if parents["decoder"] else None)
        modules: tuple[str, ...] = MODULES
        try:
            note = self._weight_mismatch(model, decoder)
        except _UnusableModelError as error:
            if getattr(self, error.option):
                raise SettingsError(f"--{error.option} {error}") from None
            note, modules = f"not run: the bundle's {error.option} {error}; give --{error.option}", ()
        for name, compiled in (("torch eager", False), ("torch compiled", True)):
            runtime = TorchRuntime(model=model, decoder=decoder, compiled=compiled)
            yield _Row(name=name, weights="float32", runtimes=dict.fromkeys(modules, runtime), note=note)

    def _parent_url(self, parent: Mapping[str, Any]) -> str:
        """URL of a model of the manifest; "run:" is the folder that the bundle lies in."""
        source = str(parent["source"])
        if source.startswith(_RUN_PREFIX):
            return str(self.bundle.folder.resolve().parent / source.removeprefix(_RUN_PREFIX))
        return source

    def _weight_mismatch(self, model: str, decoder: str | None) -> str | None:
        """A note on weights that are not the bundle's; None if all of them are.

        Raises:
            _UnusableModelError: if a model cannot be loaded, or has other shapes than the bundle's modules.
        """
        identity, latent_shape = self.bundle.manifest["identity"], self.bundle.latent_shape
        try:
            loaded = load(model)
        except ValueError as error:
            reason = str(error).removeprefix(f"{model}: ")
            raise _UnusableModelError("model", f"{model}: {reason}") from None
        length, width = self.bundle.vectors.arrays["c"].shape[1:]
        expected = (length, width, latent_shape)
        text_width = loaded.text_encoder.config.hidden_size
        found = (loaded.tokenizer.model_max_length, text_width, loaded.latent_shape)
        if found != expected:
            raise _UnusableModelError(
                "model",
                f"{model}: it has tokens, text features and latents of {found}; the bundle's programs have "
                f"{expected}",
            )
        half = None
        if decoder is not None:
            try:
                half = load_decoder(decoder)
            except (ValueError, OSError) as error:
                reason = str(error).removeprefix(decoder)
                raise _UnusableModelError("decoder", f"{decoder}: {reason}") from None
            if half.config.latent_channels != latent_shape[0]:
                raise _UnusableModelError(
                    "decoder", f"{decoder}: it has {half.config.latent_channels} channels"
                )
        differing = []
        if loaded.fingerprint() != identity["model"]["weights"]:
            differing.append(f"the model {model}")
        if (None if half is None else weight_hash(half)) != identity["decoder"]:
            differing.append(f"the decoder {decoder}" if decoder else "the model's own decoder")
        return f"not the bundle's weights: {' and '.join(differing)}" if differing else None

    def _variant_row(self, name: str) -> _Row:
        variant = self.bundle.manifest["variants"][name]
        files = {module: self.bundle.files(name, module) for module in MODULES}
        runtimes: dict[str, ModuleRuntime] = {}
        note = None
        if variant["runtime"] == EXECUTORCH:
            runtimes = {module: ExecuTorchRuntime(program=path) for module, (path,) in files.items()}
        elif variant["runtime"] == ONNX_RUNTIME:
            runtimes = {module: OnnxRuntime(model=paths[0]) for module, paths in files.items()}
        elif sys.platform == "darwin":
            runtimes = {module: CoreMLRuntime(packages=tuple(paths)) for module, paths in files.items()}
        else:
            note = "not executed here: Core ML runs on Apple's systems only"
        return _Row(name=name, weights=variant["weights"], runtimes=runtimes, note=note)

    def _setup(self) -> dict[str, Any]:
        bundle = self.bundle
        return {
            "bundle": str(bundle.folder),
            "settings_hash": bundle.manifest["settings_hash"],
            "date": datetime.now(UTC).date().isoformat(),
            "device": setting_of(TimingSettings()).device,
            "threads": self.threads,
            "repeats": self.repeats,
            "warm_ups": WARM_UPS,
            "versions": versions(),
            "steps": len(bundle.sampler.steps),
            "calls": self._calls(),
            "conditions": bundle.manifest["conditions"],
            "tokens": bundle.vectors.arrays["token_ids"].shape[1],
            "latent_shape": list(bundle.latent_shape),
            "parameters": bundle.manifest["parameters"],
        }

    def _calls(self) -> dict[str, int]:
        """Runs of each module per image: the empty caption and the caption, the steps, the image."""
        steps, conditions = len(self.bundle.sampler.steps), self.bundle.manifest["conditions"]
        passes = 1 if "folded_guidance" in self.bundle.manifest else 2
        return {"text_encoder": 2, "unet": steps * passes // conditions, "decoder": 1}

    def _inputs(self) -> dict[str, tuple[np.ndarray, ...]]:
        """Inputs of each module from the test vectors: the caption, the first step, the last latent."""
        vectors, steps = self.bundle.vectors, self.bundle.sampler.steps
        conditions = self.bundle.manifest["conditions"]
        t = np.array([steps[0].t], np.float32)
        return {
            "text_encoder": (vectors.arrays["token_ids"][1:],),
            "unet": (vectors.arrays["noise"], t, vectors.arrays["c"][2 - conditions :]),
            "decoder": (vectors.arrays[f"z-{len(steps) - 1}"],),
        }

    def _measure_row(self, row: _Row) -> dict[str, Any]:
        """Benchmark the modules of a row; failures become notes."""
        results: dict[str, ModuleBenchmark] = {}
        notes = [row.note] if row.note else []
        inputs = self._inputs()
        for module, runtime in row.runtimes.items():
            run = ModuleRun(module=module, inputs=inputs[module], threads=self.threads, repeats=self.repeats)
            try:
                results[module] = result = benchmark_module(runtime, run)
            except FootprintError as error:
                notes.append(f"{module}: {error}")
            except RuntimeUnavailableError as error:
                notes.append(str(error))
                break
            else:
                logger.info(f"  {row.name}, {module}: {result.median_ms:.4g} ms")
        calls = self._calls()
        overall_s = None
        if results.keys() == calls.keys():
            overall_s = sum(calls[name] * result.median_ms for name, result in results.items()) / 1000
        return {
            "name": row.name,
            "weights": row.weights,
            "modules": {module: result.to_values() for module, result in results.items()},
            "overall_s": overall_s,
            "notes": notes,
        }


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of the table.

    Attributes:
        name: of the runtime or the variant.
        weights: their precision.
        runtimes: by module; empty if nothing can run them.
        note: on the weights, or why nothing can.
    """

    name: str
    weights: str
    runtimes: Mapping[str, ModuleRuntime]
    note: str | None = None


class _UnusableModelError(ValueError):
    """A model or decoder that torch's rows cannot use; `option` names another."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(reason)
        self.option = option
