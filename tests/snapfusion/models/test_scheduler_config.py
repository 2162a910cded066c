"""Scheduler configurations as published: obeyed, or refused by the name of the field."""

import diffusers
import pytest
import torch

from snapfusion.models.errors import ModelError
from snapfusion.models.scheduler_config import read_scheduler
from snapfusion.schedule import Schedule

PUBLISHED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = [
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]


def read(**fields: object) -> tuple[Schedule, str]:
    """Read the published configuration with other fields."""
    return read_scheduler(PUBLISHED | fields, source="model")


@pytest.mark.parametrize("name", CLASSES)
def test_published_schedule_is_obeyed(name):
    schedule, kind = read(_class_name=name, prediction_type="v_prediction", num_train_timesteps=500)
    stock = getattr(diffusers, name).from_config({**PUBLISHED, "num_train_timesteps": 500})
    alpha_bar = schedule.alpha(torch.arange(500)).flatten() ** 2
    torch.testing.assert_close(alpha_bar, stock.alphas_cumprod, atol=1e-6, rtol=0)
    assert (schedule.num_steps, kind) == (500, "v_prediction")


def test_defaults_are_those_of_the_class():
    schedule, kind = read_scheduler({"_class_name": "LCMScheduler"}, source="model")
    assert (schedule, kind) == (Schedule(), "epsilon")


def test_other_betas_are_read():
    schedule, _ = read(beta_start=0.001, beta_end=0.01)
    assert (schedule.beta_start, schedule.beta_end) == (0.001, 0.01)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type is 'sample'; epsilon or v_prediction"),
        ({"beta_schedule": "linear"}, "beta_schedule 'linear' is another noise schedule"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2' is another"),
        ({"trained_betas": [0.0001 + 0.00002 * n for n in range(1000)]}, "trained_betas is another"),
    ],
)
def test_other_schedules_are_refused(name, changed, message):
    with pytest.raises(ModelError, match=message):
        read(_class_name=name, **changed)


def test_trained_betas_of_the_same_schedule_are_accepted():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert read(trained_betas=betas.tolist())[0] == Schedule()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is on; zero terminal SNR"),
        ({"thresholding": True}, "thresholding is on"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "has no betas"),
        ({"_class_name": "AutoencoderKL"}, "is not a scheduler"),
        ({"_class_name": "NoSuchScheduler"}, "is not a scheduler"),
        ({"beta_schedule": "no_such"}, "configuration is invalid"),
        ({"beta_end": 2.0}, "betas are invalid"),
        ({"num_train_timesteps": "many"}, "is invalid"),
    ],
)
def test_unusable_schedulers_are_refused(changed, message):
    with pytest.raises(ModelError, match=message):
        read(**changed)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps_offset": 1},
        {"clip_sample": True},
        {"set_alpha_to_one": False},
        {"timestep_spacing": "leading"},
    ],
)
def test_fields_of_sampling_do_not_matter(fields):
    assert read(**fields) == (Schedule(), "epsilon")
