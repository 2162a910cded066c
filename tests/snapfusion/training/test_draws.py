"""Interval and guidance of a row: uniform, independent of the noise, fixed by its key."""

import numpy as np
import pytest
import torch

from snapfusion.noise import gaussian
from snapfusion.sampling import CLEAN, time_grid
from snapfusion.schedule import Schedule
from snapfusion.settings import SettingsError
from snapfusion.training.draws import draw_guidance, draw_intervals, interval_ends, row_key
from snapfusion.training.settings import CfgRange

KEYS = [row_key(0, f"web/{n}", 0) for n in range(4000)]


def test_golden_draws():
    keys = [row_key(3, "web/00000/0000007", draw) for draw in range(4)]
    assert draw_intervals(keys, student_steps=8).tolist() == [3, 6, 0, 6]
    guidance = draw_guidance(keys, cfg_range=CfgRange(low=1.0, high=6.0))
    assert guidance.dtype == torch.float32
    assert [round(w, 4) for w in guidance.tolist()] == [1.0629, 4.6645, 1.2113, 2.4867]


@pytest.mark.parametrize("steps", [1, 4, 8, 16])
def test_intervals_are_uniform(steps):
    counts = np.bincount(draw_intervals(KEYS, student_steps=steps), minlength=steps)
    assert len(counts) == steps
    expected = len(KEYS) / steps
    assert float(((counts - expected) ** 2 / expected).sum()) < 2.5 * max(steps, 4)  # chi squared


def test_guidance_is_uniform_in_its_range():
    draws = draw_guidance(KEYS, cfg_range=CfgRange(low=2.0, high=14.0)).numpy()
    assert draws.min() >= 2.0
    assert draws.max() <= 14.0
    np.testing.assert_allclose(np.quantile(draws, [0.25, 0.5, 0.75]), [5.0, 8.0, 11.0], atol=0.4)


def test_draws_and_noise_are_uncorrelated():
    intervals, guidance = draw_intervals(KEYS, student_steps=8), draw_guidance(KEYS, cfg_range=CfgRange())
    noise = torch.cat([gaussian(key, (1,)) for key in KEYS])
    off_diagonal = np.corrcoef(torch.stack([intervals, guidance, noise]))[np.triu_indices(3, 1)]
    assert np.abs(off_diagonal).max() < 4 / len(KEYS) ** 0.5


def test_key_depends_on_seed_row_and_draw():
    assert len({row_key(0, "a", 0), row_key(1, "a", 0), row_key(0, "b", 0), row_key(0, "a", 1)}) == 4


def test_interval_ends_follow_the_grid():
    t, t2 = interval_ends(torch.arange(8), student_steps=8, schedule=Schedule())
    assert [*t.tolist(), CLEAN] == [t.tolist()[0], *t2.tolist()] == list(time_grid(8))


@pytest.mark.parametrize("values", [{"low": 3.0, "high": 2.0}, {"low": 0.5}, {"high": float("inf")}])
def test_invalid_range_fails(values):
    with pytest.raises((SettingsError, ValueError)):
        CfgRange.parse(values)
