"""A sampler's numbers are the schedule's own steps, and say so if one is changed."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from snapfusion.export.loop import CompiledModel, generate, sampling_steps
from snapfusion.export.sampler_coefficients import SamplerCoefficients, SamplerError
from snapfusion.sampling import guide, sample, time_grid
from snapfusion.schedule import Schedule

SCHEDULE = Schedule()


def steps_of(count, kind="v_prediction"):
    return SamplerCoefficients.of(SCHEDULE, grid=time_grid(count), prediction_type=kind, guidance=4.0)


def network(z_t, t, c):
    """Something that depends on all it is given, and not linearly."""
    return torch.tanh(z_t * c.mean(dim=(1, 2))[:, None, None, None] + t.reshape(-1, 1, 1, 1) / 1000.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("count", [1, 3, 8, 16, 50])
@pytest.mark.parametrize("at_a_time", [1, 2])
def test_the_loop_of_numbers_lands_where_the_samplers_own_loop_lands(kind, count, at_a_time):
    torch.manual_seed(0)
    noise, c, w = torch.randn(1, 4, 8, 8), torch.rand(2, 3, 5), 2.5

    def denoise(z_t, t):
        uncond, cond = network(z_t, t, c[:1]), network(z_t, t, c[1:])
        output = guide(cond=cond, uncond=uncond, w=w)
        return SCHEDULE.estimate(output, z_t=z_t, t=t, prediction_type=kind)

    wanted = sample(denoise, noise, grid=time_grid(count), schedule=SCHEDULE)
    programs = CompiledModel(
        text_encoder=lambda given: c.numpy()[given[0].ravel()],
        unet=lambda given: network(*(torch.from_numpy(array) for array in given)).numpy(),
        decoder=lambda given: given[0],
        conditions=at_a_time,
    )
    ids = np.array([[0], [1]], np.int32)
    landed = generate(programs, ids=ids, noise=noise.numpy(), steps=steps_of(count, kind), w=w)
    np.testing.assert_allclose(landed, wanted.numpy(), rtol=2e-5, atol=2e-5)


def test_each_moment_begins_where_the_last_one_landed_and_times_are_the_grids():
    programs = CompiledModel(
        text_encoder=None, unet=lambda given: given[2] * 0 + 1, decoder=None, conditions=2
    )
    c = np.zeros((2, 4, 8, 8), np.float32)
    moments = list(sampling_steps(programs, c=c, noise=np.ones((1, 4, 8, 8)), steps=steps_of(8), w=1.0))
    assert [moment.t for moment in moments] == list(time_grid(8)[:-1])
    for before, after in pairwise(moments):
        np.testing.assert_array_equal(before.z_next, after.z_t)


def test_numbers_survive_json_to_the_bit():
    steps = steps_of(8)
    assert SamplerCoefficients.parse(json.loads(json.dumps(steps.to_values()))) == steps


def changed(values, path, value):
    values = copy.deepcopy(values)
    values["steps"][path[0]][path[1]] = value
    return values


@pytest.mark.parametrize("name", ["from_z", "from_output", "alpha", "sigma", "alpha_next", "sigma_next"])
def test_a_changed_number_is_found_and_named(name):
    values = steps_of(8).to_values()
    wrong = changed(values, (3, name), values["steps"][3][name] + 1e-6)
    with pytest.raises(SamplerError, match="step 3 "):
        SamplerCoefficients.parse(wrong)


def test_two_coefficients_in_each_others_place_are_found():
    values = steps_of(8).to_values()
    first, second = values["steps"][1]["from_z"], values["steps"][2]["from_z"]
    swapped = changed(changed(values, (1, "from_z"), second), (2, "from_z"), first)
    with pytest.raises(SamplerError, match=r"step 1 \(t = 874\): from_z is"):
        SamplerCoefficients.parse(swapped)


def test_two_steps_in_each_others_place_are_found():
    values = steps_of(8).to_values()
    values["steps"][1], values["steps"][2] = values["steps"][2], values["steps"][1]
    with pytest.raises(SamplerError, match="step 0 lands at t = 874, the next begins at 749"):
        SamplerCoefficients.parse(values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": []}, "0 steps"),
        ({"prediction_type": "sample"}, "'sample'"),
        ({"guidance": None}, "cannot be read"),
        ({"steps": [{"t": 999}]}, "cannot be read"),
    ],
)
def test_what_is_no_sampler_is_refused(change, said):
    with pytest.raises(SamplerError, match=said):
        SamplerCoefficients.parse(steps_of(8).to_values() | change)
