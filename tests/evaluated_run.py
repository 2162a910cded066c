"""Evaluations of the miniature in this process."""

import json
from pathlib import Path
from typing import Any

from in_process import in_process

from jobs.evaluation.evaluation import evaluate
from jobs.evaluation.settings import EvaluationSettings


def evaluate_in_process(settings: EvaluationSettings, out: Path) -> dict[str, Any]:
    """Evaluate into the folder `out`; returns the results as their file has them."""
    results = evaluate(
        settings,
        model="mini",
        out=str(out),
        start=lambda name, parents: ({"recipe": "test", "settings": "", "parents": parents}, lambda _: None),
        run=in_process,
    )
    return json.loads(json.dumps(results))
