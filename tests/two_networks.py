"""A toy training of two networks that read each other and their averages: a decoder and its critic."""

import itertools

import torch
from torch import nn

from snapfusion.training.decoder import stored_images
from snapfusion.training.networks import MODEL
from snapfusion.training.settings import LoopSettings, NetworkSettings

CRITIC = "critic"
SETTINGS = LoopSettings(num_steps=7, global_batch=8, learning_rate=1e-3, ema_decay=0.9, clip_norm=0.5)
CRITIC_SETTINGS = NetworkSettings(learning_rate=3e-3, ema_decay=0.8, clip_norm=0.1, warmup_steps=2)


class Blocks(nn.Module):
    """A network with a list of blocks, each of which becomes an FSDP unit."""

    def __init__(self, channels, *, seed):
        super().__init__()
        torch.manual_seed(seed)
        first, *others = channels
        self.inlet = nn.Conv2d(first, others[0], 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in itertools.pairwise(others))

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(torch.nn.functional.silu(x))
        return x


def decoder(seed=0):
    return Blocks((4, 7, 9, 3), seed=seed)


def critic(seed=1):
    return Blocks((3, 5, 7, 1), seed=seed)


def mean(x):
    return x.mean(dim=(1, 2, 3))


class AdversarialObjective:
    """The decoder is to please the critic, which tells stored images from the average decoder's."""

    averages = (MODEL, CRITIC)

    def turn(self, step):
        return (CRITIC,) if step % 3 else (MODEL,)

    def __call__(self, networks, batch, *, step):
        if MODEL in self.turn(step):
            image = networks.trained[MODEL](batch["latent"])
            with torch.no_grad():
                target = networks.averages[MODEL](batch["latent"])
                before = mean(networks.bare[MODEL](batch["latent"]))
            pleased = mean(networks.bare[CRITIC](image))
            error = mean((image - stored_images(batch)).square() + 0.1 * (image - target).square())
            return error - 0.1 * pleased + 0.01 * before
        with torch.no_grad():
            fake = networks.averages[MODEL](batch["latent"])
            steady = networks.averages[CRITIC](fake)
        real, found = networks.trained[CRITIC](torch.cat([stored_images(batch), fake])).chunk(2)
        return mean((real - 1.0).square() + (found + 1.0).square() + 0.1 * (found - steady).square())
