"""Modules of fixed shapes, and the gate that what is compiled of them is held to."""

import numpy as np
import pytest
import torch
from small_networks import LATENT, SCALING, small_decoder, small_vae

from snapfusion.export.modules import decoder_module
from snapfusion.export.parity import ParityError, check_parity


@pytest.fixture(scope="module")
def half():
    return small_decoder()


@pytest.fixture(scope="module")
def latents():
    return list(np.random.default_rng(0).standard_normal((4, 1, *LATENT), dtype=np.float32))


def test_decoder_takes_a_scaled_latent_and_gives_an_image_from_0_to_1(latents):
    vae = small_vae()
    module = decoder_module(vae, latent_shape=LATENT)
    with torch.no_grad():
        image = vae.decode(torch.from_numpy(latents[0]) / SCALING).sample
    assert (module.inputs[0].shape, module.outputs[0].shape) == ((1, 4, 8, 8), (1, 3, 16, 16))
    np.testing.assert_allclose(module.reference([latents[0]]), (image / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_half_decoder_differs_from_its_own_output_in_range_alone(half, latents):
    image = half.network.decode.decode(torch.from_numpy(latents[0]))
    np.testing.assert_allclose(half.reference([latents[0]]), image / 2 + 0.5, atol=1e-6)


def test_other_shapes_are_refused(half):
    with pytest.raises(ValueError, match=r"\(1, 4, 9, 8\).* given; .*\(1, 4, 8, 8\)"):
        half.reference([np.zeros((1, 4, 9, 8), np.float32)])


def test_the_gate_opens_at_its_limit_and_not_below():
    reference = np.ones((1, 1000), np.float32)
    # An error of 1 % of the peak is 40 dB.
    parity = check_parity(artifact="a", outputs=[reference + 0.01], references=[reference], limit_db=39.9)
    assert parity.psnr_db == pytest.approx(40.0, abs=1e-3)
    assert parity.max_abs_error == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(ParityError, match=r"a does not agree with torch: PSNR 40.00 dB .* 40.1 dB"):
        check_parity(artifact="a", outputs=[reference + 0.01], references=[reference], limit_db=40.1)


def test_the_worst_sample_decides():
    reference = np.ones((1, 10), np.float32)
    outputs = [reference] * 99 + [reference * 0.9]
    with pytest.raises(ParityError, match=r"20\.00 dB on sample 99 of 100"):
        check_parity(artifact="a", outputs=outputs, references=[reference] * 100)


def test_equal_outputs_have_no_finite_figure():
    reference = np.ones((1, 4), np.float32)
    parity = check_parity(artifact="a", outputs=[reference], references=[reference])
    assert (parity.psnr_db, parity.max_abs_error) == (None, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused(value):
    reference = np.ones((1, 4), np.float32)
    output = reference.copy()
    output[0, 1] = value
    with pytest.raises(ParityError, match="1 values that are not finite"):
        check_parity(artifact="a", outputs=[output], references=[reference])


@pytest.mark.parametrize("values", [[np.nan, 1.0], [0.0, 0.0]])
def test_a_reference_that_measures_nothing_is_refused(values):
    reference = np.array([values], np.float32)
    with pytest.raises(ValueError, match="not usable"):
        check_parity(artifact="a", outputs=[reference], references=[reference])


def test_no_samples_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        check_parity(artifact="a", outputs=[], references=[])
    with pytest.raises(ParityError, match="gives shapes"):
        check_parity(artifact="a", outputs=[np.ones((1, 3))], references=[np.ones((1, 4))])
