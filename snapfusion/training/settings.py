"""Settings of the training loop and of the objectives; importable without torch."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from snapfusion.settings import Settings

BRANCHES: Final = {False: "vanilla", True: "guided"}
"""Names of the branches of SnapFusion Eq. 11, by whether a step is guided."""

SCHEDULE_STEPS: Final = 1000
"""Timesteps of Stable Diffusion 1 and 2, by which settings are checked before a model is loaded."""

Decay = Literal["constant", "cosine"]
Probability = Annotated[float, Field(ge=0, lt=1)]
"""A probability that may be 0 but not 1."""


class NetworkSettings(Settings):
    """Settings of the optimizer of one network.

    Attributes:
        learning_rate: the peak.
        warmup_steps: steps of linear warm-up to the peak.
        decay: after the warm-up: "cosine" to zero, or "constant".
        weight_decay: AdamW's, on all parameters; 0.01 in the paper.
        clip_norm: maximum norm of the gradient.
        ema_decay: of the averaged weights; null for no averaging.
    """

    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 0
    decay: Decay = "cosine"
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None


class LoopSettings(NetworkSettings):
    """Settings that determine the final weights; hardware and parallelism are configured elsewhere.

    Attributes:
        num_steps: optimizer steps.
        global_batch: rows per step, over all workers.
        learning_rate: the peak.
        warmup_steps: steps of linear warm-up to the peak.
        decay: after the warm-up: "cosine" to zero, or "constant".
        weight_decay: AdamW's, on all parameters; 0.01 in the paper.
        clip_norm: maximum norm of the gradient.
        max_loss: training stops if the mean loss exceeds it; null for no limit.
        ema_decay: of the averaged weights; null for no averaging.
        precision: of the network's forward pass. "bfloat16" is autocast; losses are float32 in any case.
        arithmetic: version of the optimizer's and the average's arithmetic, which differ in the last bits:
            2 is fused, and its average is over the steps of the run alone; 1 is that of version 0.1.
        seed: of the row order and of all random draws.
    """

    num_steps: PositiveInt
    global_batch: PositiveInt
    max_loss: PositiveFloat | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    arithmetic: Literal[1, 2] = 2
    seed: NonNegativeInt = 0


class VelocitySettings(Settings):
    """Settings of the original loss, L_ori.

    Attributes:
        caption_dropout: fraction of rows trained without their caption; ours, the paper gives none.
    """

    caption_dropout: Probability = 0.1


class SkipSettings(Settings):
    """Skip probabilities of robust training; the paper gives no values.

    Attributes:
        attention: probability of skipping each cross-attention block.
        resnet: probability of skipping each ResNet block.
    """

    attention: Probability = 0.1
    resnet: Probability = 0.1


LORA_MODULES: Final = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""The layers of attention and ResNet blocks, as in LCM-LoRA (Luo et al. 2023)."""


class LoraSettings(Settings):
    """Settings of an adapter of low rank (LoRA, Hu et al. 2022), which is trained in place of all weights.

    Attributes:
        rank: of the two matrices whose product is added to a weight.
        alpha: that product is multiplied by alpha / rank; null takes the rank.
        modules: the linear layers and convolutions of the UNet whose names end so get one.
    """

    rank: PositiveInt
    alpha: PositiveFloat | None = None
    modules: Annotated[tuple[str, ...], Field(min_length=1)] = LORA_MODULES


