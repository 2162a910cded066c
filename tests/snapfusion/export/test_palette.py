"""Palettes of weights are near-optimal quantizers."""

import numpy as np
import pytest

from snapfusion.export.palette import palettize


def snr_db(weights, bits):
    table, indices = palettize(weights, bits=bits)
    assert (table.dtype, table.shape, indices.dtype) == (np.float16, (2**bits,), np.uint8)
    error = table[indices].astype(float) - weights.ravel().astype(float)
    return 10 * np.log10(np.mean(weights.astype(float) ** 2) / np.mean(error**2))


# Lloyd-Max quantizers of a Gaussian: sqrt(3) pi / 2 / 4^bits of the variance, for many levels.
@pytest.mark.parametrize(("bits", "optimum"), [(4, 20.22), (6, 31.8), (8, 43.8)])
def test_gaussian_weights_reach_the_optimal_snr(bits, optimum):
    weights = np.random.default_rng(0).standard_normal((256, 64, 3, 3)).astype(np.float16)
    assert snr_db(weights, bits) == pytest.approx(optimum, abs=0.2)


def test_each_weight_has_the_nearest_value():
    weights = np.random.default_rng(0).standard_t(3, size=5000).astype(np.float16)
    table, indices = palettize(weights, bits=6)
    nearest = np.abs(weights[:, None].astype(float) - table.astype(float)).min(axis=1)
    np.testing.assert_array_equal(np.abs(weights.astype(float) - table[indices].astype(float)), nearest)


def test_a_causal_mask_is_exact():
    mask = np.triu(np.full((77, 77), -1e4), 1).astype(np.float16)
    table, indices = palettize(mask, bits=6)
    np.testing.assert_array_equal(table[indices].reshape(mask.shape), mask)
    assert np.count_nonzero(table) == 1


def test_a_few_large_weights_are_represented():
    random = np.random.default_rng(0)
    wide = random.random(50_000) < 0.01
    weights = np.where(wide, 1.0, 0.01) * random.standard_normal(50_000)
    # The optimum, by dynamic programming over the sorted values, is 32.2 dB; equal steps would give 21.
    assert snr_db(weights.astype(np.float16), 6) > 30
