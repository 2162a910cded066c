"""Textual inversions: encodings equal diffusers', saved models keep the tokens, other files are refused."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_bundle
from diffusers import DDIMScheduler, StableDiffusionPipeline
from ldm_checkpoint import sd_shaped_bundle
from safetensors.torch import save_file
from torch import Tensor

from snapfusion.models.bundle import Bundle
from snapfusion.models.defaults import default_guidance
from snapfusion.models.errors import ModelError
from snapfusion.models.load import load, load_network
from snapfusion.models.save import save
from snapfusion.models.source import Embedding
from snapfusion.models.textual_inversion import add_embeddings
from snapfusion.models.tokenizer import tokenize, truncation_warning

CAPTIONS = ("a <cat> red", "<cat>,<cat>", "red", "red <cat> red red red red red red red red red red red")


def vectors(count: int = 1, *, width: int = 16) -> Tensor:
    """Vectors of a token, [N,D]; `tiny_bundle`'s text encoder has a width of 16."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def added(path: Path, *, token: str | None = None) -> Bundle:
    """The tiny model with a textual inversion."""
    bundle = tiny_bundle()
    add_embeddings(bundle, [Embedding(path=str(path), token=token)], [path])
    return bundle


def pipeline_of(bundle: Bundle) -> StableDiffusionPipeline:
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        **bundle.networks, tokenizer=bundle.tokenizer, scheduler=scheduler, **absent
    )


def check_equal(bundle: Bundle, pipeline: StableDiffusionPipeline) -> None:
    """Compare ids and encodings of captions with those of a pipeline."""
    for caption in CAPTIONS:
        ids = bundle.tokenize([caption])
        prompt = pipeline.maybe_convert_prompt(caption, pipeline.tokenizer)
        theirs = pipeline.tokenizer(prompt, padding="max_length", truncation=True).input_ids
        assert ids[0].tolist() == theirs
        with torch.inference_mode():
            encoded, _ = pipeline.encode_prompt(caption, "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(bundle.encode_text(ids), encoded, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tensor", [vectors()[0], vectors(1), vectors(3)], ids=["[D]", "[1,D]", "[3,D]"])
def test_ids_and_encodings_equal_diffusers(tmp_path, tensor):
    pipeline = pipeline_of(tiny_bundle())
    pipeline.load_textual_inversion({"<cat>": tensor})
    bundle = added(write(tmp_path / "learned_embeds.safetensors", {"<cat>": tensor}))
    check_equal(bundle, pipeline)
    assert bundle.encode_text(bundle.tokenize(["<cat>"])).ne(tiny_bundle().null_condition()).any()


def test_all_vectors_are_read_in_any_letter_case(tmp_path):
    bundle = added(write(tmp_path / "e.safetensors", {"emb_params": vectors(3)}), token="Easy-Negative")
    first = len(tiny_bundle().tokenizer)
    for caption in ("easy-negative", "EASY-negative", "Easy-Negative"):
        assert bundle.tokenize([caption])[0][1:5].tolist() == [first, first + 1, first + 2, first - 1]


def test_warning_counts_the_tokens_of_all_vectors(tmp_path):
    bundle = added(write(tmp_path / "e.safetensors", {"<cat>": vectors(20)}))
    assert "the caption has 20 tokens" in str(truncation_warning(bundle.tokenizer, "<cat>"))


@pytest.mark.parametrize(
    ("tensors", "metadata", "given", "token"),
    [
        ({"<Cat>": vectors()}, {}, None, "<cat>"),
        ({"<cat>": vectors()}, {}, "<dog>", "<dog>"),
        ({"emb_params": vectors(2)}, {}, None, "my-style"),
        ({"emb_params": vectors(2)}, {"name": "cat-toy"}, None, "cat-toy"),
    ],
)
def test_token_is_the_given_one_or_the_files(tmp_path, tensors, metadata, given, token):
    bundle = added(write(tmp_path / "my-style.safetensors", tensors, **metadata), token=given)
    (record,) = bundle.describe()["merged"]
    assert (record["embedding"], record["token"]) == ("my-style.safetensors", token)
    assert (record["vectors"], len(record["sha256"])) == (len(next(iter(tensors.values()))), 64)
    assert token in bundle.tokenizer.get_vocab()
    assert bundle.fingerprint()["text_encoder"] != tiny_bundle().fingerprint()["text_encoder"]


def test_several_are_added_by_a_source_and_saved(tiny_teacher, tmp_path):
    write(tmp_path / "cat.safetensors", {"<cat>": vectors(3)})
    write(tmp_path / "dog.safetensors", {"emb_params": vectors()})
    source = f"{tiny_teacher}?embedding={tmp_path}/cat.safetensors&embedding={tmp_path}/dog.safetensors:<dog>"
    bundle = load(source)
    captions = ["a <cat> and a <dog>", "<dog>", *CAPTIONS]
    expected = tokenize(bundle.tokenizer, captions)
    assert load_network(source, part="text_encoder").config.vocab_size == len(bundle.tokenizer)
    assert not any(value.requires_grad for value in bundle.text_encoder.parameters())
    save(bundle, tmp_path / "student", dtype=torch.float32, distillation={"steps": 2})
    student = load(str(tmp_path / "student"))
    torch.testing.assert_close(student.tokenize(captions), expected)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "student", low_cpu_mem_usage=False)
    check_equal(student, pipeline)


def test_model_with_a_token_has_the_guidance_of_its_kind(tmp_path):
    path = write(tmp_path / "e.safetensors", {"<cat>": vectors(width=64)})
    bundle = sd_shaped_bundle()
    add_embeddings(bundle, [Embedding(path="e")], [path])
    assert default_guidance(bundle) == 7.5


@pytest.mark.parametrize(
    ("tensors", "token", "message"),
    [
        ({"<cat>": vectors(width=1024)}, None, "have 1024 numbers.* 16, it is one of Stable Diffusion 2"),
        ({"clip_l": vectors(), "clip_g": vectors()}, None, "for SDXL"),
        ({"<cat>": vectors(), "<dog>": vectors()}, None, "is not a textual inversion"),
        ({"<cat>": torch.zeros(1, 1, 16)}, None, "is not a textual inversion"),
        ({"<cat>": torch.full((16,), float("nan"))}, None, "NaN or infinite"),
        ({"RED": vectors()}, None, "knows 'red' already; give another token as FILE:TOKEN"),
        ({"<cat>": vectors()}, "two words", "is not one word"),
        ({"<cat>": vectors()}, "", "is not one word"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, token, message):
    with pytest.raises(ModelError, match=message):
        added(write(tmp_path / "e.safetensors", tensors), token=token)


@pytest.mark.parametrize("second", ["<cat>", "<cat>_1", "<cat>_7"])
def test_token_of_another_inversion_is_refused(tmp_path, second):
    path = write(tmp_path / "e.safetensors", {"<cat>": vectors(2)})
    bundle = added(path)
    with pytest.raises(ModelError, match="knows '<cat>"):
        add_embeddings(bundle, [Embedding(path="e", token=second)], [path])


@pytest.mark.parametrize("name", ["style.pt", "learned_embeds.bin"])
def test_pickles_are_refused(tiny_teacher, tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(ModelError, match="may be pickles, which can run code: convert"):
        load(f"{tiny_teacher}?embedding={tmp_path / name}")
