"""Reads and checks the options of `jobs.generate`, without torch."""

import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from snapfusion.settings import SettingsError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""Of the names of images."""
_OF_A_BUNDLE = ("variant", "runtime")
_OF_A_MODEL = ("model", "steps", "sampler", "size", "device", "image")


def read_captions(options: SimpleNamespace) -> list[str]:
    """The caption of the command line, or those of a file.

    Raises:
        SettingsError: unless there is one of both, with a usable caption.
    """
    if bool(options.caption) == bool(options.prompts):
        raise SettingsError("give a CAPTION or --prompts FILE, one of them")
    if options.caption:
        return [" ".join(options.caption)]
    from pipelines.rejections import Rejection
    from pipelines.sources import captions as caption_files
    from pipelines.sources.settings import CaptionSettings

    rows = caption_files.read_captions(
        options.prompts, CaptionSettings(caption_column=options.caption_column)
    )
    captions = list(dict.fromkeys(row.text for row in rows if not isinstance(row, Rejection)))
    if not captions:
        raise SettingsError(f"--prompts {options.prompts}: it has no usable caption")
    return captions


def read_seeds(options: SimpleNamespace) -> list[int]:
    """The seeds of the command line, each once.

    Raises:
        SettingsError: if one is no whole number.
    """
    if options.seeds is None:
        return [options.seed]
    try:
        return list(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    except ValueError:
        raise SettingsError(f"--seeds {options.seeds}: whole numbers with commas are accepted") from None


def check_options(options: SimpleNamespace) -> None:
    """Refuse options out of range or without effect.

    Raises:
        SettingsError: naming the option.
    """
    if Path(options.out).suffix.lower() not in ENDINGS:
        raise SettingsError(f"--out {options.out}: a file that ends with {', '.join(ENDINGS)} is accepted")
    if options.guidance is not None and not 1.0 <= options.guidance < math.inf:
        raise SettingsError(f"--guidance {options.guidance}: 1.0 and more is accepted")
    if options.caption_column is not None and options.prompts is None:
        raise SettingsError(f"--caption-column {options.caption_column}: only --prompts FILE has columns")
    if options.bundle is None:
        _check_absent(options, _OF_A_BUNDLE, reason="only a --bundle has {name}s")
    if options.variant is not None and options.runtime is not None:
        raise SettingsError(f"--runtime {options.runtime}: --variant {options.variant} has its own")
    if options.strength is not None and options.image is None:
        raise SettingsError(f"--strength {options.strength}: it has an effect with --image only")
    if options.bundle is not None:
        if options.no_safety_checker:
            raise SettingsError("--no-safety-checker: a --bundle has its own, which cannot be turned off")
        _check_absent(options, _OF_A_MODEL, reason="a --bundle has its own, compiled into it")


def _check_absent(options: SimpleNamespace, names: Iterable[str], *, reason: str) -> None:
    for name in names:
        if (value := getattr(options, name)) is not None:
            raise SettingsError(f"--{name} {value}: {reason.format(name=name)}")
