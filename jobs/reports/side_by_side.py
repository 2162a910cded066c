"""The same captions from the same noise: by the teacher, by the student's first weights, by the student.

For the report of a run whose pictures the miniature's judges can read. Captions are of held-out scenes, and
the noise is that of `jobs.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jobs.evaluation.evaluation import captions_of
from jobs.evaluation.settings import PromptSettings
from jobs.reports.run_page import CaptionedImage, ModelMetrics, SampleRow, StepComparison
from pipelines.sources.captions import Caption
from pipelines.stages.sample import SampleAndScore
from pipelines.stages.settings import Device, MetricSettings, Sampler, SamplingSettings
from snapfusion.metrics.intervals import mean
from snapfusion.mini.vocabulary import ATTRIBUTES
from snapfusion.noise import noise_key

GUIDANCE = 6.0
"""Where few steps show most, of the guidance that the miniature's students are distilled for."""

NUM_CAPTIONS = 64
_NUM_ROWS = 12
TEACHER_STEPS = 50
"""The teacher's steps."""
_DRAWING = SamplingSettings()


def sample_side_by_side(student: Mapping[str, Any], *, place: str) -> tuple[StepComparison, dict[str, Any]]:
    """What the page shows of a student, and its figures as JSON values.

    Args:
        student: what `jobs.distill_steps` says of it.
        place: where it is.
    """
    few, parents = student["distillation"]["steps"], student["parents"]
    ways = {
        "teacher": (parents["teacher"]["source"], TEACHER_STEPS),
        "undistilled": (parents["student"]["source"], few),
        "student": (f"{place}/model", few),
    }
    captions = [row for row in captions_of(PromptSettings(limit=NUM_CAPTIONS)) if isinstance(row, Caption)]
    drawn = {name: _sample(model, steps=steps, captions=captions) for name, (model, steps) in ways.items()}
    figures = {
        name: {"model": model, "steps": steps, **_figures(drawn[name], teacher=drawn["teacher"])}
        for name, (model, steps) in ways.items()
    }
    gain = mean(drawn["student"]["clip"] - drawn["undistilled"]["clip"])._asdict()
    metrics = {
        "guidance": GUIDANCE,
        "captions": len(captions),
        "seed": _DRAWING.seed,
        "ways": figures,
        "clip_gain": gain,
    }
    shown = StepComparison(
        guidance=GUIDANCE,
        count=len(captions),
        ways=tuple(
            ModelMetrics(name=name, **{key: told[key] for key in _COLUMNS}) for name, told in figures.items()
        ),
        strips=tuple(
            _sample_row(number, captions, figures, drawn) for number in range(min(_NUM_ROWS, len(captions)))
        ),
    )
    return shown, metrics


_COLUMNS = ("steps", "attributes_right", "all_attributes_right", "clip", "distance")


def _sample(model: str, *, steps: int, captions: Sequence[Caption]) -> dict[str, np.ndarray]:
    stage = SampleAndScore(
        model=model, sampler=Sampler(steps=steps), drawing=_DRAWING, judging=MetricSettings(), device=Device()
    )
    keys = [noise_key("evaluation", _DRAWING.seed, caption.id) for caption in captions]
    return stage.draw_and_judge([caption.text for caption in captions], keys, w=GUIDANCE)


def _figures(drawn: Mapping[str, np.ndarray], *, teacher: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over the captions; the distance is of pixels, root mean square, in gray levels of 255."""
    apart = drawn["image"].astype(np.float64) - teacher["image"]
    return {
        "attributes_right": float(drawn["right"].mean()),
        "all_attributes_right": float(drawn["right"].all(axis=1).mean()),
        "clip": float(drawn["clip"].mean()),
        "distance": float(np.sqrt((apart**2).mean())),
    }


def _sample_row(
    number: int,
    captions: Sequence[Caption],
    figures: Mapping[str, Mapping[str, Any]],
    drawn: Mapping[str, Mapping[str, np.ndarray]],
) -> SampleRow:
    pictures = [
        CaptionedImage(
            image=drawn[name]["image"][number],
            caption=name.capitalize(),
            note=f"{told['steps']} steps · {int(drawn[name]['right'][number].sum())}/{len(ATTRIBUTES)}",
        )
        for name, told in figures.items()
    ]
    return SampleRow(caption=captions[number].text, pictures=tuple(pictures))
