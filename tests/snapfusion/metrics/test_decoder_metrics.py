"""PSNR against closed forms, and alternating timing of decoders."""

import math
from types import SimpleNamespace

import pytest
import torch

from snapfusion.metrics import decoder as metrics
from snapfusion.training.batch import Batch


def batch_of(rows):
    return Batch(ids=tuple(map(str, range(rows))), columns={"latent": torch.zeros(rows, 4, 2, 2)})


def test_psnr_of_a_known_error():
    batches = [batch_of(2), batch_of(3)]
    measured = metrics.fidelity(
        lambda latent: torch.full((len(latent), 3, 4, 4), 0.02),
        batches,
        teacher_images=lambda batch: torch.zeros(len(batch), 3, 4, 4),
    )
    assert measured.rows == 5
    assert measured.psnr_db == pytest.approx(20 * math.log10(2 / 0.02))


def test_psnr_of_equal_images_and_of_none():
    images = {"student": lambda latent: latent[:, :3], "teacher_images": lambda batch: batch["latent"][:, :3]}
    assert metrics.fidelity(batches=[batch_of(2)], **images).psnr_db == math.inf
    with pytest.raises(ValueError, match="no held-out row"):
        metrics.fidelity(batches=[], **images)


def test_decoders_are_timed_alternately(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def decoder(name, seconds):
        def decode(latent):
            calls.append((name, len(latent)))
            clock[0] += seconds

        return decode

    small, large = metrics.decode_times(
        teacher=decoder("teacher", 0.02),
        student=decoder("student", 0.005),
        latents=torch.zeros(3, 4, 2, 2),
        batches=(1, 8),
        repeats=2,
    )
    assert calls == [("teacher", 1), ("student", 1)] * 3 + [("teacher", 8), ("student", 8)] * 3
    assert small.ratio == pytest.approx(4.0)
    assert (small.teacher_ms, large.teacher_ms) == pytest.approx((20.0, 2.5))
