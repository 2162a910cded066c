"""Adding textual inversions to a model: tokens of its tokenizer, and their vectors in the text encoder.

Files of diffusers and of AUTOMATIC1111's web UI are read, safetensors only.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from snapfusion.models import sd2, sd15
from snapfusion.models.bundle import Bundle
from snapfusion.models.checkpoint_file import CheckpointFile
from snapfusion.models.checksums import file_hash
from snapfusion.models.errors import ModelError
from snapfusion.models.source import Embedding
from snapfusion.models.tokenizer import vector_tokens

_WEB_UI_KEY, _WEB_UI_NAME = "emb_params", "name"
_SDXL_KEYS = ("clip_l", "clip_g")
_NUMBER = re.compile(r"_\d+$")
_VERSIONS = {sd15.TEXT_ENCODER["hidden_size"]: 1, sd2.TEXT_ENCODER["hidden_size"]: 2}


def add_embeddings(bundle: Bundle, embeddings: Iterable[Embedding], paths: Iterable[Path]) -> None:
    """Add tokens and their vectors to a model, in order, and record them in `bundle.merged`.

    Tokens are in lower case, as CLIP's tokenizer reads captions.

    Args:
        bundle: the model; its text encoder becomes float32.
        embeddings: the files and tokens.
        paths: the local file of each.

    Raises:
        ModelError: if a file is not a textual inversion of this model, or its token is known already.
    """
    for embedding, path in zip(embeddings, paths, strict=True):
        token, vectors = _read(embedding, path)
        _check_vectors(vectors, width=bundle.text_encoder.config.hidden_size, source=embedding.path)
        tokens = vector_tokens(token, count=len(vectors))
        _check_tokens(tokens, tokenizer=bundle.tokenizer, source=embedding.path)
        _add(bundle, tokens, vectors)
        record = {"sha256": file_hash(path), "token": token, "vectors": len(vectors)}
        bundle.merged.append({"embedding": path.name, **record})


def _read(embedding: Embedding, path: Path) -> tuple[str, Tensor]:
    """Return the token in lower case, and its vectors, float32 [N,D]."""
    file, source = CheckpointFile(path, source=embedding.path), embedding.path
    if any(key in file.shapes for key in _SDXL_KEYS):
        raise ModelError(
            f"{source} is a textual inversion for SDXL; one of Stable Diffusion 1 or 2 is accepted"
        )
    if _WEB_UI_KEY in file.shapes:
        key, name = _WEB_UI_KEY, file.metadata.get(_WEB_UI_NAME, path.stem)
    else:
        key = name = next(iter(file.shapes), "")
    shape = file.shapes.get(key, ())
    if (len(file.shapes) != 1 and key != _WEB_UI_KEY) or len(shape) not in (1, 2) or 0 in shape:
        raise ModelError(
            f"{source} is not a textual inversion: one tensor [D] or [N,D] is accepted, named as its token "
            f"(diffusers) or {_WEB_UI_KEY} (AUTOMATIC1111)"
        )
    token = name if embedding.token is None else embedding.token
    if not token or token.split() != [token]:
        raise ModelError(f"{source}: the token {token!r} is not one word; give another one as FILE:TOKEN")
    return token.lower(), file.tensor(key).reshape(-1, shape[-1])


def _check_vectors(vectors: Tensor, *, width: int, source: str) -> None:
    own = vectors.shape[1]
    if own != width:
        version = f", it is one of Stable Diffusion {_VERSIONS[own]}" if own in _VERSIONS else ""
        raise ModelError(
            f"{source}: its vectors have {own} numbers and those of the model's text encoder {width}{version}"
        )
    if not torch.isfinite(vectors).all():
        raise ModelError(f"{source} has values that are NaN or infinite")


def _check_tokens(tokens: Sequence[str], *, tokenizer: CLIPTokenizer, source: str) -> None:
    vocabulary = {name.lower().removesuffix("</w>") for name in tokenizer.get_vocab()}
    # TOKEN_1 would be read as the second vector of another TOKEN.
    names = [*tokens, f"{tokens[0]}_1", _NUMBER.sub("", tokens[0])]
    known = next((name for name in names if name in vocabulary), None)
    if known:
        raise ModelError(f"{source}: the tokenizer knows {known!r} already; give another token as FILE:TOKEN")


def _add(bundle: Bundle, tokens: list[str], vectors: Tensor) -> None:
    bundle.tokenizer.add_tokens(tokens)
    encoder = bundle.text_encoder.float()
    rows = max(len(bundle.tokenizer), encoder.config.vocab_size)
    # New rows would be drawn around the mean of the others; all of them are written below.
    encoder.resize_token_embeddings(rows, mean_resizing=False)
    encoder.requires_grad_(requires_grad=False)
    weight: Tensor = encoder.get_input_embeddings().weight
    weight[bundle.tokenizer.convert_tokens_to_ids(tokens)] = vectors
