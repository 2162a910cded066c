"""Writing a model of stock architecture as a single-file checkpoint (.safetensors, LDM keys)."""

import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from snapfusion.models import sd2, sd15
from snapfusion.models.bundle import Bundle
from snapfusion.models.checkpoint_file import CheckpointFile
from snapfusion.models.cost import count_parameters
from snapfusion.models.defaults import default_guidance, distilled_steps
from snapfusion.models.errors import ModelError
from snapfusion.models.guidance_embedding import has_guidance_embedding
from snapfusion.models.ldm_keys import ldm_tensors
from snapfusion.models.locate import SINGLE_FILE_SUFFIX
from snapfusion.models.single_file import V_PREDICTION_KEY, read_text_encoder, read_unet, read_vae
from snapfusion.models.single_file_config import SingleFileConfigs
from snapfusion.models.snapfusion_unet_v1 import BlockUNet


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A single-file checkpoint as it was written.

    Attributes:
        tensors: their number.
        bytes: size of the file.
        dtype: of the weights.
        published_sizes: whether the UNet has the number of parameters of SD 1.5 or 2.1, so that readers know
            its configuration.
    """

    tensors: int
    bytes: int
    dtype: torch.dtype
    published_sizes: bool


def write_single_file(bundle: Bundle, path: Path) -> SingleFile:
    """Write a model as one file, and read it back by diffusers' conversion; every tensor must be equal.

    The weights are float16 if that changes no value, else float32. The header says what ModelSpec has names
    for; a model that predicts v has the empty tensor `v_pred`, too.

    Args:
        bundle: the model, its networks in float32 on the CPU.
        path: a new file, .safetensors.

    Raises:
        ModelError: if a single file cannot hold the model, `path` exists or has another ending.
        OSError: if it cannot be written.
    """
    check_single_file(bundle)
    check_new_file(path)
    tensors = ldm_tensors(bundle)
    exact = all(torch.equal(value.half().float(), value) for value in tensors.values())
    dtype = torch.float16 if exact else torch.float32
    if bundle.prediction_type == "v_prediction":
        tensors[V_PREDICTION_KEY] = torch.zeros(0)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{SINGLE_FILE_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {key: value.to(dtype).contiguous() for key, value in tensors.items()}
        save_file(stored, partial, metadata=_metadata(bundle, title=path.stem))
        _check_readable(bundle, partial)
        partial.rename(path)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        partial.unlink(missing_ok=True)
    published = (sd15.UNET_PARAMETERS, sd2.UNET_PARAMETERS)
    return SingleFile(
        tensors=len(tensors),
        bytes=path.stat().st_size,
        dtype=dtype,
        published_sizes=count_parameters(bundle.unet) in published,
    )


def check_new_file(path: Path) -> None:
    """Check that a checkpoint can be written at `path`.

    Raises:
        ModelError: if it exists, or is not named .safetensors.
    """
    if path.suffix != SINGLE_FILE_SUFFIX:
        raise ModelError(f"{path}: a file that ends with {SINGLE_FILE_SUFFIX} is accepted")
    if path.exists():
        raise ModelError(f"{path} exists and is not overwritten; give another file, or remove it")


def check_single_file(bundle: Bundle) -> None:
    """Check that the LDM keys of Stable Diffusion 1 or 2 have a place for every tensor of a model.

    Raises:
        ModelError: naming what has none.
    """
    source, unet = bundle.source, bundle.unet
    if isinstance(unet, BlockUNet):
        raise ModelError(
            f"{source}: its UNet is of no stock architecture (Table 3's, or an evolved one), and LDM keys "
            "have no place for its blocks; give its diffusers folder, which opens with trust_remote_code=True"
        )
    if has_guidance_embedding(unet):
        raise ModelError(
            f"{source}: its UNet takes the guidance scale as an input (it is w-conditioned), and LDM keys "
            "have no place for that layer; give its diffusers folder"
        )
    if bundle.added_tokens:
        raise ModelError(
            f"{source} has {len(bundle.added_tokens)} tokens of textual inversions, such as "
            f"{bundle.added_tokens[0]}, and a single file has no tokenizer; give its diffusers folder"
        )
    if len(_depths(bundle)) != 1:
        raise ModelError(
            f"{source}: the levels of its UNet have {', '.join(map(str, sorted(_depths(bundle))))} layers, "
            "and LDM keys are read with as many for each; give its diffusers folder"
        )


def _depths(bundle: Bundle) -> set[int]:
    layers = bundle.unet.config["layers_per_block"]
    return {layers} if isinstance(layers, int) else set(layers)


def _metadata(bundle: Bundle, *, title: str) -> dict[str, str]:
    """The header's text; names and values are those of ModelSpec."""
    predicts_v = bundle.prediction_type == "v_prediction"
    second = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"
    architecture = second if sd2.is_text_encoder(bundle.text_encoder.config) else "stable-diffusion-v1"
    steps = f"{distilled_steps(bundle)} DDIM steps, trailing, guidance {default_guidance(bundle):g}"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.title": title,
        "modelspec.resolution": f"{bundle.image_size}x{bundle.image_size}",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        "modelspec.usage_hint": steps,
    }


def _check_readable(bundle: Bundle, path: Path) -> None:
    """Compare what diffusers' conversion makes of the file with the model."""
    file = CheckpointFile(path, source=bundle.source)
    text_encoder = bundle.text_encoder
    (depth,) = _depths(bundle)
    configs = SingleFileConfigs(
        text_encoder=text_encoder.config.to_dict(),
        unet={**bundle.unet.config, "layers_per_block": depth},
        vae=dict(bundle.vae.config),
        sd2=sd2.is_text_encoder(text_encoder.config),
    )
    _compare("unet", read_unet(file, configs=configs, ema=False, source=bundle.source), bundle)
    _compare("vae", read_vae(file, configs=configs), bundle)
    _compare("text_encoder", read_text_encoder(file, network=text_encoder, configs=configs), bundle)


def _compare(name: str, tensors: dict[str, Tensor], bundle: Bundle) -> None:
    own = bundle.networks[name].state_dict()
    differing = [key for key in own if key not in tensors or not torch.equal(tensors[key], own[key])]
    if extra := differing or sorted(tensors.keys() - own.keys()):
        raise ModelError(
            f"{bundle.source}: diffusers' conversion reads {len(extra)} tensors of {name} otherwise, such as "
            f"{extra[0]}; its architecture is not that of Stable Diffusion 1 or 2"
        )
