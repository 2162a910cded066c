"""Committed parts of a run to report, and its report."""

import json
from pathlib import Path

from in_process import in_process

from jobs import report
from pipelines.datasets.pairs import generate_pairs
from pipelines.datasets.settings import PairsSettings
from pipelines.sources.captions import Caption
from pipelines.stages.settings import Generation
from snapfusion.mini.scenes import caption_of, scene_of
from snapfusion.models.load import load
from snapfusion.models.save import save

CAPTIONS = [Caption(id=f"{n:03d}", ordinal=n, text=caption_of(scene_of(97 * n))) for n in range(8)]


def make_pairs(out: Path, *, guidance: float = 2.0, captions: list[Caption] = CAPTIONS) -> None:
    generation = Generation(steps=4, guidance=guidance, batch_size=8)
    generate_pairs(
        PairsSettings(generation=generation),
        teacher="mini",
        captions=captions,
        source="captions",
        url=str(out / "pairs"),
        run=in_process,
    )


def reported(out: Path, *options: str, code: int = 0) -> tuple[str, dict]:
    """The page and the metrics of a report."""
    assert report.main(["--out", str(out), *options]) == code
    return (out / "report" / "index.html").read_text(), json.loads((out / "metrics.json").read_text())


def make_student(out: Path, *, initial: str = "mini-v") -> None:
    """A folder as `jobs.distill_steps` leaves it, of a student that was not trained."""
    distillation, models = {"steps": 4, "teacher_steps": 8}, {"teacher": "mini-v", "student": initial}
    save(load(initial), out / "student" / "model", distillation=distillation)
    metrics = {
        "distillation": distillation,
        "parents": {
            role: {"source": source, "weights": load(source).fingerprint()} for role, source in models.items()
        },
        "settings": {"targets": "online"},
        "settings_hash": "5" * 64,
        "curve": [
            {"step": 1, "vanilla/loss": 0.5},
            {"step": 2, "vanilla/loss": 0.4, "guided/loss": 2.0},
            {"step": 3, "guided/loss": 1.0},
        ],
    }
    (out / "student" / "metrics.json").write_text(json.dumps(metrics))
