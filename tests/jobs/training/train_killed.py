"""A driver that trains on a Ray cluster of its own, and kills itself when there is a checkpoint."""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from student_inputs import DISTILL, VPRED

from jobs.runtime.cluster import connect
from jobs.runtime.settings import ClusterSettings
from jobs.training.distillation import distill_steps
from jobs.training.velocity import finetune_vpred


def kill(figures: Mapping[str, Any]) -> None:
    """An `OnReport`."""
    if figures["step"] >= VPRED.trainer.checkpoint_every:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    name, model, latents, out = sys.argv[1:]
    connect(ClusterSettings(cpus=2))
    if name == "vpred":
        finetune_vpred(VPRED, model=model, latents_url=latents, out_url=out, on_report=kill)
    else:
        distill_steps(DISTILL, teacher=model, data_url=latents, out_url=out, on_report=kill)
