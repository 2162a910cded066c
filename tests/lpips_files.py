"""Random weights of LPIPS in files as they are published: torchvision's backbone, and the authors' heads."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from snapfusion.metrics.lpips import Lpips


def write_lpips(folder: Path, network: str = "alex") -> dict[str, str]:
    """Write both files; returns their settings."""
    torch.manual_seed(0)
    lpips = Lpips(network)
    backbone = {
        name: torch.randn_like(value) * (2 / max(1, value[0].numel())) ** 0.5
        for name, value in lpips.backbone.state_dict().items()
    }
    # The published file has the classifier, too.
    save_file(backbone | {"classifier.1.weight": torch.zeros(3, 3)}, folder / f"{network}.safetensors")
    heads = {name: torch.rand_like(value) for name, value in lpips.heads.state_dict().items()}
    save_file(heads, folder / f"{network}-heads.safetensors")
    return {
        "network": network,
        "backbone": str(folder / f"{network}.safetensors"),
        "heads": str(folder / f"{network}-heads.safetensors"),
    }
