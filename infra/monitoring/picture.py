"""The dashboard as a picture, where there is no Grafana.

python infra/monitoring/picture.py OUT.png [MINUTES] asks the Prometheus of PROMETHEUS_URL (unless it is set,
http://127.0.0.1:9090) for every panel's expressions over the last minutes, an hour unless given, and draws
the answers where the panels stand.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DASHBOARD = Path(__file__).with_name("dashboard.json")
STEP_SECONDS = 15
COLUMNS = 24
UNITS = {"percentunit": "%", "s": "seconds", "currencyUSD": "dollars", "short": ""}


def ask(expression: str, *, minutes: float) -> list[dict[str, Any]]:
    """What Prometheus answers to a range query: a metric and [time, value] pairs, for each series."""
    now = time.time()
    query = expression.replace("$__range", f"{round(minutes * 60)}s")
    words = {"query": query, "start": now - 60 * minutes, "end": now, "step": STEP_SECONDS}
    url = os.environ.get("PROMETHEUS_URL", "http://127.0.0.1:9090")
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(words)}") as answer:
        return list(json.load(answer)["data"]["result"])


def legend(pattern: str, metric: dict[str, str]) -> str:
    """Grafana's legend for a series."""
    for name, value in metric.items():
        pattern = pattern.replace("{{" + name + "}}", value)
    return pattern


def draw_panel(axes: Axes, panel: dict[str, Any], *, minutes: float) -> None:
    """One panel: its series, or the last value where it shows one number."""
    axes.set_title(panel["title"], fontsize=10, loc="left")
    percent = panel["fieldConfig"]["defaults"]["unit"] == "percentunit"
    for target in panel["targets"]:
        for series in ask(target["expr"], minutes=minutes):
            times = [(float(at) - time.time()) / 60 for at, _ in series["values"]]
            values = [float(value) * (100 if percent else 1) for _, value in series["values"]]
            if panel["type"] == "stat":
                axes.text(0.5, 0.5, f"{values[-1]:.2f}", ha="center", va="center", fontsize=28)
                axes.axis("off")
                continue
            axes.plot(times, values, label=legend(target["legendFormat"], series["metric"]), linewidth=1.2)
    if panel["type"] == "stat":
        return
    axes.set_xlim(-minutes, 0)
    highest = max((max(line.get_ydata()) for line in axes.lines), default=1.0)
    axes.set_ylim(0, 105 if percent else max(1.25 * highest, 0.01))
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)
    axes.set_ylabel(UNITS[panel["fieldConfig"]["defaults"]["unit"]], fontsize=7)
    if axes.lines:
        axes.legend(fontsize=7, loc="best")
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="gray")


def draw(path: str, *, minutes: float) -> None:
    """All panels, into a PNG."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = [panel["gridPos"] for panel in panels]
    rows = max(place["y"] + place["h"] for place in places)
    figure = Figure(figsize=(16, rows / 2.4), layout="constrained")
    grid = figure.add_gridspec(rows, COLUMNS)
    for panel, place in zip(panels, places, strict=True):
        spot = grid[place["y"] : place["y"] + place["h"], place["x"] : place["x"] + place["w"]]
        draw_panel(figure.add_subplot(spot), panel, minutes=minutes)
    figure.supxlabel("minutes before now", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    draw(sys.argv[1], minutes=float(sys.argv[2]) if len(sys.argv) == 3 else 60)
