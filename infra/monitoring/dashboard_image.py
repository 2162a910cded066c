"""Renders the dashboard as an image, without Grafana.

python infra/monitoring/dashboard_image.py OUT.png [MINUTES] queries the Prometheus at PROMETHEUS_URL (by
default http://127.0.0.1:9090) for every panel's expressions over the last minutes (by default 60), and plots
the results in the panels' positions.
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


def query_range(expression: str, *, minutes: float) -> list[dict[str, Any]]:
    """The series of a range query, each with its metric and [time, value] pairs."""
    now = time.time()
    query = expression.replace("$__range", f"{round(minutes * 60)}s")
    parameters = {"query": query, "start": now - 60 * minutes, "end": now, "step": STEP_SECONDS}
    url = os.environ.get("PROMETHEUS_URL", "http://127.0.0.1:9090")
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}") as response:
        return list(json.load(response)["data"]["result"])


def legend(pattern: str, metric: dict[str, str]) -> str:
    """Grafana's legend for a series."""
    for name, value in metric.items():
        pattern = pattern.replace("{{" + name + "}}", value)
    return pattern


def plot_panel(axes: Axes, panel: dict[str, Any], *, minutes: float) -> None:
    """Plot one panel: its series, or the last value if it shows a single number."""
    axes.set_title(panel["title"], fontsize=10, loc="left")
    percent = panel["fieldConfig"]["defaults"]["unit"] == "percentunit"
    for target in panel["targets"]:
        for series in query_range(target["expr"], minutes=minutes):
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


def render(path: str, *, minutes: float) -> None:
    """Render all panels into a PNG."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(16, rows / 2.4), layout="constrained")
    grid = figure.add_gridspec(rows, COLUMNS)
    for panel in panels:
        x, y, width, height = (panel["gridPos"][name] for name in ("x", "y", "w", "h"))
        axes = figure.add_subplot(grid[y : y + height, x : x + width])
        plot_panel(axes, panel, minutes=minutes)
    figure.supxlabel("minutes before now", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    render(sys.argv[1], minutes=float(sys.argv[2]) if len(sys.argv) == 3 else 60)
