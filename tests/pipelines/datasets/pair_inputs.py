"""Captions and settings that tests of PAIRS share."""

from pipelines.datasets.settings import PairsSettings
from pipelines.sources.captions import Caption
from pipelines.stages.settings import Generation

CAPTIONS = [Caption(id=f"c{n}", ordinal=n, text=f"a red thing, number {n}") for n in range(10)]
SETTINGS = PairsSettings(generation=Generation(steps=4, guidance=2.0, batch_size=3, seed=7), rows_per_unit=4)
