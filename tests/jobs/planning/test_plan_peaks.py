"""Memory that the plan forecasts for a training beside the peak of its tensors, and costs of adapters."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from workloads import workload

from jobs.training.lora_costs import lora_costs
from snapfusion.models.activation_memory import _LiveBytes
from snapfusion.models.cost import count_parameters
from snapfusion.models.gan_head import head_for
from snapfusion.models.load import load
from snapfusion.models.unet import architecture_of
from snapfusion.training.batch import Batch
from snapfusion.training.captions import CaptionEncoder
from snapfusion.training.distillation_batch import OnlineTargets
from snapfusion.training.dmd2 import FAKE_SCORE, GAN_HEAD, Dmd2Objective
from snapfusion.training.loop import AnyObjective, new_state, train
from snapfusion.training.lora import LoraUNet
from snapfusion.training.pcm import PcmObjective
from snapfusion.training.settings import LoraSettings, NetworkSettings
from snapfusion.training.state import TrainState

ROWS = 4
SHARED = (
    *("distill.teacher=mini-v", "distill.student=mini-v", "distill.loop.num_steps=4"),
    *(f"distill.trainer.micro_batch={ROWS}", f"distill.loop.global_batch={ROWS}"),
    *("distill.trainer.num_workers=1", "distill.loop.ema_decay=0.9"),
)
PCM = 'distill.consistency={"method": "pcm"}'
CASES = {
    "all weights": (PCM,),
    "adapter": (PCM, 'distill.lora={"rank": 16}'),
    "third UNet": ('distill.dmd2={"fake_updates": 1}',),
}


@dataclass
class Trained:
    """A training of the miniature, and all modules that it holds."""

    state: TrainState
    objective: AnyObjective
    modules: list


def assembled(distill) -> Trained:
    teacher, student = load("mini-v"), load("mini-v")
    captions, others = CaptionEncoder(teacher), {}
    model = student.unet.requires_grad_(requires_grad=True)
    if distill.lora is not None:
        model = LoraUNet(model, distill.lora, seed=0)
    if distill.dmd2 is not None:
        fake = load("mini-v").unet.requires_grad_(requires_grad=True)
        settings = NetworkSettings(learning_rate=1e-5)
        others = {FAKE_SCORE: (fake, settings), GAN_HEAD: (head_for(fake, seed=0), settings)}
        objective = Dmd2Objective(distill.dmd2, teacher=teacher, captions=captions, seed=0)
    else:
        targets = OnlineTargets(teacher, captions=captions, settings=distill.targets_settings, seed=0)
        objective = PcmObjective(distill.consistency, targets=targets, schedule=teacher.schedule)
    state = new_state(model, settings=distill.loop, others=others)
    frozen = [teacher.unet, teacher.text_encoder, teacher.vae, student.unet]
    return Trained(state, objective, [*frozen, model, *(network for network, _ in others.values())])


def storages(trained: Trained) -> dict[int, int]:
    """Bytes of the weights, buffers and averages that are there before the first step."""
    tensors = [one for module in trained.modules for one in (*module.parameters(), *module.buffers())]
    for network in trained.state.networks.values():
        tensors += network.ema.averages.values() if network.ema else ()
    return {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_forecast_holds_the_peak_of_a_training(case):
    """Two cycles of turns, the second with all moments; the plan adds a fifth to activations."""
    plan = workload("mini", settings=(*SHARED, *CASES[case]), plan=['steps=["distill_steps"]'])
    (stage,) = plan.stages()
    distill = plan.job.recipe.distill
    trained = assembled(distill)
    before = storages(trained)
    batch = Batch(
        ids=tuple(map(str, range(ROWS))),
        columns={
            "latent": torch.randn(ROWS, 4, 8, 8),
            "token_ids": load("mini-v").tokenize(["red"] * ROWS).to(torch.int32),
        },
    )
    with _LiveBytes(set(before)) as live:
        train(
            trained.state,
            objective=trained.objective,
            batches=itertools.repeat(batch),
            settings=distill.loop,
            micro_batch=ROWS,
        )
    assert 1.05 < stage.peak_bytes / (sum(before.values()) + live.peak) < 1.3


def test_an_adapter_has_the_weights_that_are_counted():
    lora, unet = LoraSettings(rank=8), load("mini-v").unet
    costs = lora_costs(lora, architecture_of(unet), tokens=16)
    assert costs.parameters == count_parameters(LoraUNet(unet, lora, seed=0))


def test_an_adapter_takes_two_passes_of_three_and_its_own():
    """Its optimizer state, gradients and checkpoints are its own alone."""
    lora, plan = 'distill.lora={"rank": 4}', ['steps=["distill_steps"]']
    (alone,) = workload("mini", settings=(*SHARED, PCM, lora), plan=plan).stages()
    (whole,) = workload("mini", settings=(*SHARED, PCM), plan=plan).stages()
    sizes = workload("mini").sizes
    costs = lora_costs(LoraSettings(rank=4), sizes.architecture, tokens=sizes.tokens)
    assert 2 / 3 < costs.gmacs / sizes.unet.gmacs < 0.9
    assert sum(alone.reads.checkpoint_bytes) == 4 * 4 * costs.parameters
    # Gradients, two moments and the average of all weights are gone.
    assert whole.peak_bytes - alone.peak_bytes > 4 * 4 * (sizes.unet.parameters - 2 * costs.parameters)
