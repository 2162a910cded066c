"""Sampler coefficients equal the schedule's own steps, and altered ones are refused."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from snapfusion.export.loop import CompiledModel, generate, sampling_steps
from snapfusion.export.sampler_coefficients import SamplerCoefficients
from snapfusion.noise import step_noise
from snapfusion.sampling import guide, sample, time_grid
from snapfusion.schedule import Schedule
from snapfusion.settings import SettingsError

SCHEDULE = Schedule()


def sampler_of(count, kind="v_prediction", solver="ddim"):
    kinds = {"prediction_type": kind, "solver": solver}
    return SamplerCoefficients.of(SCHEDULE, grid=time_grid(count), guidance=4.0, **kinds)


@pytest.fixture
def values():
    return sampler_of(8).to_values()


def network(z_t, t, c):
    """A nonlinear function of all inputs."""
    return torch.tanh(z_t * c.mean(dim=(1, 2))[:, None, None, None] + t.reshape(-1, 1, 1, 1) / 1000.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("count", [1, 3, 8, 16, 50])
@pytest.mark.parametrize(("conditions", "solver"), [(1, "ddim"), (2, "ddim"), (2, "consistency")])
def test_loop_equals_the_samplers_own(kind, count, conditions, solver):
    torch.manual_seed(0)
    noise, c, w = torch.randn(1, 4, 8, 8), torch.rand(2, 3, 5), 2.5

    def denoise(z_t, t):
        uncond, cond = network(z_t, t, c[:1]), network(z_t, t, c[1:])
        output = guide(cond=cond, uncond=uncond, w=w)
        return SCHEDULE.estimate(output, z_t=z_t, t=t, prediction_type=kind)

    fresh = step_noise([7], (4, 8, 8), device=noise.device)
    kinds = {"solver": solver, "noise": fresh}
    expected = sample(denoise, noise, grid=time_grid(count), schedule=SCHEDULE, **kinds)
    model = CompiledModel(
        text_encoder=lambda inputs: c.numpy()[inputs[0].ravel()],
        unet=lambda inputs: network(*map(torch.from_numpy, inputs)).numpy(),
        decoder=lambda inputs: inputs[0],
        conditions=conditions,
    )
    ids = np.array([[0], [1]], np.int32)
    sampler, noises = sampler_of(count, kind, solver), {"fresh_noise": lambda t: fresh(t).numpy()}
    image = generate(model, ids=ids, noise=noise.numpy(), sampler=sampler, w=w, **noises)
    np.testing.assert_allclose(image, expected.numpy(), rtol=2e-5, atol=2e-5)


def test_consecutive_steps_share_their_latent():
    model = CompiledModel(text_encoder=None, unet=lambda ports: ports[2] * 0 + 1, decoder=None, conditions=2)
    c = np.zeros((2, 4, 8, 8), np.float32)
    steps = list(sampling_steps(model, c=c, noise=np.ones((1, 4, 8, 8)), sampler=sampler_of(8), w=1.0))
    assert [step.t for step in steps] == list(time_grid(8)[:-1])
    for step, following in pairwise(steps):
        np.testing.assert_array_equal(step.z_next, following.z_t)


@pytest.mark.parametrize("solver", ["ddim", "consistency"])
def test_coefficients_survive_json(solver):
    sampler = sampler_of(8, solver=solver)
    assert SamplerCoefficients.parse(json.loads(json.dumps(sampler.to_values()))) == sampler


def test_noise_is_needed_where_a_step_adds_some():
    model = CompiledModel(text_encoder=None, unet=lambda ports: ports[2], decoder=None, conditions=2)
    c, sampler = np.zeros((2, 4, 8, 8), np.float32), sampler_of(2, solver="consistency")
    with pytest.raises(ValueError, match="the step at t = 999 adds noise, and none is given"):
        list(sampling_steps(model, c=c, noise=np.ones((1, 4, 8, 8)), sampler=sampler, w=1.0))


def test_ddim_has_no_coefficients_of_noise(values):
    """So its bundles stay what earlier versions read."""
    assert values.keys() == {"steps", "prediction_type", "guidance"}
    assert "from_noise" not in values["steps"][0]
    noisy = sampler_of(8, solver="consistency").to_values()
    assert noisy["steps"][0]["from_noise"] == noisy["steps"][0]["sigma_next"]
    with pytest.raises(SettingsError, match=r"step 0 \(t = 999\): from_z is"):
        SamplerCoefficients.parse(noisy | {"solver": "ddim"})
    noisy["steps"][3]["from_noise"] += 1e-6
    with pytest.raises(SettingsError, match=r"step 3 .*from_noise"):
        SamplerCoefficients.parse(noisy)


@pytest.mark.parametrize("name", ["from_z", "from_output", "alpha", "sigma", "alpha_next", "sigma_next"])
def test_an_altered_number_is_named(values, name):
    values["steps"][3][name] += 1e-6
    with pytest.raises(SettingsError, match="step 3 "):
        SamplerCoefficients.parse(values)


def test_swapped_coefficients_and_steps_are_refused(values):
    first, second = values["steps"][1:3]
    swapped = [first | {"from_z": second["from_z"]}, second | {"from_z": first["from_z"]}]
    for steps, message in (
        (swapped, r"step 1 \(t = 874\): from_z is"),
        ([second, first], "step 0 .*874.*749"),
    ):
        values["steps"][1:3] = steps
        with pytest.raises(SettingsError, match=message):
            SamplerCoefficients.parse(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "steps: .*at least 1"),
        ({"prediction_type": "sample"}, "'sample'"),
        ({"guidance": None}, "guidance: .*None"),
        ({"steps": [{"t": 999}]}, r"steps\.0\.\w+: Field required"),
    ],
)
def test_malformed_samplers_are_refused(values, change, message):
    with pytest.raises(SettingsError, match=message):
        SamplerCoefficients.parse(values | change)
