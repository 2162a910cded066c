"""Settings of the training loop and its objectives."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from snapfusion.settings import Settings


class CfgRange(Settings):
    """w ~ U[low, high], the guidance of the CFG-aware loss. SnapFusion Eq. 10.

    Attributes:
        low: least w; 1 is no guidance.
        high: largest w.
    """

    low: float = Field(2.0, ge=1.0)
    high: float = Field(14.0, ge=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


Decay = Literal["constant", "cosine"]


class LoopSettings(Settings):
    """What decides the weights that training ends with; how and where it runs is not here.

    Attributes:
        num_steps: optimizer steps.
        global_batch: rows of a step, over all workers.
        learning_rate: the peak.
        warmup_steps: steps of the line that leads up to it.
        decay: what follows: "cosine" to zero, or "constant".
        weight_decay: AdamW's, on all parameters; 0.01 in the paper.
        clip_norm: limit of the gradient's norm.
        max_loss: a mean loss above it stops the training; null sets no limit.
        ema_decay: of the averaged weights; null keeps none.
        precision: of the network's forward pass. "bfloat16" is autocast; losses are float32 in any case.
        seed: of the order of rows and of every random draw.
    """

    num_steps: PositiveInt
    global_batch: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 0
    decay: Decay = "cosine"
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    max_loss: PositiveFloat | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: NonNegativeInt = 0


Probability = Annotated[float, Field(ge=0, lt=1)]


class SkipSettings(Settings):
    """How often a block is left out; the paper gives no number.

    Attributes:
        attention: probability of each cross-attention block.
        resnet: probability of each ResNet block.
    """

    attention: Probability = 0.1
    resnet: Probability = 0.1


class StepDistillationSettings(Settings):
    """What the student is to learn. The defaults are the paper's, but for what it leaves open.

    Attributes:
        student_steps: N_S, the steps that the student takes.
        k: the teacher's steps for one of the student's.
        cfg_probability: p of Eq. 11: 0 is vanilla alone, 1 CFG-aware alone.
        cfg_range: of w in guided steps.
        gamma: weight of L_ori; 0 leaves it out.
        gamma_rule: "dynamic" weights L_ori by gamma times L_dstl / L_ori, each a moving average over the
            earlier steps of the branch; in a branch's first step, before there is one, L_ori has no weight.
            "constant" weights it by gamma. The paper says dynamic, and not how.
        ratio_decay: of those moving averages.
        original_times: where L_ori is taken: at times from all of the "schedule", or at the student's own
            on the "grid", which spares a forward pass.
        w_conditioned: whether the student is told w and answers in one pass (Meng et al. 2023, Fig. 6b),
            instead of being guided itself.
        caption_dropout: fraction of rows without their caption, in L_ori and, with the teacher in the
            trainer, in vanilla steps; ours, the paper does not say.
    """

    student_steps: PositiveInt = 8
    k: PositiveInt = 2
    cfg_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    cfg_range: CfgRange = CfgRange()
    gamma: NonNegativeFloat = 0.2
    gamma_rule: Literal["dynamic", "constant"] = "dynamic"
    ratio_decay: Annotated[float, Field(gt=0, lt=1)] = 0.98
    original_times: Literal["schedule", "grid"] = "schedule"
    w_conditioned: bool = False
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _original_is_unguided(self) -> Self:
        if self.w_conditioned and self.original_times == "grid" and self.gamma:
            raise ValueError("a w-conditioned student has no unguided pass on the grid for L_ori")
        return self


class VelocitySettings(Settings):
    """What the original loss draws.

    Attributes:
        caption_dropout: fraction of rows that go without their caption; ours, the paper does not say.
    """

    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
