"""Tables of a panel in Markdown, for documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from jobs.cli.ablation import PanelResults

_METRICS: Final = {
    "fid": ("FID", 2),
    "kid": ("KID", 2),
    "clip": ("CLIP", 4),
    "all_attributes": ("all attributes right", 3),
}
"""Heading and digits of each metric."""


def panel_tables(panel: PanelResults) -> str:
    """The tables of a panel: its lines, its differences, and what was tried on the tuning captions.

    Each value is followed by its 95 % interval, over training seeds and drawings.
    """
    return "\n".join(
        [
            _floor(panel["evaluation"]["floor"]),
            *_table(_lines(panel)),
            "FID and CLIP at each guidance w:\n",
            *_table(_over_guidance(panel)),
            "Differences, averaged over guidance:\n",
            *_table(_differences(panel)),
            "On the tuning captions, at the best guidance:\n",
            *_table(_tuning(panel["evaluation"]["tuning"])),
        ]
    )


def _floor(floor: Mapping[str, Any] | None) -> str:
    if floor is None:
        return ""
    fid = floor["fid"]
    return (
        f"FID of as many real images: {fid['mean']:.2f}, standard deviation {fid['sd']:.2f} of "
        f"{floor['redraws']} redraws.\nTest captions, at the guidance chosen on the tuning captions:\n"
    )


def _lines(panel: PanelResults) -> Iterator[Sequence[str]]:
    lines = [line for line in panel["over_seeds"] if line["best"] is not None]
    metrics = _metrics_in(lines[0]["best"])
    yield ["line", "passes", "w", *(heading for heading, _ in metrics.values())]
    for line in lines:
        best, scales = line["best"], sorted(set(line["best"]["w"]))
        values = (_interval(best[name], digits) for name, (_, digits) in metrics.items())
        yield [f"`{line['name']}`", f"{best['evaluations']:,}", ", ".join(f"{w:g}" for w in scales), *values]


def _over_guidance(panel: PanelResults) -> Iterator[Sequence[str]]:
    lines = panel["over_seeds"]
    yield ["line", *(f"{point['w']:g}" for point in lines[0]["points"])]
    for line in lines:
        values = (f"{point['fid'][0]:.2f}, {point['clip'][0]:.3f}" for point in line["points"])
        yield [f"`{line['name']}`", *values]


def _differences(panel: PanelResults) -> Iterator[Sequence[str]]:
    students = [line for line in panel["over_seeds"] if line["student"]]
    first = next(iter(students[0]["differences"].values()))
    metrics = _metrics_in(first)
    yield ["student", "minus", *(heading for heading, _ in metrics.values())]
    for line in students:
        for reference, found in line["differences"].items():
            values = (
                f"{_interval(found[name]['difference'], digits, signed=True)}, {found[name]['is']}"
                for name, (_, digits) in metrics.items()
            )
            yield [f"`{line['name']}`", f"`{reference}`", *values]


def _tuning(tuning: Mapping[str, Any] | None) -> Iterator[Sequence[str]]:
    if tuning is None:
        return
    chosen = set(tuning["families"].values())
    metrics = _metrics_in(next(iter(tuning["best"].values())))
    yield ["line", "w", *(heading for heading, _ in metrics.values()), "chosen"]
    for name, best in tuning["best"].items():
        values = (_interval(best[metric], digits) for metric, (_, digits) in metrics.items())
        yield [f"`{name}`", f"{best['w']:g}", *values, "yes" if name in chosen else ""]


def _metrics_in(point: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    return {name: how for name, how in _METRICS.items() if name in point}


def _interval(interval: Sequence[float], digits: int, *, signed: bool = False) -> str:
    value, low, high = (f"{end:{'+' if signed else ''}.{digits}f}" for end in interval)
    return f"{value} ({low} to {high})"


def _table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if number == 0:
            yield "|---" * len(row) + "|"
    yield ""
