"""Renders report pages: static HTML files with their images inside, which load nothing from the network.

Captions, file names and reasons come from other people's data. Every string is stripped of control
characters, shortened, and escaped by the template engine.
"""

import base64
import math
import unicodedata
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from jobs.reports.charts import chart_svg
from jobs.reports.metric_names import METRIC_NAMES, features_name, metrics_in, scorer_name
from jobs.runtime.progress import format_duration
from pipelines.tables.schemas import to_png

_MAX_CHARACTERS = 400
_MAX_SIDE = 256
_MAX_PIXELATED_SIDE = 128


def render_page(template: str, **values: object) -> str:
    """Render a template of this folder; the same values give the same text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt field is an error, not an empty cell
        trim_blocks=True,
        lstrip_blocks=True,
        # Sees every value that a template prints, so that no field escapes sanitizing.
        finalize=lambda value: _sanitized(value) if isinstance(value, str) else value,
    )
    environment.filters |= {
        "image": _image,
        "chart": lambda chart: Markup(chart_svg(chart)),
        "count": lambda number: f"{number:,}",
        "decibels": _decibels,
        "duration": lambda seconds: f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds),
        "levels": lambda number: f"{number:.1f} of 255",
        "percent": lambda number: f"{number:.1f} %",
        "score": lambda number: f"{number:.3f}",
        "features": features_name,
        "metric": METRIC_NAMES.__getitem__,
        "metrics": metrics_in,
        "scorer": scorer_name,
        "figure": lambda number: f"{number:,.4g}" if abs(number) < 10_000 else f"{number:,.0f}",
        "rate": lambda number: f"{number:.3g}" if number < 1000 else f"{number:,.0f}",
        "size": _size,
        "whole": lambda text: Markup(Markup.escape(text)),
    }
    return environment.get_template(template).render(**values)


def _sanitized(text: str) -> str:
    """Text without control and direction characters, shortened; markup is returned unchanged."""
    if isinstance(text, Markup):
        return text
    clean = "".join(
        " " if unicodedata.category(letter)[0] == "C" else letter for letter in text[:_MAX_CHARACTERS]
    )
    return clean if len(text) <= _MAX_CHARACTERS else f"{clean}…"


def _image(image: np.ndarray, label: str) -> Markup:
    """An `<img>` with the pixels inside; large images are reduced, small ones have visible pixels."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is {image.dtype} {image.shape}; uint8 [H,W,3] is accepted")
    if max(image.shape[:2]) > _MAX_SIDE:
        reduced = Image.fromarray(image)
        reduced.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        image = np.asarray(reduced)
    height, width = image.shape[:2]
    kind = "pixels" if max(height, width) <= _MAX_PIXELATED_SIDE else "photo"
    data = base64.b64encode(to_png(image)).decode()
    return Markup('<img class="{}" width="{}" height="{}" alt="{}" src="data:image/png;base64,{}">').format(
        kind, width, height, _sanitized(label), data
    )


def _decibels(value: float | None) -> str:
    return "every bit agrees" if value is None or math.isinf(value) else f"{value:.1f} dB"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
