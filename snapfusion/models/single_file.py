"""Reading a single-file checkpoint (.safetensors, LDM keys) of Stable Diffusion 1 or 2."""

from collections.abc import Mapping
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from snapfusion.models import sd2
from snapfusion.models.bundle import Bundle
from snapfusion.models.checkpoint_file import CheckpointFile
from snapfusion.models.errors import ModelError
from snapfusion.models.network_files import check_finite
from snapfusion.models.scheduler_config import has_betas
from snapfusion.models.single_file_config import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    SingleFileConfigs,
    derive_configs,
)
from snapfusion.models.source import ModelSource
from snapfusion.models.supported import check_unet_config
from snapfusion.models.tokenizer import END, clip_tokenizer
from snapfusion.prediction_types import PredictionType
from snapfusion.schedule import Schedule

_EMA_PREFIX = "model_ema."
# An empty tensor by which trainers mark a model of v-prediction.
V_PREDICTION_KEY = "v_pred"
_METADATA_KEY = "modelspec.prediction_type"
_METADATA_KINDS: dict[str, PredictionType] = {"epsilon": "epsilon", "v": "v_prediction"}
_BETAS_KEY = "betas"


def read_single_file(path: Path, *, model: ModelSource, source: str) -> Bundle:
    """Read a checkpoint and convert it by diffusers' own functions; no configuration is fetched.

    Args:
        path: of the file.
        model: its options: prediction type, averaged weights, size of the images.
        source: the model, named in errors.

    Raises:
        ModelError: if it is another kind of model, incomplete or not finite, or its prediction type is
            unknown.
    """
    file = CheckpointFile(path, source=source)
    configs = _configs(file, model=model, source=source)
    prediction_type, _ = _find_prediction_type(file, sd2=configs.sd2, model=model, source=source)
    schedule = _schedule(file, source=source)
    unet = UNet2DConditionModel(**configs.unet)
    vae = AutoencoderKL(**configs.vae)
    text_encoder = CLIPTextModel(CLIPTextConfig(**configs.text_encoder))
    # One network after the other, so that the tensors of one alone are in memory twice.
    unet_tensors = read_unet(file, configs=configs, ema=model.ema, source=source)
    _fill(unet, unet_tensors, name="unet", source=source)
    _fill(vae, read_vae(file, configs=configs), name="vae", source=source)
    text_tensors = read_text_encoder(file, network=text_encoder, configs=configs)
    _fill(text_encoder, text_tensors, name="text_encoder", source=source)
    return Bundle(
        tokenizer=clip_tokenizer(padding=sd2.PADDING if configs.sd2 else END),
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        schedule=schedule,
        prediction_type=prediction_type,
        source=source,
    )


def single_file_configs(path: Path, *, model: ModelSource, source: str) -> SingleFileConfigs:
    """Derive the configurations of a checkpoint's networks without reading its weights.

    Raises:
        ModelError: if it is another kind of model.
    """
    return _configs(CheckpointFile(path, source=source), model=model, source=source)


def single_file_prediction_type(path: Path, *, model: ModelSource, source: str) -> tuple[PredictionType, str]:
    """Return a checkpoint's prediction type, and what says it, without reading its weights.

    Raises:
        ModelError: if it is another kind of model, or nothing says it of a checkpoint of SD 2.
    """
    file = CheckpointFile(path, source=source)
    sd2 = _configs(file, model=model, source=source).sd2
    return _find_prediction_type(file, sd2=sd2, model=model, source=source)


def has_averaged_weights(file: CheckpointFile) -> bool:
    """Tell whether a checkpoint has averaged weights beside the others, as `ema=true` reads them."""
    return any(key.startswith(_EMA_PREFIX) for key in file.shapes)


def _configs(file: CheckpointFile, *, model: ModelSource, source: str) -> SingleFileConfigs:
    configs = derive_configs(file.shapes, size=model.size, source=source)
    check_unet_config(configs.unet, source=source)
    return configs


