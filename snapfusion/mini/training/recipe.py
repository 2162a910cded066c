"""The training's stages in order, and the folder of weights that they produce."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from open_clip import CLIP
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from snapfusion.metrics.clip import ClipScorer, build_scorer, save_scorer
from snapfusion.mini import models
from snapfusion.mini.oracle import Oracle, attribute_loss, save_oracle, scene_labels
from snapfusion.mini.scenes import image_batch, scene_of
from snapfusion.mini.tokenizer import mini_tokenizer
from snapfusion.mini.training.autoencoder import autoencoder_loss, decoder_parts
from snapfusion.mini.training.contrast import TextTower, contrastive_loss, draw_captions
from snapfusion.mini.training.denoiser import EncodedScenes, UNetStage, denoiser_loss, latents_of
from snapfusion.mini.training.noisy_captions import NoisyCaptions
from snapfusion.mini.training.settings import MiniTraining, StageSettings
from snapfusion.mini.training.stage import (
    Progress,
    TrainingStage,
    run_stage,
    step_generator,
    training_indexes,
)
from snapfusion.mini.weights import read_manifest, write_manifest
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.card import CARD
from snapfusion.models.checksums import write_checksums
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.models.tokenizer import tokenize
from snapfusion.noise import noise_key
from snapfusion.schedule import Schedule
from snapfusion.settings import digest

LossCurve = list[tuple[int, float]]
Loss = Callable[[int], Tensor]
"""step -> scalar loss."""

_Built = TypeVar("_Built")


@dataclass(kw_only=True)
class Trainer:
    """Trains the stages one by one; each resumes from its checkpoint in `folder`, or is skipped if complete.

    Attributes:
        settings: of the whole training.
        folder: of the checkpoints.
        device: of the networks.
        on_progress: called after every step.
        curves: the loss curves of the stages that have run so far.
    """

    settings: MiniTraining
    folder: Path
    device: str = "cpu"
    on_progress: Progress | None = None
    curves: dict[str, LossCurve] = field(default_factory=dict, init=False)
    tokenizer: CLIPTokenizer = field(default_factory=mini_tokenizer, init=False)
    schedule: Schedule = field(default_factory=Schedule, init=False)

    def autoencoder(self) -> AutoencoderKL:
        """The VAE: both halves, then the decoder alone; its scaling factor is not yet set."""
        vae, settings = self._seeded("autoencoder", models.autoencoder).to(self.device), self.settings
        loss = autoencoder_loss(vae, stage="autoencoder", seed=settings.seed, settings=settings.autoencoder)
        self._run("autoencoder", module=vae, loss=loss)
        loss = autoencoder_loss(vae, stage="decoder", seed=settings.seed, settings=settings.decoder)
        parent = settings.autoencoder.to_values()
        self._run("decoder", module=decoder_parts(vae), loss=loss, autoencoder=parent)
        return vae

    def text_encoder(self) -> CLIPTextModel:
        """The conditioning text encoder; the image tower that it is trained against is discarded."""
        tower = self._seeded("text", lambda: TextTower(models.text_encoder(self.tokenizer))).to(self.device)
        self._run_contrast("text", tower, encode_image=tower.encode_image, factor=tower.log_temperature)
        return tower.text_encoder

    def scorer(self) -> ClipScorer:
        """The CLIP scorer, which shares only the data with the conditioning text encoder."""
        config = models.scorer_config(len(self.tokenizer))
        scorer = self._seeded("scorer", lambda: build_scorer(config, tokenizer=self.tokenizer))
        model = scorer.model.to(self.device)

        def encode_image(images: Tensor) -> Tensor:
            return model.encode_image(scorer.prepare(images))

        self._run_contrast("scorer", model, encode_image=encode_image, factor=model.logit_scale)
        return scorer

    def oracle(self) -> Oracle:
        """The attribute oracle."""
        oracle = self._seeded("oracle", Oracle).to(self.device)

        def loss(step: int) -> Tensor:
            generator = step_generator(seed=self.settings.seed, stage="oracle", step=step)
            indexes = training_indexes(self.settings.oracle.batch, generator)
            labels = scene_labels([scene_of(index) for index in indexes])
            return attribute_loss(oracle(image_batch(indexes).to(self.device)), labels.to(self.device))

        self._run("oracle", module=oracle, loss=loss)
        return oracle

    def scale_latents(self, vae: AutoencoderKL) -> None:
        """Set the VAE's scaling factor to one over the standard deviation of its latents."""
        vae.register_to_config(scaling_factor=round(1.0 / float(self._latents(vae).std()), 5))

    def encoded(self, *, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> EncodedScenes:
        """The UNets' training data."""
        captions = NoisyCaptions.of(self.settings.caption_noise)
        ids = tokenize(self.tokenizer, [*captions.texts, ""])
        with torch.inference_mode():
            hidden = text_encoder(ids.to(self.device)).last_hidden_state.cpu()
        # Cloned, because tensors created in inference mode cannot take part in training.
        return EncodedScenes(
            latents=self._latents(vae).clone() * float(vae.config.scaling_factor),
            captions=captions,
            conditions=hidden[:-1].clone(),
            null=hidden[-1].clone(),
        )

    def _latents(self, vae: AutoencoderKL) -> Tensor:
        count = self.settings.scenes
        # That of a base is rounded to float16, and has other latents than it had in its training.
        name = f"latents-{count}-{weight_hash(vae)[:8]}.safetensors"
        return latents_of(vae, count=count, path=self.folder / name)

    def denoiser(self, encoded: EncodedScenes) -> UNet2DConditionModel:
        """The UNet that predicts eps: the moving average of its training."""
        unet = self._seeded("denoiser", models.unet).to(self.device)
        return self._unet("denoiser", unet, encoded)

    def velocity(self, denoiser: UNet2DConditionModel, encoded: EncodedScenes) -> UNet2DConditionModel:
        """The UNet that predicts v, initialized with the weights of `denoiser`. SnapFusion Eq. 6."""
        unet = copy.deepcopy(denoiser).requires_grad_(requires_grad=True)
        return self._unet("velocity", unet, encoded, denoiser=self.settings.denoiser.to_values())

    def with_noisy_captions(self, model: Bundle, encoded: EncodedScenes) -> UNet2DConditionModel:
        """The UNet of a model that was trained on right captions, trained further on noisy ones."""
        stage: UNetStage = "noisy_velocity" if model.prediction_type == "v_prediction" else "noisy_denoiser"
        return self._unet(
            stage,
            copy.deepcopy(model.unet).requires_grad_(requires_grad=True),
            encoded,
            begin=model.fingerprint()["unet"],
            caption_noise=self.settings.caption_noise.to_values(),
        )

    def _unet(
        self, stage: UNetStage, unet: UNet2DConditionModel, encoded: EncodedScenes, **parents: object
    ) -> UNet2DConditionModel:
        average, settings = copy.deepcopy(unet).requires_grad_(requires_grad=False), self.settings
        loss = denoiser_loss(unet, encoded, schedule=self.schedule, stage=stage, settings=settings)
        architecture = {name: value for name, value in unet.config.items() if not name.startswith("_")}
        self._run(
            stage,
            module=unet,
            loss=loss,
            average=average,
            autoencoder=settings.autoencoder.to_values(),
            text=settings.text.to_values(),
            scenes=settings.scenes,
            caption_dropout=settings.caption_dropout,
            architecture=architecture,
            **parents,
        )
        return average

    def _run_contrast(
        self, stage: str, model: TextTower | CLIP, *, encode_image: Callable[[Tensor], Tensor], factor: Tensor
    ) -> None:
        """Train a text model against images; `factor` is the logarithm of that on the cosines."""
        settings: StageSettings = getattr(self.settings, stage)

        def loss(step: int) -> Tensor:
            generator = step_generator(seed=self.settings.seed, stage=stage, step=step)
            indexes = training_indexes(settings.batch, generator)
            ids = tokenize(self.tokenizer, draw_captions(indexes, generator))
            return contrastive_loss(
                images=encode_image(image_batch(indexes).to(self.device)),
                texts=model.encode_text(ids.to(self.device)),
                log_temperature=factor,
            )

        self._run(stage, module=model, loss=loss)

    def _seeded(self, stage: str, build: Callable[[], _Built]) -> _Built:
        """A network whose initial weights depend on the seed and the stage's name only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise_key("mini weights", self.settings.seed, stage))
            return build()

    def _run(
        self, name: str, *, module: nn.Module, loss: Loss, average: nn.Module | None = None, **parents: object
    ) -> None:
        """Train a stage; `parents` are the settings of other stages that its weights depend on."""
        settings: StageSettings = getattr(self.settings, name)
        seed = self.settings.seed
        # A checkpoint is resumed only with the same identity.
        identity = {"stage": name, "seed": seed, "settings": settings.to_values(), "parents": parents or None}
        stage = TrainingStage(
            name=name, identity=digest(identity), settings=settings, module=module, loss=loss, average=average
        )
        every, progress = self.settings.checkpoint_every, self.on_progress
        self.curves[name] = run_stage(stage, folder=self.folder, checkpoint_every=every, on_progress=progress)


def train(
    settings: MiniTraining,
    *,
    folder: Path,
    base: Path | None = None,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> None:
    """Run all stages on `device` and write `folder`/weights; checkpoints are in `folder`/checkpoints.

    Args:
        settings: of all stages.
        folder: of checkpoints and weights.
        base: a folder of weights from right captions, of which only the UNets are trained, by the noisy
            stages; None trains one in `folder`/base.
        device: of the networks.
        on_progress: called after every step.

    Raises:
        ValueError: if the checkpoints are of other settings, or the base has seen noisy captions.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings=settings, folder=checkpoints, device=device, on_progress=on_progress)
    if base is None:
        base = folder / "base"
        _train_base(trainer, base)
    trainer.curves |= read_manifest(base)["curves"]
    if "noisy_denoiser" in trainer.curves:
        raise ValueError(
            f"{base}: its UNets were trained on noisy captions; weights from right ones are needed"
        )
    _train_further(trainer, base, weights=folder / "weights")


