"""An evaluation: who is compared, on which captions, held against which pictures; and its figures.

Each contender's pictures are a table of their own (SAMPLES), which more guidance scales or captions add to;
real pictures are described once (REFERENCES). The figures are computed from the tables, and can be again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from pipelines.commits import Origin
from pipelines.execution import Runner
from pipelines.intake import OnProgress
from pipelines.references import References, describe_references, moments_of
from pipelines.rejection import Rejection
from pipelines.samples import Samples, draw_samples, drawn_ids, judged
from pipelines.sources.captions import Caption, CaptionSettings, fingerprint, read_captions
from pipelines.stages.sample import Sampler
from pipelines.storage import absolute
from pipelines.tables import Snapshot
from snapfusion.metrics.curves import (
    Curve,
    NoReading,
    Point,
    clip_at_equal_fid,
    differences,
    figures,
    gap_closed,
)
from snapfusion.metrics.moments import Moments
from snapfusion.mini.scenes import HELD_OUT, NUM_CAPTIONS, caption_of, scene_of
from snapfusion.settings import Settings

_NAME = r"^[A-Za-z0-9_.+-]+$"

Start = Callable[[str, Any], tuple[Origin, OnProgress]]
"""(what begins, its parents) -> what to keep beside its units, and what to tell of its progress."""


class Contender(Settings):
    """A model and a sampler.

    Attributes:
        name: of its line, and of its table unless `table` says another.
        model: a source that `snapfusion.models.load` accepts, or (for the job) "run:" and a place in the run,
            such as a student's model, raw or best; None is the recipe's.
        sampler: solver and steps.
        decoder: the folder of a half-width decoder, or (for the job) likewise; None takes the model's own.
        table: the table of its pictures, where evaluations share one.
    """

    name: str = Field(pattern=_NAME)
    model: str | None = None
    sampler: Sampler = Sampler()
    decoder: str | None = None
    table: str | None = Field(None, pattern=_NAME)


class Prompts(Settings):
    """Which captions are drawn.

    Attributes:
        name: a short name; units are named after it.
        url: a caption list; None takes the captions of the miniature's held-out scenes.
        reading: which columns of the list.
        limit: how many, from the first on; by default each of the miniature's captions once.
    """

    name: str = Field("scenes", pattern=_NAME)
    url: str | None = None
    reading: CaptionSettings = CaptionSettings()
    limit: int = Field(NUM_CAPTIONS, ge=4)


class Gap(Settings):
    """How much of the way from few steps to many a student goes: names of contenders, and a guidance."""

    student: str
    few: str
    many: str
    w: float = Field(ge=1.0)


class Evaluation(Settings):
    """Who is compared, and how.

    Attributes:
        contenders: models and samplers, all of the same captions from the same noise.
        baseline: the contender that the others are held against.
        also_against: further contenders that all others are held against.
        guidance: scales w of SnapFusion Eq. 3, rising.
        prompts: captions.
        references: real pictures.
        samples: how pictures are drawn and judged.
        groups: neighbourhoods of captions that intervals leave out, one at a time.
        gaps: shares of a FID gap to be read.
    """

    contenders: tuple[Contender, ...] = tuple(
        Contender(name=f"{solver}-{steps}", sampler=Sampler(solver=solver, steps=steps))
        for solver in ("ddim", "dpm", "dpm++")
        for steps in (50, 16, 8, 4)
    )
    baseline: str = "ddim-50"
    also_against: tuple[str, ...] = ()
    guidance: tuple[float, ...] = tuple(1.0 + 0.5 * step for step in range(11))
    prompts: Prompts = Prompts()
    references: References = References()
    samples: Samples = Samples()
    groups: int = Field(20, ge=2)
    gaps: tuple[Gap, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> Evaluation:
        names = [contender.name for contender in self.contenders]
        if len(set(names)) < len(names):
            raise ValueError(f"names of contenders repeat: {', '.join(names)}")
        asked = {
            self.baseline,
            *self.also_against,
            *(name for gap in self.gaps for name in (gap.student, gap.few, gap.many)),
        }
        if unknown := sorted(asked - set(names)):
            raise ValueError(f"there is no contender {unknown[0]!r}; there are {', '.join(names)}")
        if list(self.guidance) != sorted(set(self.guidance)) or not self.guidance:
            raise ValueError(f"guidance must rise, with one scale at least: {list(self.guidance)}")
        return self


def evaluate(settings: Evaluation, *, model: str, out: str, start: Start, run: Runner) -> dict[str, Any]:
    """Draw what is not drawn yet, and read the figures off the tables.

    Args:
        settings: who and how.
        model: of the contenders that name none.
        out: folder or URL that the tables lie in: `references`, and one for each contender.
        start: told of each table that is about to be made.
        run: what sends units through the stages.

    Returns:
        What was compared and how ("protocol"), the figures of each contender ("curves"), how each stands to
        the baseline ("differences", "equal_fid") and to others ("against"), and "gaps", as JSON values; an
        interval is an `Interval`.
    """
    captions = captions_of(settings.prompts)
    origin, on_progress = start("references", {"pictures": settings.references.url or "scenes"})
    references = describe_references(
        settings.references,
        judging=settings.samples.judging,
        url=f"{out}/references",
        origin=origin,
        run=run,
        on_progress=on_progress,
    )
    tables: dict[str, Snapshot] = {}
    for contender in settings.contenders:
        source = _place(contender.model or model)
        origin, on_progress = start(contender.name, {"model": source, "captions": settings.prompts.url})
        tables[contender.name] = draw_samples(
            settings.samples,
            model=source,
            sampler=contender.sampler,
            guidance=settings.guidance,
            captions=captions,
            source=settings.prompts.name,
            url=f"{out}/{contender.table or contender.name}",
            decoder=contender.decoder and absolute(contender.decoder),
            origin=origin,
            run=run,
            on_progress=on_progress,
        )
    ids = _in_common(settings, tables, captions)
    reference = moments_of(references)
    curves = {name: _curve(settings, table, ids=ids, reference=reference) for name, table in tables.items()}
    return {
        "protocol": _protocol(settings, captions, ids=ids, reference=reference, references=references),
        "tables": {name: table.lineage() for name, table in tables.items()},
        **_readings(settings, curves, tables),
    }


def _place(model: str) -> str:
    """A folder by its absolute path: a worker may stand elsewhere."""
    return absolute(model) if Path(model).is_dir() else model


def captions_of(prompts: Prompts) -> list[Caption | Rejection]:
    """The captions of the list, or of held-out scenes."""
    if prompts.url is not None:
        return list(islice(read_captions(prompts.url, prompts.reading), prompts.limit))
    return [
        Caption(id=f"scene-{number}", ordinal=number, text=caption_of(scene_of(HELD_OUT + number)))
        for number in range(prompts.limit)
    ]


def _in_common(
    settings: Evaluation, tables: Mapping[str, Snapshot], captions: Sequence[Caption | Rejection]
) -> list[str]:
    """The captions whose picture no contender lost at any guidance, in order: differences are paired."""
    drawn = [
        set(drawn_ids(table, source=settings.prompts.name, w=w))
        for table in tables.values()
        for w in settings.guidance
    ]
    ids = [row.id for row in captions if all(row.id in there for there in drawn)]
    if len(ids) < 2 * settings.groups:
        raise ValueError(
            f"{len(ids)} captions were drawn by all contenders; {2 * settings.groups} are needed for "
            f"{settings.groups} groups: raise evaluation.prompts.limit or lower evaluation.groups"
        )
    return ids


def _curve(settings: Evaluation, table: Snapshot, *, ids: Sequence[str], reference: Moments) -> Curve:
    return Curve(points=tuple(_points(settings, table, ids=ids)), reference=reference)


def _points(settings: Evaluation, table: Snapshot, *, ids: Sequence[str]) -> Iterator[Point]:
    for w in settings.guidance:
        rows = judged(table, source=settings.prompts.name, w=w)
        position = {id_: place for place, id_ in enumerate(rows.ids)}
        chosen = np.array([position[id_] for id_ in ids])
        yield Point.of(
            w=w,
            features=rows.features[chosen],
            clip=rows.clip[chosen],
            right=None if rows.right is None else rows.right[chosen],
            groups=settings.groups,
        )


def _protocol(
    settings: Evaluation,
    captions: Sequence[Caption | Rejection],
    *,
    ids: Sequence[str],
    reference: Moments,
    references: Snapshot,
) -> dict[str, Any]:
    """All that a figure must be quoted with."""
    judging = settings.samples.judging
    smallest = Moments(count=len(ids), mean=reference.mean, scatter=reference.scatter)
    notes = [
        f"{side}: {said}"
        for side, said in (("drawn", smallest.shortfall()), ("reference", reference.shortfall()))
        if said is not None
    ]
    return {
        "captions": {
            "name": settings.prompts.name,
            "url": settings.prompts.url,
            "sha256": fingerprint(captions),
            "listed": len(captions),
            "compared": len(ids),
        },
        "reference": {**references.lineage(), **references.identity, "compared": reference.count},
        "features": judging.describe_features(),
        "scorer": judging.describe_scorer(),
        "drawing": settings.samples.drawing.to_values(),
        "dtype": settings.samples.device.dtype,
        "intervals": f"95 %: normal for means over captions, else a jackknife over {settings.groups} groups",
        "notes": notes,
    }


def _readings(
    settings: Evaluation, curves: Mapping[str, Curve], tables: Mapping[str, Snapshot]
) -> dict[str, Any]:
    return {
        "curves": {
            contender.name: {
                **contender.to_values(),
                "points": [
                    {
                        "w": w,
                        "evaluations": contender.sampler.evaluations(
                            w, told=tables[contender.name].identity["told_w"]
                        ),
                        **figures(curves[contender.name], w),
                    }
                    for w in settings.guidance
                ],
            }
            for contender in settings.contenders
        },
        "baseline": settings.baseline,
        **_against(settings, curves, baseline=settings.baseline),
        "against": {name: _against(settings, curves, baseline=name) for name in settings.also_against},
        "gaps": [{**gap.to_values(), **_read(partial(_closed, gap, curves))} for gap in settings.gaps],
    }


def _against(settings: Evaluation, curves: Mapping[str, Curve], *, baseline: str) -> dict[str, Any]:
    """How each other contender stands to one."""
    others = {name: curve for name, curve in curves.items() if name != baseline}
    return {
        "differences": {
            name: [{"w": w, **differences(curve, curves[baseline], w=w)} for w in settings.guidance]
            for name, curve in others.items()
        },
        "equal_fid": {
            name: _read(partial(_equal_fid, curve, curves[baseline])) for name, curve in others.items()
        },
    }


def _equal_fid(curve: Curve, baseline: Curve) -> dict[str, Any]:
    return asdict(clip_at_equal_fid(curve, baseline))


def _closed(gap: Gap, curves: Mapping[str, Curve]) -> dict[str, Any]:
    student, few, many = (curves[name] for name in (gap.student, gap.few, gap.many))
    return {"closed": gap_closed(student, few=few, many=many, w=gap.w)}


def _read(reading: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return reading()
    except NoReading as reason:
        return {"no_reading": str(reason)}