def read_unet(
    file: CheckpointFile, *, configs: SingleFileConfigs, ema: bool, source: str
) -> dict[str, Tensor]:
    """Read the tensors of the UNet by diffusers' keys, float32.

    Args:
        file: the checkpoint.
        configs: of its networks.
        ema: read the averaged weights.
        source: the model, named in errors.

    Raises:
        ModelError: if there are no averaged weights.
    """
    # The averaged weights stand under the key of the others without its dots.
    names = {
        key: _EMA_PREFIX + "".join(key.split(".")[1:]) if ema else key
        for key in file.shapes
        if key.startswith(UNET_PREFIX)
    }
    lacking = next((name for name in names.values() if name not in file.shapes), None)
    if lacking:
        raise ModelError(f"{source} has no averaged weights ({lacking} is missing); leave out ema=true")
    tensors = {key: file.tensor(name) for key, name in names.items()}
    return convert_ldm_unet_checkpoint(tensors, configs.unet)


def read_vae(file: CheckpointFile, *, configs: SingleFileConfigs) -> dict[str, Tensor]:
    """Read the tensors of the VAE by diffusers' keys, float32."""
    tensors: dict[str, Tensor] = convert_ldm_vae_checkpoint(file.tensors(VAE_PREFIX), configs.vae)
    return tensors


def read_text_encoder(
    file: CheckpointFile, *, network: nn.Module, configs: SingleFileConfigs
) -> dict[str, Tensor]:
    """Read the tensors of the text encoder `network` by transformers' keys, float32."""
    if configs.sd2:
        unused = (
            f"{OPEN_CLIP_PREFIX}transformer.resblocks.{configs.text_encoder['num_hidden_layers']}.",
            f"{OPEN_CLIP_PREFIX}text_projection",
        )
        tensors = file.tensors(OPEN_CLIP_PREFIX)
        used = {key: value for key, value in tensors.items() if not key.startswith(unused)}
        converted = convert_open_clip_checkpoint(network, used, prefix=OPEN_CLIP_PREFIX)
    else:
        converted = convert_ldm_clip_checkpoint(file.tensors(CLIP_PREFIX))
    # The positions 0..76 are in old files and not needed.
    kept = {key: value for key, value in converted.items() if not key.endswith("position_ids")}
    return {key.removeprefix("text_model."): value for key, value in kept.items()}


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], *, name: str, source: str) -> None:
    """Load tensors into a network; each must fit, none may be missing or too many."""
    own = network.state_dict()
    problems = {
        "missing": [key for key in own if key not in tensors],
        "unexpected": [key for key in tensors if key not in own],
        "mismatched": [key for key in own if key in tensors and own[key].shape != tensors[key].shape],
    }
    for problem, keys in problems.items():
        if keys:
            raise ModelError(f"{source}: {name} has {len(keys)} {problem} tensors, such as {keys[0]}")
    network.load_state_dict(tensors)
    check_finite(network, name=name, source=source)


def _find_prediction_type(
    file: CheckpointFile, *, sd2: bool, model: ModelSource, source: str
) -> tuple[PredictionType, str]:
    """Return a checkpoint's prediction type, and what says it; SD 1 predicts eps if nothing does."""
    if model.prediction_type:
        return model.prediction_type, "the option prediction_type"
    if known := _METADATA_KINDS.get(file.metadata.get(_METADATA_KEY, "")):
        return known, f"the file's metadata, {_METADATA_KEY}"
    if V_PREDICTION_KEY in file.shapes:
        return "v_prediction", f"the file's tensor {V_PREDICTION_KEY}"
    if not sd2:
        return "epsilon", "nothing in the file; Stable Diffusion 1 does"
    raise ModelError(
        f"{source} does not say whether it predicts eps (SD 2 base, 512 px) or v (SD 2, 768 px); add "
        "?prediction_type=epsilon or ?prediction_type=v_prediction"
    )


def _schedule(file: CheckpointFile, *, source: str) -> Schedule:
    """Return the schedule of SD 1 and 2; a file that has its betas must agree."""
    schedule = Schedule()
    if _BETAS_KEY in file.shapes and not has_betas(schedule, file.tensor(_BETAS_KEY)):
        raise ModelError(f"{source}: its betas are not those of Stable Diffusion, which alone are supported")
    return schedule
