"""Modules of fixed shapes, and the parity check of their compiled outputs."""

import numpy as np
import pytest
import torch
from small_networks import LATENT, SCALING, small_decoder, small_vae

from snapfusion.export.modules import decoder_module
from snapfusion.export.parity import ParityError, check_parity

ONES = np.ones((1, 1000), np.float32)


@pytest.fixture(scope="module")
def latent():
    return np.random.default_rng(0).standard_normal((1, *LATENT), dtype=np.float32)


def check(*outputs, reference=ONES, **limit):
    return check_parity(artifact="a", outputs=outputs, references=[reference] * len(outputs), **limit)


def test_full_decoder_takes_a_scaled_latent(latent):
    vae = small_vae()
    module = decoder_module(vae, latent_shape=LATENT)
    with torch.no_grad():
        image = vae.decode(torch.from_numpy(latent) / SCALING).sample
    assert (module.inputs[0].shape, module.outputs[0].shape) == ((1, 4, 8, 8), (1, 3, 16, 16))
    np.testing.assert_allclose(module.reference([latent]), (image / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_half_decoder_outputs_0_to_1(latent):
    half = small_decoder()
    image = half.network.decode.decode(torch.from_numpy(latent))
    np.testing.assert_allclose(half.reference([latent]), image / 2 + 0.5, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(1, 4, 9, 8\).* given; .*\(1, 4, 8, 8\)"):
        half.reference([np.zeros((1, 4, 9, 8), np.float32)])


def test_limit_is_inclusive_of_higher_psnr_only():
    # An error of 1 % of the peak is 40 dB.
    parity = check(ONES + 0.01, limit_db=39.9)
    assert parity.psnr_db == pytest.approx(40.0, abs=1e-3)
    assert parity.max_abs_error == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(ParityError, match=r"a does not agree with torch: PSNR 40.00 dB .* 40.1 dB"):
        check(ONES + 0.01, limit_db=40.1)


def test_the_worst_sample_decides():
    with pytest.raises(ParityError, match=r"20\.00 dB on sample 99 of 100"):
        check(*[ONES] * 99, ONES * 0.9)


def test_equal_outputs_have_no_finite_psnr():
    parity = check(ONES)
    assert (parity.psnr_db, parity.max_abs_error) == (None, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_outputs_are_refused(value):
    output = ONES.copy()
    output[0, 1] = value
    with pytest.raises(ParityError, match="1 values that are not finite"):
        check(output)


@pytest.mark.parametrize("values", [[np.nan, 1.0], [0.0, 0.0]])
def test_unusable_references_are_refused(values):
    reference = np.array([values], np.float32)
    with pytest.raises(ValueError, match="not usable"):
        check(reference, reference=reference)


def test_missing_samples_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        check_parity(artifact="a", outputs=[], references=[])
    with pytest.raises(ParityError, match="gives shapes"):
        check(np.ones((1, 3)))
