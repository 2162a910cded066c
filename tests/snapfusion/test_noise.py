"""Noise keyed by row, against an independent Philox and Python's inverse normal CDF."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snapfusion.noise import gaussian, gaussian_batch, noise_key, step_noise, uniform

PARTS = st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=4)


def philox_4x64_10(counter: int, key: int) -> list[int]:
    """Ten rounds of Philox (Salmon et al. 2011, Sec. 3.3): 256 bits of counter to four 64-bit words."""
    mask = 2**64 - 1
    c = [(counter >> 64 * i) & mask for i in range(4)]
    k = [key & mask, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k[0], second & mask, (first >> 64) ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def oracle(key: int, count: int) -> np.ndarray:
    words = [word for block in range(-(-count // 4)) for word in philox_4x64_10(block + 1, key)]
    return np.array([NormalDist().inv_cdf(((word >> 11) + 0.5) / 2**53) for word in words[:count]])


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, noise_key(0, "000000012", 3)])
def test_gaussians_match_the_oracle(key):
    noise = gaussian(key, (2, 3, 5))
    assert (noise.dtype, noise.shape) == (torch.float32, (2, 3, 5))
    np.testing.assert_allclose(noise.double().numpy().ravel(), oracle(key, 30), rtol=1e-6, atol=1e-7)


def test_golden_values():
    # Every committed table holds noise keys: after a change their rows could not be computed again.
    assert noise_key(0) == 5621864261735219286
    assert noise_key(0, "a large red circle", 1) == 6441637940159881642
    expected = [0.9161204695701599, -0.8806796073913574, 1.1154016256332397, -0.2673977315425873]
    assert gaussian(42, (4,)).tolist() == expected


def test_row_is_independent_of_its_batch():
    keys = [noise_key("seed", row, 0) for row in range(5)]
    batch = gaussian_batch(keys, (4, 8, 8))
    backwards = gaussian_batch(keys[::-1], (4, 8, 8))
    for row, key in enumerate(keys):
        assert torch.equal(batch[row], gaussian(key, (4, 8, 8)))
        assert torch.equal(batch[row], backwards[len(keys) - 1 - row])


def test_noise_leaves_global_generators_alone():
    before = torch.random.get_rng_state()
    gaussian(7, (4, 8, 8))
    assert torch.equal(before, torch.random.get_rng_state())


def test_distribution_over_keys_is_normal():
    draws = gaussian_batch([noise_key("moments", row) for row in range(4000)], (4, 8, 8)).double().flatten()
    n = draws.numel()
    assert abs(draws.mean()) < 4 / n**0.5
    assert abs(draws.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / n) ** 0.5
    # Kolmogorov-Smirnov: sqrt(n) D exceeds 1.95 once in a thousand times.
    cdf = torch.special.ndtr(draws.sort().values)
    ranks = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((cdf - ranks / n).max(), ((ranks + 1) / n - cdf).max())
    assert n**0.5 * distance < 1.95


def test_neighbouring_keys_are_uncorrelated():
    rows = gaussian_batch(range(200), (4, 16, 16)).double().flatten(1)
    correlations = torch.corrcoef(rows) - torch.eye(len(rows), dtype=torch.float64)
    # 19,900 pairs of 1,024 draws: the largest of so many normals lies near 4.1 standard deviations.
    assert correlations.abs().max() * 1024**0.5 < 5.5


@given(PARTS)
@settings(max_examples=200, deadline=None)  # the machine may be busy
def test_key_fits_a_signed_int64(parts):
    assert 0 <= noise_key(*parts) < 2**63


def test_keys_of_different_parts_differ():
    texts = [("a", "b"), ("ab",), ('a", "b',), ("a\x1fb",), ("",), ("", "")]
    numbers = [(1, 2), ("1", 2), (12,), ("12",), (2, 1)]
    assert len({noise_key(*parts) for parts in (*texts, *numbers)}) == 11


def test_key_without_parts_fails():
    with pytest.raises(ValueError, match="at least one part"):
        noise_key()


def test_key_of_a_numpy_integer_fails():
    with pytest.raises(TypeError):
        noise_key(np.int64(3))


def test_uniform_is_open_at_both_ends():
    values = uniform(3, 100_000)
    assert values.dtype == np.float64
    assert 0 < values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1


def test_step_noise_follows_from_key_and_time():
    noise = step_noise([3, 5], (4, 2, 2), device=torch.device("cpu"))
    assert torch.equal(noise(499)[1], gaussian(noise_key("step", 5, 499), (4, 2, 2)))
    assert torch.equal(noise(499)[1], step_noise([5], (4, 2, 2), device=torch.device("cpu"))(499)[0])
    assert len({float(noise(t)[row, 0, 0, 0]) for t in (499, 249) for row in (0, 1)}) == 4
    assert torch.equal(noise(499), noise(499))
