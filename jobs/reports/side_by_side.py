"""Compares a student with its teacher and its initial weights on the same captions and noise.

For the report of a run whose images the miniature's metric networks can score. Captions are of held-out
scenes, and the noise is that of `jobs.evaluate`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from jobs.evaluation.settings import PromptSettings
from jobs.reports.input_states import model_state
from jobs.reports.metric_names import scorer_name
from jobs.reports.part_cache import PartCache
from jobs.reports.run_page import CaptionedImage, ModelMetrics, SampleRow, StepComparison
from jobs.training.metrics import StudentMetrics
from pipelines.sources.captions import Caption
from pipelines.stages.settings import Device, MetricSettings, Sampler, SamplingSettings
from snapfusion.metrics.intervals import mean
from snapfusion.mini.vocabulary import ATTRIBUTES

GUIDANCE = 6.0
"""The upper end of the range that the miniature's students are distilled for, where few steps differ most."""

NUM_CAPTIONS = 64
_NUM_ROWS = 12
TEACHER_STEPS = 50
_SAMPLING = SamplingSettings()
_METRICS = MetricSettings()

_Compared = tuple[StepComparison, dict[str, Any]]
_FORM: TypeAdapter[_Compared] = TypeAdapter(_Compared)


def sample_side_by_side(
    student: StudentMetrics, *, url: str, cache: PartCache
) -> tuple[StepComparison, dict[str, Any]]:
    """The images and metrics for the page, and the metrics as JSON values.

    Args:
        student: its metrics.json.
        url: of its folder.
        cache: that keeps them.
    """
    steps, parents = student["distillation"]["steps"], student["parents"]
    models = {
        "teacher": (parents["teacher"]["source"], TEACHER_STEPS),
        "undistilled": (parents["student"]["source"], steps),
        "student": (f"{url}/model", steps),
    }
    return cache.part(
        "student",
        _FORM,
        follows_from={
            "models": [[source, model_state(source), steps] for source, steps in models.values()],
            "student": student,
            "captions": [NUM_CAPTIONS, _NUM_ROWS],
            "guidance": GUIDANCE,
            "sampling": _SAMPLING.to_values(),
            "metrics": _METRICS.to_values(),
        },
        compute=lambda: _compare(models),
    )


def _compare(models: Mapping[str, tuple[str, int]]) -> _Compared:
    captions, scores = _sample(models)
    metrics = {
        name: ModelMetrics(name=name, steps=num_steps, **_metrics(scores[name], teacher=scores["teacher"]))
        for name, (_, num_steps) in models.items()
    }
    comparison = StepComparison(
        guidance=GUIDANCE,
        num_captions=len(captions),
        scorer=scorer_name(_METRICS.scorer.network),
        models=tuple(metrics.values()),
        rows=tuple(
            SampleRow(
                caption=caption.text,
                images=tuple(_image(metrics[name], scores[name], row) for name in models),
            )
            for row, caption in enumerate(captions[:_NUM_ROWS])
        ),
    )
    ways = {name: {"model": model, **vars(metrics[name])} for name, (model, _) in models.items()}
    for way in ways.values():
        del way["name"]
    return comparison, {
        "guidance": GUIDANCE,
        "captions": len(captions),
        "seed": _SAMPLING.seed,
        "ways": ways,
        "scorer": _METRICS.scorer.network,
        "clip_gain": mean(scores["student"]["clip"] - scores["undistilled"]["clip"])._asdict(),
    }


def _sample(
    models: Mapping[str, tuple[str, int]],
) -> tuple[list[Caption], dict[str, dict[str, np.ndarray]]]:
    """The captions, and the images and scores of each model."""
    # Imported here, because a report of kept parts does without torch.
    from jobs.evaluation.captions import captions_of
    from pipelines.stages.sample import SampleAndScore
    from snapfusion.noise import noise_key

    captions = [row for row in captions_of(PromptSettings(limit=NUM_CAPTIONS)) if isinstance(row, Caption)]
    # The keys of `jobs.evaluate`: equal captions have equal noise in the report and in an evaluation.
    keys = [noise_key("evaluation", _SAMPLING.seed, caption.id) for caption in captions]
    scores = {}
    for name, (model, num_steps) in models.items():
        stage = SampleAndScore(
            model=model,
            sampler=Sampler(steps=num_steps),
            sampling=_SAMPLING,
            metrics=_METRICS,
            device=Device(),
        )
        scores[name] = stage.sample_and_score([caption.text for caption in captions], keys, w=GUIDANCE)
    return captions, scores


def _metrics(scores: Mapping[str, np.ndarray], *, teacher: Mapping[str, np.ndarray]) -> dict[str, float]:
    difference = scores["image"].astype(np.float64) - teacher["image"]
    return {
        "attributes_right": float(scores["right"].mean()),
        "all_attributes_right": float(scores["right"].all(axis=1).mean()),
        "clip": float(scores["clip"].mean()),
        "distance": float(np.sqrt((difference**2).mean())),
    }


def _image(model: ModelMetrics, scores: Mapping[str, np.ndarray], index: int) -> CaptionedImage:
    correct = int(scores["right"][index].sum())
    return CaptionedImage(
        image=scores["image"][index],
        caption=model.name.capitalize(),
        note=f"{model.steps} steps · {correct}/{len(ATTRIBUTES)}",
    )
