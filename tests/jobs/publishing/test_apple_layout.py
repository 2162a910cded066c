"""`export --to apple`: packages with the ports of Apple's ml-stable-diffusion, which agree with torch."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import tiny_bundle, tiny_student
from tokenizers import Tokenizer
from tokenizers.models import BPE

from jobs import command
from snapfusion.export.apple_modules import apple_modules
from snapfusion.export.apple_resources import AppleLayoutError, check_apple_layout, write_apple_resources
from snapfusion.export.coreml_package import describe_package, read_program
from snapfusion.export.mil import evaluate
from snapfusion.export.settings import AppleSettings
from snapfusion.models.decoder import HalfDecoder
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.schedule import Schedule

# Of a tiny model with two conditions, 16 channels of a caption and 16 tokens. Names, ranks and dtypes are
# those that Apple's converter states and its pipelines check.
PORTS = {
    "TextEncoder": (
        [("input_ids", (1, 16), "FLOAT32")],
        ("last_hidden_state", (1, 16, 16), "FLOAT32"),
    ),
    "Unet": (
        [
            ("sample", (2, 4, 8, 8), "FLOAT16"),
            ("timestep", (2,), "FLOAT16"),
            ("encoder_hidden_states", (2, 16, 1, 16), "FLOAT16"),
        ],
        ("noise_pred", (2, 4, 8, 8), "FLOAT32"),
    ),
    "VAEDecoder": ([("z", (1, 4, 8, 8), "FLOAT16")], ("image", (1, 3, 16, 16), "FLOAT32")),
}
SETTINGS = AppleSettings(caption="red", steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The resources of a saved student that predicts v."""
    folder = tmp_path_factory.mktemp("apple")
    save(tiny_student(seed=3), folder / "model", dtype=torch.float32, distillation={"steps": 3})
    words = ["export", str(folder / "model"), "--to", "apple", "--out", str(folder / "resources")]
    assert command.main([*words, "--caption", "red", "--guidance", "2"]) == 0
    return folder


@pytest.mark.parametrize("name", PORTS)
def test_ports_are_those_of_apples_pipelines(name, exported):
    description = describe_package(exported / "resources" / f"{name}.mlpackage")
    inputs, output = PORTS[name]
    assert [dataclasses.astuple(port) for port in description.inputs] == inputs
    assert [dataclasses.astuple(port) for port in description.outputs] == [output]


def test_folder_has_packages_tokenizer_and_texts(exported):
    names = {path.name for path in (exported / "resources").iterdir()}
    packages = {f"{name}.mlpackage" for name in PORTS}
    assert names == packages | {"vocab.json", "merges.txt", "README.md", "MODEL_CARD.md"}
    text = (exported / "resources/README.md").read_text()
    assert "configuration.stepCount = 3\nconfiguration.guidanceScale = 2\n" in text
    assert "configuration.schedulerType = .dpmSolverMultistepScheduler\n" in text
    assert "for name in TextEncoder Unet VAEDecoder; do xcrun coremlcompiler compile" in text
    decibels = dict(re.findall(r"^- (\w+): ([\d.]+) dB$", text, re.MULTILINE))
    assert set(decibels) == {*PORTS, "image"}
    assert min(map(float, decibels.values())) > 50


def test_tokenizer_files_give_the_models_ids(exported):
    folder = exported / "resources"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert (folder / "merges.txt").read_bytes().endswith(b"\n")
    tokenizer = Tokenizer(
        BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>")
    )
    ids = load(str(exported / "model")).tokenize(["red"])[0].tolist()
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    found = [start, *tokenizer.encode("red").ids, end]
    assert ids == [*found, *[end] * (16 - len(found))]


def test_a_network_for_v_gives_eps(exported):
    bundle = load(str(exported / "model"))
    random = np.random.default_rng(0)
    sample, c = (
        random.standard_normal((2, 4, 8, 8), np.float32),
        random.standard_normal((2, 16, 16), np.float32),
    )
    program = read_program(exported / "resources/Unet.mlpackage")
    for time in (999, 333):
        inputs = [sample, np.full(2, time, np.float32), c.transpose(0, 2, 1)[:, :, None]]
        t = torch.full((2,), time)
        v = bundle.predict(torch.from_numpy(sample), t, torch.from_numpy(c)).numpy()
        alpha_t, sigma_t = bundle.schedule.coefficients(time)
        np.testing.assert_allclose(
            evaluate(program, inputs), alpha_t * v + sigma_t * sample, atol=0.02, err_msg=f"t = {time}"
        )


@pytest.mark.slow
def test_large_unets_are_chunked_and_compressed(tmp_path):
    bundle = tiny_student(seed=3)
    half = HalfDecoder.from_vae(bundle.vae)
    for name in ("resources", "packages"):
        (tmp_path / name).mkdir()
    changes = {"weights": "int8", "conditions": 1, "chunk_bytes": 1, "attention": "diffusers"}
    written = write_apple_resources(
        tmp_path / "resources",
        bundle=bundle,
        decoder=half,
        settings=SETTINGS.model_copy(update=changes),
        scratch=tmp_path / "packages",
        log=lambda _: None,
    )
    assert list(written.packages) == ["TextEncoder", "UnetChunk1", "UnetChunk2", "VAEDecoder"]
    assert written.parity["image"].psnr_db > 20
    chunk = describe_package(tmp_path / "resources/UnetChunk1.mlpackage")
    assert ("timestep", (1,), "FLOAT16") in [dataclasses.astuple(port) for port in chunk.inputs]


def test_decoder_takes_latents_over_their_own_factor():
    bundle = tiny_bundle()
    module = apple_modules(bundle, decoder=None, conditions=2, layout="diffusers")["VAEDecoder"]
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = module.network(latent / 0.18215).clamp(-1, 1)
    torch.testing.assert_close(found, bundle.decode(latent), atol=1e-5, rtol=1e-5)


def test_another_noise_schedule_is_refused():
    bundle = dataclasses.replace(tiny_bundle(), schedule=Schedule(beta_end=0.02))
    with pytest.raises(AppleLayoutError, match="another noise schedule"):
        check_apple_layout(bundle)


def test_a_w_conditioned_student_is_refused_in_one_line(tmp_path, capsys):
    bundle = tiny_bundle()
    bundle.unet = with_guidance_embedding(bundle.unet)
    save(bundle, tmp_path / "model", dtype=torch.float32)
    words = ["export", str(tmp_path / "model"), "--to", "apple", "--out", str(tmp_path / "out")]
    assert command.main(words) == 2
    assert re.fullmatch(r"export: the UNet has a guidance embedding, .*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
