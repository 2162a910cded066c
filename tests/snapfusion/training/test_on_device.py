"""On the device of --device: the CPU's values, and the same bits after a restart."""

import pytest
import torch
from conftest import tiny_bundle

from snapfusion.noise import gaussian_batch, noise_key
from snapfusion.sampling import sample, time_grid
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.checkpoint import CheckpointStore
from snapfusion.training.distillation_batch import OnlineTargets
from snapfusion.training.loop import new_state, train
from snapfusion.training.settings import CfgRange, LoopSettings, StepDistillationSettings
from snapfusion.training.step_distillation import StepDistillationObjective

pytestmark = pytest.mark.gpu

ROWS = 6
LOOP = LoopSettings(num_steps=4, global_batch=ROWS, learning_rate=1e-3, ema_decay=0.9)
STEPS = StepDistillationSettings(student_steps=4, cfg_range=CfgRange(low=2.0, high=6.0), cfg_probability=0.5)


@pytest.fixture
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device; --device=cpu runs it without one")
    return torch.device(name)


def bundle_on(device, *, seed=0):
    bundle = tiny_bundle(seed)
    bundle.prediction_type = "v_prediction"
    for network in (bundle.text_encoder, bundle.unet, bundle.vae):
        network.to(device)
    return bundle


def batches(bundle, start=0):
    for step in range(start, LOOP.num_steps):
        ids = tuple(f"{step}-{row}" for row in range(ROWS))
        latent = gaussian_batch([noise_key(row) for row in ids], (4, 8, 8))
        token_ids = bundle.tokenize(["red", "re"] * (ROWS // 2))
        yield Batch(ids=ids, columns={"latent": latent, "token_ids": token_ids})


def training(device, *, loop=LOOP):
    """A state, its objective, and the model that gives batches."""
    teacher = bundle_on(device)
    captions = CaptionEncoder(teacher)
    objective = StepDistillationObjective(
        STEPS,
        targets=OnlineTargets(teacher, captions=captions, settings=STEPS, seed=0),
        captions=captions,
        schedule=teacher.schedule,
        seed=0,
    )
    student = bundle_on(device, seed=3).unet.requires_grad_(requires_grad=True)
    return new_state(student, settings=loop), objective, teacher


def losses_of(device, *, loop=LOOP):
    state, objective, teacher = training(device, loop=loop)
    steps = []
    train(
        state,
        objective=objective,
        batches=batches(teacher),
        settings=loop,
        micro_batch=4,
        after_step=lambda step: steps.append((step.loss, step.grad_norm)),
    )
    return torch.tensor(steps)


def test_schedule_has_the_bits_of_the_cpu(device):
    schedule, t = tiny_bundle().schedule, torch.arange(-1, 1000)
    for table in (schedule.alpha, schedule.sigma):
        assert torch.equal(table(t.to(device)).cpu(), table(t))


def test_sampling_agrees_with_the_cpu(device):
    def latents(where):
        bundle = bundle_on(where)
        c = bundle.encode_text(bundle.tokenize(["red", "re"]))
        eps = gaussian_batch([1, 2], bundle.latent_shape).to(where)
        denoiser = bundle.denoiser(c, w=3.0, c_null=bundle.null_condition())
        with torch.no_grad():
            return sample(denoiser, eps, grid=time_grid(4), schedule=bundle.schedule).cpu()

    torch.testing.assert_close(latents(device), latents(torch.device("cpu")), rtol=1e-3, atol=1e-3)


def test_losses_and_gradients_agree_with_the_cpu(device):
    torch.testing.assert_close(losses_of(device), losses_of(torch.device("cpu")), rtol=1e-3, atol=1e-4)


def test_bfloat16_is_near_float32(device):
    reduced = LOOP.model_copy(update={"precision": "bfloat16"})
    torch.testing.assert_close(losses_of(device, loop=reduced), losses_of(device), rtol=0.1, atol=0.01)


def test_killed_and_resumed_training_is_identical(device, tmp_path):
    whole, objective, teacher = training(device)
    options = {"settings": LOOP, "micro_batch": 4}
    train(whole, objective=objective, batches=batches(teacher), **options)

    store, (state, objective, teacher) = CheckpointStore(str(tmp_path)), training(device)

    class Killed(Exception):
        """After two steps."""

    def save(step):
        store.save(step.step, tensors=state.tensors(), values=state.values())
        if step.step == 2:
            raise Killed

    with pytest.raises(Killed):
        train(state, objective=objective, batches=batches(teacher), after_step=save, **options)
    resumed, objective, teacher = training(device)
    saved = store.load(2)
    resumed.restore(saved.tensors, saved.values)
    train(resumed, objective=objective, batches=batches(teacher, start=2), **options)
    for group, tensors in whole.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(resumed.tensors()[group][name].cpu(), tensor.cpu()), (group, name)
