"""Settings that tests of TARGETS share."""

from __future__ import annotations

from pipelines.stages.target import Teaching
from pipelines.targets import Targets
from snapfusion.training.draws import CfgRange

SETTINGS = Targets(
    teaching=Teaching(
        student_steps=4, k=2, cfg_range=CfgRange(low=1.0, high=6.0), caption_dropout=0.3, batch_size=3, seed=7
    ),
    draws=2,
    cfg_probability=0.5,
)
"""Each unit of LATENTS once vanilla and once guided."""