def _train_base(trainer: Trainer, weights: Path) -> None:
    """Train all networks on right captions, and write their folder."""
    vae = trainer.autoencoder()
    text_encoder = trainer.text_encoder()
    scorer = trainer.scorer()
    oracle = trainer.oracle()
    trainer.scale_latents(vae)
    encoded = trainer.encoded(vae=vae, text_encoder=text_encoder)
    denoiser = trainer.denoiser(encoded)
    velocity = trainer.velocity(denoiser, encoded)
    bundle = Bundle(
        tokenizer=trainer.tokenizer,
        text_encoder=text_encoder,
        unet=denoiser,
        vae=vae,
        schedule=trainer.schedule,
        prediction_type="epsilon",
        source=str(weights),
    )
    _save_model(bundle, weights / "sd")
    _save_model(replace(bundle, unet=velocity, prediction_type="v_prediction"), weights / "sd-v")
    config = models.scorer_config(len(trainer.tokenizer))
    save_scorer(scorer.model, weights / "scorer", config=config, tokenizer=trainer.tokenizer)
    save_oracle(oracle, weights / "oracle")
    write_manifest(weights, recipe=trainer.settings.to_values(), curves=trainer.curves)


def _train_further(trainer: Trainer, base: Path, *, weights: Path) -> None:
    """Train the UNets of a folder of weights on noisy captions, and write the folder with them."""
    teachers = {name: load(str(base / name)).to(trainer.device) for name in ("sd", "sd-v")}
    encoded = trainer.encoded(vae=teachers["sd"].vae, text_encoder=teachers["sd"].text_encoder)
    for name, model in teachers.items():
        _save_model(replace(model, unet=trainer.with_noisy_captions(model, encoded)), weights / name)
    for name in ("scorer", "oracle"):
        shutil.copytree(base / name, weights / name, dirs_exist_ok=True)
    write_manifest(weights, recipe=trainer.settings.to_values(), curves=trainer.curves)


def _save_model(bundle: Bundle, folder: Path) -> None:
    """Write a diffusers folder; the eps model has SD-v1.5's scheduler."""
    save(bundle, folder)
    (folder / CARD).unlink()  # MODEL_CARD.md describes all weights
    if bundle.prediction_type == "epsilon":
        models.scheduler(bundle.schedule).save_pretrained(folder / "scheduler")
    # transformers opens a model in the dtype of this file, diffusers in float32; a pipeline needs one dtype.
    config = folder / "text_encoder" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    write_checksums(folder)
