"""Measures CPU time and memory of curves of 1, 10 and 228 points, beside commit 66c16bd at 1, 2 and 4.

git worktree add FOLDER 66c16bd
OMP_NUM_THREADS=1 python tests/snapfusion/metrics/engine_costs.py --earlier FOLDER --out engine.jsonl

runs `curve_costs.py` in a process of its own for each number of points, 30,000 images of 2,048 features each,
and appends a line of JSON to the file; runs that are in the file are not repeated. At the end it prints the
earlier build's CPU-seconds at the most points, extrapolated linearly, over the present one's. All of it takes
hours: `--points 1 10 --earlier-points 1 2` takes half an hour.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

CURVE_COSTS = Path(__file__).with_name("curve_costs.py")
PRESENT = Path(__file__).parents[3]


def measured(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Figures in a file, by build and points."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {(record["build"], record["points"]): record for record in records}


def extrapolated(figures: dict[int, float], *, points: int) -> float:
    """CPU-seconds at so many points on the line of least squares through those measured, by points."""
    slope, start = np.polyfit(list(figures), list(figures.values()), deg=1)
    return float(start + slope * points)


def summary(found: dict[tuple[str, int], dict[str, float]]) -> list[str]:
    """Lines with the peak of each run, and the ratio of both builds at the most points."""
    lines = [
        f"{build}, {points} points: {record['cpu_s']:,.0f} CPU-s, {record['peak_mib']:,} MiB"
        for (build, points), record in sorted(found.items())
    ]
    present = {points: record["cpu_s"] for (build, points), record in found.items() if build == "present"}
    earlier = {points: record["cpu_s"] for (build, points), record in found.items() if build == "earlier"}
    if present and len(earlier) > 1:
        most = max(present)
        would = extrapolated(earlier, points=most)
        measured_at = ", ".join(map(str, sorted(earlier)))
        lines.append(
            f"earlier at {most} points, extrapolated linearly from {measured_at}: {would:,.0f} CPU-s, "
            f"{would / present[most]:.2f} times the present one"
        )
    return lines


def main() -> None:
    """Measure what is missing, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--points", type=int, nargs="*", default=[1, 10, 228])
    parser.add_argument(
        "--earlier", type=Path, help="checkout of commit 66c16bd; without it only the present"
    )
    parser.add_argument("--earlier-points", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--kid-images", type=int, default=5_000)
    parser.add_argument("--out", type=Path, required=True, help="file of results")
    arguments = parser.parse_args()
    runs = [("present", PRESENT, points) for points in arguments.points]
    if arguments.earlier:
        runs += [("earlier", arguments.earlier, points) for points in arguments.earlier_points]
    # Shortest first, so that an interrupted measurement leaves the most figures.
    for build, folder, points in sorted(runs, key=lambda run: run[2]):
        if (build, points) in measured(arguments.out):
            continue
        options = {"build": folder, "points": points, "rows": arguments.rows}
        options["kid-images"] = arguments.kid_images
        command = [sys.executable, str(CURVE_COSTS)]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps({"build": build, **json.loads(done.stdout)}) + "\n")
    print("\n".join(summary(measured(arguments.out))))


if __name__ == "__main__":
    main()