class CfgRange(Settings):
    """w ~ U[low, high], the guidance scale of the CFG-aware loss. SnapFusion Eq. 10.

    Attributes:
        low: smallest w; 1 is no guidance.
        high: largest w.
    """

    low: float = Field(2.0, ge=1.0)
    high: float = Field(14.0, ge=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class TargetSettings(Settings):
    """Settings of the distillation target.

    Attributes:
        student_steps: N_S, sampling steps of the student.
        k: teacher steps per student step.
        cfg_range: of w in guided rows.
        caption_dropout: fraction of rows without their caption; ours, the paper gives none.
    """

    student_steps: PositiveInt = 8
    k: PositiveInt = 2
    cfg_range: CfgRange = CfgRange()
    caption_dropout: Probability = 0.1

    @model_validator(mode="after")
    def _grid_is_of_the_schedule(self) -> Self:
        self.check_schedule(SCHEDULE_STEPS)
        return self

    def check_schedule(self, num_steps: int) -> None:
        """Refuse a grid of more steps than a schedule has.

        Raises:
            ValueError: if it has.
        """
        if self.k * self.student_steps > num_steps:
            raise ValueError(
                f"k {self.k} times student_steps {self.student_steps} is more than the schedule's "
                f"{num_steps} steps: lower one of them"
            )


class StepDistillationSettings(TargetSettings):
    """Settings of the step distillation loss. The defaults are the paper's where it gives values.

    Attributes:
        student_steps: N_S, sampling steps of the student.
        k: teacher steps per student step.
        cfg_range: of w in guided steps.
        caption_dropout: fraction of rows without their caption, in L_ori and, if the teacher runs in the
            trainer, in vanilla steps; ours, the paper gives none.
        cfg_probability: p of Eq. 11: 0 is vanilla only, 1 CFG-aware only.
        gamma: weight of L_ori; 0 omits it.
        gamma_rule: "dynamic" weights L_ori by gamma times L_dstl / L_ori, both as moving averages over the
            earlier steps of the branch; in the first step of a branch L_ori has no weight. "constant" weights
            it by gamma. The paper calls gamma dynamic and does not define the rule.
        ratio_decay: decay of those moving averages.
        original_times: timesteps of L_ori: drawn from the whole "schedule", or those of the distillation
            loss on the "grid", which saves a forward pass.
        w_conditioned: whether the student takes w as an input and needs one pass (Meng et al. 2023,
            Fig. 6b), instead of being guided itself.
    """

    cfg_probability: Annotated[float, Field(ge=0, le=1)] = 0.1
    gamma: NonNegativeFloat = 0.2
    gamma_rule: Literal["dynamic", "constant"] = "dynamic"
    ratio_decay: Annotated[float, Field(gt=0, lt=1)] = 0.98
    original_times: Literal["schedule", "grid"] = "schedule"
    w_conditioned: bool = False

    @model_validator(mode="after")
    def _original_is_unguided(self) -> Self:
        if self.w_conditioned and self.original_times == "grid" and self.gamma:
            raise ValueError("a w-conditioned student has no unguided pass on the grid for L_ori")
        return self


class ConsistencySettings(Settings):
    """Settings that consistency distillations share.

    Attributes:
        points: intervals of the fine grid, each of which is one DDIM step of the teacher. Its points hold the
            times of N sampling steps if N divides it: 40 those of 8, 4, 2 and 1, 64 also those of 16; the
            papers' 50 those of 2 and 1.
        cfg_range: of w, the teacher's guidance, which is 1 more than the scripts' scale.
        huber_c: c of the pseudo-Huber loss.
    """

    points: Annotated[int, Field(ge=1, le=1000)] = 40
    cfg_range: CfgRange
    huber_c: PositiveFloat = 0.001

    def _targets(self, **changes: Any) -> StepDistillationSettings:  # noqa: ANN401 - settings
        """Settings of the teacher's x over one interval of the fine grid."""
        shared: dict[str, Any] = {
            "student_steps": self.points,
            "k": 1,
            "cfg_range": self.cfg_range,
            "gamma": 0.0,
        }
        return StepDistillationSettings(**shared | changes)


class LcmSettings(ConsistencySettings):
    """Settings of the latent consistency loss (Luo et al. 2023); the defaults are those of its script.

    Attributes:
        method: "lcm".
        steps: sampling steps that the student's folder states; it can take others.
        points: intervals of the fine grid (see `ConsistencySettings`); 50 in the paper.
        cfg_range: of w, the teacher's guidance and the student's input; in the script it is 5 to 15 and
            counted from 0.
        w_conditioned: whether w is an input of the student. If it is not, as in LCM-LoRA (Luo et al. 2023),
            the student learns a guidance within the range, and is used without guidance of its own.
        huber_c: c of the pseudo-Huber loss.
        sigma_data: of c_skip and c_out.
        timestep_scaling: likewise.
    """

    method: Literal["lcm"] = "lcm"
    steps: PositiveInt = 4
    cfg_range: CfgRange = CfgRange(low=6.0, high=16.0)
    w_conditioned: bool = True
    sigma_data: PositiveFloat = 0.5
    timestep_scaling: PositiveFloat = 10.0

    @model_validator(mode="after")
    def _steps_are_points(self) -> Self:
        if self.steps > self.points:
            raise ValueError(f"{self.steps} steps are more than {self.points} points: lower steps")
        return self

    def with_steps(self, steps: int) -> Self:
        """These settings for another number of sampling steps."""
        return self.parse(self.to_values() | {"steps": steps})

    @property
    def targets(self) -> StepDistillationSettings:
        """Settings of the teacher's x, which is guided."""
        return self._targets(cfg_probability=1.0, caption_dropout=0.0, w_conditioned=self.w_conditioned)


class PcmSettings(ConsistencySettings):
    """Settings of the phased consistency loss (Wang et al. 2024); the defaults are those of its script.

    Attributes:
        method: "pcm".
        points: intervals of the fine grid (see `ConsistencySettings`); 50 in the paper.
        phases: sampling steps of the student, which divide `points`.
        guided: whether the teacher is guided; the student then gives guided images of one pass a step.
        cfg_range: of w, the teacher's guidance; in the script it is 4 to 5 and counted from 0.
        caption_dropout: fraction of rows without their caption if the teacher is not guided; 0.1 in the
            script.
        huber_c: c of the pseudo-Huber loss.
    """

    method: Literal["pcm"] = "pcm"
    cfg_range: CfgRange = CfgRange(low=5.0, high=6.0)
    phases: PositiveInt = 4
    guided: bool = True
    caption_dropout: Probability = 0.15

    @model_validator(mode="after")
    def _phases_are_on_the_grid(self) -> Self:
        if self.points % self.phases:
            raise ValueError(
                f"{self.phases} phases do not divide {self.points} points, so their ends are not on the "
                "grid: 40 points hold 8, 4, 2 and 1 phases, 64 also 16"
            )
        return self

    def with_steps(self, steps: int) -> Self:
        """These settings for another number of sampling steps."""
        return self.parse(self.to_values() | {"phases": steps})

    @property
    def targets(self) -> StepDistillationSettings:
        """Settings of the teacher's x."""
        dropout = 0.0 if self.guided else self.caption_dropout
        return self._targets(cfg_probability=float(self.guided), caption_dropout=dropout)


class GanSettings(Settings):
    """Settings of the GAN of `Dmd2Settings`; the weights are those of its SD-v1.5 script.

    Attributes:
        generator_weight: of the loss by which the generator's samples are to pass for real.
        head_weight: of the loss by which the fake score and the head tell them from real latents.
        head: optimizer of the head; null takes that of the fake score.
    """

    generator_weight: PositiveFloat = 1e-3
    head_weight: PositiveFloat = 1e-2
    head: NetworkSettings | None = None


class Dmd2Settings(Settings):
    """Settings of distribution matching (Yin et al. 2024, DMD2); the defaults are its SD-v1.5 script's.

    Attributes:
        steps: sampling steps of the student, which divide the schedule; 1 in that script, 4 in the SDXL one.
        guidance: w of Eq. 3 of the teacher, the real score; it is baked into the student.
        fake_updates: updates of the fake score before each one of the generator.
        matching_times: first and last share of the schedule, between which the matching loss draws its times.
        fake: optimizer of the fake score; null takes the generator's, without an average.
        gan: the GAN on real latents, those of LATENTS; null for none.
        regression_weight: of DMD's regression on the teacher's own images, those of PAIRS, in place of the
            GAN; 0 for none.
    """

    steps: PositiveInt = 4
    guidance: Annotated[float, Field(ge=1)] = 1.75
    fake_updates: PositiveInt = 10
    matching_times: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(lt=1)]] = (0.02, 0.98)
    fake: NetworkSettings | None = None
    gan: GanSettings | None = GanSettings()
    regression_weight: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _steps_divide_the_schedule(self) -> Self:
        self.check_schedule(SCHEDULE_STEPS)
        return self

    def check_schedule(self, num_steps: int) -> None:
        """Refuse steps that do not divide a schedule's.

        Raises:
            ValueError: if they do not.
        """
        if num_steps % self.steps:
            raise ValueError(
                f"{self.steps} steps do not divide the schedule's {num_steps}, so stock diffusers would "
                "sample the student at other times: set a divisor, such as 1, 2, 4, 5 or 8"
            )

    @model_validator(mode="after")
    def _times_are_in_order(self) -> Self:
        first, last = self.matching_times
        if first >= last:
            raise ValueError(f"matching_times {first} to {last} are no range: the first must be the smaller")
        return self

    @model_validator(mode="after")
    def _gan_has_real_latents(self) -> Self:
        if self.gan is not None and self.regression_weight:
            raise ValueError(
                "the regression reads PAIRS, which hold the teacher's latents, and the GAN needs real ones: "
                "set gan=null or regression_weight=0"
            )
        return self

    @property
    def reads_pairs(self) -> bool:
        """Whether the training table is PAIRS; else it is LATENTS."""
        return self.regression_weight > 0

    def with_steps(self, steps: int) -> Self:
        """These settings for another number of sampling steps."""
        return self.parse(self.to_values() | {"steps": steps})

    @property
    def targets(self) -> StepDistillationSettings:
        """The student's grid and guidance in the terms of step distillation; it has no such targets."""
        w = CfgRange(low=self.guidance, high=self.guidance)
        return StepDistillationSettings(
            student_steps=self.steps, k=1, cfg_range=w, cfg_probability=1.0, gamma=0.0, caption_dropout=0.0
        )
