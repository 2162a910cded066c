"""PSNR against arithmetic by hand, and decoders timed in turns."""

import math
import time

import pytest
import torch

from snapfusion.metrics.decoder import decode_times, fidelity
from snapfusion.training.batch import Batch


def batch_of(rows):
    return Batch(ids=tuple(map(str, range(rows))), columns={"latent": torch.zeros(rows, 4, 2, 2)})


def test_psnr_of_a_known_error():
    batches = [batch_of(2), batch_of(3)]
    measured = fidelity(
        lambda latent: torch.full((len(latent), 3, 4, 4), 0.02),
        batches,
        teacher_images=lambda batch: torch.zeros(len(batch), 3, 4, 4),
    )
    assert measured.rows == 5
    assert measured.psnr_db == pytest.approx(20 * math.log10(2 / 0.02))


def test_psnr_of_equal_images_is_infinite_and_of_none_an_error():
    def image(latent):
        return latent[:, :3]

    def teacher(batch):
        return batch["latent"][:, :3]

    assert fidelity(image, [batch_of(2)], teacher_images=teacher).psnr_db == math.inf
    with pytest.raises(ValueError, match="no held-out row"):
        fidelity(image, [], teacher_images=teacher)


def test_decoders_are_timed_in_turns():
    calls = []

    def decoder(name, seconds):
        def decode(latent):
            calls.append((name, len(latent)))
            time.sleep(seconds)
            return latent

        return decode

    small, large = decode_times(
        teacher=decoder("teacher", 0.02),
        student=decoder("student", 0.005),
        latents=torch.zeros(3, 4, 2, 2),
        batches=(1, 8),
        repeats=2,
    )
    assert calls == [("teacher", 1), ("student", 1)] * 3 + [("teacher", 8), ("student", 8)] * 3
    assert 2.0 < small.ratio < 5.0
    assert small.teacher_ms == pytest.approx(8 * large.teacher_ms, rel=0.5)
