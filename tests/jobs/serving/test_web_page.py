"""The page of a bundle, in Chromium: its token ids, noise and images, what it requests, shows and says."""

import json
import os
import random
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browser import BROWSER, WITHOUT_SIMD, Page, chromium
from conftest import tiny_student
from PIL import Image

from jobs.evaluation.bundle_images import fresh_noise
from jobs.serving.bundle_page import FETCHED, page_files
from jobs.serving.site import Site
from jobs.training.mobile_bundle import publish_bundle
from snapfusion.export.bundle import open_bundle
from snapfusion.export.loop import generate, to_uint8_image
from snapfusion.export.parity import psnr
from snapfusion.export.settings import Licence, MobileSettings
from snapfusion.mini.captions import VOCABULARY_SIZE, known_captions, knows_caption
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.models.tokenizer import clip_tokenizer, tokenize
from snapfusion.noise import gaussian, noise_key

PAGE = Path(__file__).parents[3] / "snapfusion/export/web"
CAPTIONS = ("red", "a red thing", "it's red, isn't it?")
SEED = 5
W = 2.0
PARENTS = {"model": {"source": "tiny", "settings_hash": None}, "decoder": None}

needs_chromium = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
needs_runtime = pytest.mark.skipif(
    not FETCHED.is_dir(), reason="onnxruntime-web is not here: make web fetches it"
)
pytestmark = [needs_chromium, pytest.mark.usefixtures("compiled_once")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, compiled_once, exported_once):
    """A tiny student's bundle for ExecuTorch and ONNX Runtime, with three captions."""
    return publish(tmp_path_factory.mktemp("web") / "mobile", onnx=("float32", "float16"))


@pytest.fixture(scope="module")
def renoised(tmp_path_factory, bundle):
    """A bundle of the same networks that adds noise at each step."""
    student = {"steps": 3, "sampler": "consistency", "points": 6}
    return publish(tmp_path_factory.mktemp("noise") / "mobile", onnx=("float32",), distillation=student)


def publish(path, *, onnx, distillation=None):
    settings = MobileSettings(
        executorch=("float32",),
        coreml=(),
        onnx=onnx,
        guidance=W,
        steps=3,
        seed=SEED,
        captions=CAPTIONS,
        licence=Licence(weights="Apache-2.0", data="CC0-1.0"),
    )
    model = tiny_student(seed=3)
    model.distillation = distillation
    publish_bundle(settings, bundle=model, decoder=None, parents=PARENTS, out_url=str(path))
    return path


@contextmanager
def served(folder):
    """The address of a bundle's page."""
    with site_of(page_files(folder, runtime=None)) as url:
        yield url


@contextmanager
def site_of(files):
    with Site(files, front="web/", port=0) as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield site.url
        site.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def url(bundle):
    with served(bundle) as url:
        yield url


@pytest.fixture
def page(browser):
    page = Page(browser)
    yield page
    page.close()


def opened(page, url, *, state="ready"):
    """The page when it has drawn its first image, or failed."""
    page.open(url)
    shown = " && !document.getElementById('times').hidden" if state == "ready" else ""
    page.wait(f"document.body?.dataset.state === {state!r}{shown}")
    return page


def status(page):
    return page.evaluate("document.getElementById('status').textContent")


TEXTS = (
    "",
    "a large red circle at the top on a white background",
    "A LARGE  Red\tcircle\n",
    "it's 3.14 o'clock -- “quoted”, naïve café don't we'll I'd they're you've I'm",
    "一只猫 😀 ﬁ Ａ",
    "word " * 200,
    "ΟΔΟΣ ΣΑΣ İstanbul ẞ",
    "<|endoftext|> <|STARTOFTEXT|> a<|startoftext|>b",
    "nbsp\u00a0next\u0085line\ufeffbom\u200bzero\u3000wide",
    "e\u0301 \u1100\u1161 12345 ¹²³ Ⅷ ٣",
    "🏳️‍🌈 #hash @at -- ... !!! ''s 's'",
)
"""On which similar tokenizers differ."""

_ALPHABET = "aAeéßΣσ ςİ'’\"-_.,!?0٣¹中日😀\u0301\u00a0\u0085\ufeff\u2028\t\n<|>sSTt#"


def random_texts(count):
    letters = random.Random(0)
    return ["".join(letters.choices(_ALPHABET, k=letters.randrange(1, 30))) for _ in range(count)]


TOKENIZE = """import("./tokenizer.js").then(async ({{ clipTokenizer }}) => {{
  const encode = clipTokenizer(await (await fetch("tokenizer.json")).json());
  return {texts}.map((text) => encode(text));
}})"""


def ids_in_browser(page, folder, texts):
    """Token ids by the page's tokenizer, of the `tokenizer.json` in a folder."""
    files = {"tokenizer.js": PAGE / "tokenizer.js", "tokenizer.json": folder / "tokenizer.json"}
    with site_of(files) as url:
        blank(page, f"{url}tokenizer.js")
        return page.evaluate(TOKENIZE.format(texts=json.dumps(list(texts))))


def blank(page, url):
    """Go to a source file, beside which others can be imported."""
    page.open(url)
    page.wait(f"document.readyState === 'complete' && location.href === {url!r}")


def expected_ids(tokenizer, texts):
    """Ids that `tokenize` gives, without padding and not truncated."""
    tokenizer.backend_tokenizer.no_padding()
    return [tokenizer(text, truncation=False, verbose=False)["input_ids"] for text in texts]


def test_token_ids_are_clips(page, tmp_path):
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    texts = [*TEXTS, *random_texts(400)]
    assert ids_in_browser(page, tmp_path, texts) == expected_ids(tokenizer, texts)


def test_token_ids_are_the_vectors(page, bundle):
    vectors = open_bundle(bundle).vectors
    found = ids_in_browser(page, bundle / "tokenizer", vectors.token_ids)
    for ids, row in zip(found, vectors.token_ids.values(), strict=True):
        assert ids == row[: len(ids)]


def test_textual_inversions_have_all_vectors(page, tmp_path):
    tokenizer = tiny_student().tokenizer
    tokenizer.add_tokens(["<red-cat>", "<red-cat>_1", "<red-cat>_2", "sks"])
    tokenizer.save_pretrained(tmp_path)
    texts = ["a <Red-Cat> here", "<red-cat>_1", "sks <red-cat>,red", "SKSred"]
    rows = tokenize(tokenizer, texts).tolist()
    for ids, row in zip(ids_in_browser(page, tmp_path, texts), rows, strict=True):
        assert ids[: len(row) - 1] == row[: min(len(ids), len(row) - 1)]


NOISE = """import("./noise.js").then(({{ gaussian, noiseKey }}) => {{
  const key = noiseKey(...{parts});
  return [String(key), Array.from(gaussian(key, 4099))];
}})"""


def test_noise_is_that_of_generate(page, url):
    keys = [(0, "red", 0), (7, "naïve “café” 😀\n\x7f\\", 0), (2**53 - 1, "word " * 100, 0)]
    blank(page, f"{url}web/noise.js")
    for parts in keys:
        key, numbers = page.evaluate(NOISE.format(parts=json.dumps(parts)))
        assert int(key) == noise_key(*parts)
        expected = gaussian(noise_key(*parts), (4099,)).numpy()
        # The two inverses of the normal distribution differ in their last bit of float64.
        np.testing.assert_array_max_ulp(np.array(numbers, np.float32), expected, maxulp=1)


def executorch_images(folder):
    """The image [1,3,H,W] of each caption, by ExecuTorch from the noise of `snapfusion generate`."""
    opened_bundle = open_bundle(folder)
    programs, tokenizer = opened_bundle.programs("executorch"), opened_bundle.tokenizer
    images = []
    for caption in opened_bundle.manifest["captions"]:
        ids = tokenize(tokenizer, ["", caption]).numpy().astype(np.int32)
        key, shape = noise_key(SEED, caption, 0), opened_bundle.latent_shape
        noises = {"noise": gaussian(key, shape)[None].numpy(), "fresh_noise": fresh_noise(key, shape)}
        sampler = opened_bundle.sampler
        images.append(generate(programs, ids=ids, sampler=sampler, w=sampler.guidance, **noises))
    return images


GENERATE = """(async () => {{
  const load = (name) => import(`{url}web/${{name}}`);
  const [files, runtime, model, {{ clipTokenizer }}, {{ gaussian, noiseKey }}] = await Promise.all(
    ["files.js", "runtime.js", "text_to_image.js", "tokenizer.js", "noise.js"].map(load));
  const ort = await runtime.loadRuntime("wasm", 1);
  const bundle = await model.openBundle(files.readFile, "{variant}");
  const encode = clipTokenizer(await files.readJson("tokenizer/tokenizer.json"));
  const images = [];
  for (const caption of {captions}) {{
    const rows = [bundle.empty, model.fitTokens(encode(caption), bundle.empty)];
    const count = bundle.manifest.latent_shape.reduce((product, side) => product * side, 1);
    const noise = gaussian(noiseKey({seed}, caption, 0), count);
    images.push(Array.from(await model.generate(ort, bundle, {{ rows, noise }})));
  }}
  return images;
}})()"""


@needs_runtime
@pytest.mark.parametrize(("variant", "at_least"), [("onnx", 80), ("onnx-float16", 50)])
def test_images_agree_with_executorch(variant, at_least, page, url, bundle):
    opened(page, url)
    script = GENERATE.format(url=url, variant=variant, captions=json.dumps(CAPTIONS), seed=SEED)
    for found, expected in zip(page.evaluate(script), executorch_images(bundle), strict=True):
        image = np.array(found, np.float32).reshape(expected.shape)
        assert psnr(image, expected, peak=np.abs(expected).max()) >= at_least


PIXELS = """(() => {
  const canvas = document.getElementById("image");
  return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
})()"""


@needs_runtime
def test_gate_captions_are_drawn_and_compared(page, url, bundle):
    check_gate_captions(page, url, bundle)


@needs_runtime
def test_noise_of_each_step_is_that_of_executorch(page, renoised):
    with served(renoised) as url:
        check_gate_captions(page, url, renoised)


def check_gate_captions(page, url, bundle):
    opened(page, url)
    for number, expected in enumerate(map(to_uint8_image, executorch_images(bundle))):
        page.evaluate("document.getElementById('result').hidden = true")
        page.evaluate(f"document.querySelectorAll('#gate-captions button')[{number}].click()")
        page.wait("document.body.dataset.state === 'ready' && !document.getElementById('result').hidden")
        pixels = np.array(page.evaluate(PIXELS)).reshape(*expected.shape[:2], 4)[..., :3]
        assert np.abs(pixels - expected.astype(int)).max() <= 1
        reference = np.asarray(Image.open(bundle / f"pictures/torch-{number}.png")).astype(int)
        largest = np.abs(pixels - reference).max()
        note = page.evaluate("document.getElementById('difference-note').textContent")
        assert note.startswith(f"× 32; at most {largest} of 255" if largest else "every pixel is equal")
    assert page.evaluate("document.querySelectorAll('figure.compared:not([hidden])').length") == 2
    assert page.errors == []


@needs_runtime
def test_other_requests_have_no_reference(page, url):
    opened(page, f"{url}?seed=6&guidance=3&caption=a+thing")
    assert page.evaluate("document.querySelectorAll('figure.compared[hidden]').length") == 2
    shown = page.evaluate("document.getElementById('drawn-caption').textContent")
    assert shown == "“a thing”, seed 6, guidance 3"


@needs_runtime
def test_no_request_leaves_the_origin(page, url):
    opened(page, url)
    asked = [name for name in page.requests if not name.startswith(("data:", "blob:"))]
    assert any(name.endswith(".wasm") for name in asked)
    assert any(name.endswith("onnx-float16/unet.onnx") for name in asked)
    assert [name for name in asked if not name.startswith(url)] == []


@needs_runtime
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_the_screen(page, url, width):
    page.resize(width)
    opened(page, url)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(Path(folder) / f"page-{width}.png")


@needs_runtime
def test_a_long_caption_is_cut_and_said(page, url):
    opened(page, url)
    page.evaluate(f"document.getElementById('caption').value = {json.dumps('red ' * 500)}")
    page.evaluate("document.getElementById('truncated').hidden = true")
    page.evaluate("document.getElementById('form').requestSubmit()")
    page.wait("!document.getElementById('truncated').hidden")
    said = page.evaluate("document.getElementById('truncated').textContent")
    assert said == "The caption has 500 tokens, and only the first 14 are read."


def test_a_missing_runtime_is_explained(page, bundle, tmp_path):
    files = {name: path for name, path in page_files(bundle, runtime=None).items() if "/ort" not in name}
    with site_of(files) as url:
        opened(page, url, state="failed")
        assert status(page) == "onnxruntime-web, which runs the model, is not beside this page."
        page.wait("document.getElementById('runtime-files').textContent")
        help_text = page.evaluate("document.getElementById('missing-runtime').innerText")
    assert "make web" in help_text
    assert "npm pack onnxruntime-web@" in help_text
    assert "ort.wasm.bundle.min.mjs" in help_text


def broken(bundle, name, *, content, folder):
    """The page's files with one left out, or with other content."""
    files = page_files(bundle, runtime=None)
    if content is None:
        del files[name]
    else:
        files[name] = folder / "other"
        files[name].write_bytes(content)
    return files


@needs_runtime
@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "manifest.json",
            None,
            "manifest.json is missing (HTTP 404): this page belongs into web/ of a whole",
        ),
        ("sampler.json", b"<html>", "sampler.json is not JSON: copy the bundle again."),
        ("onnx-float16/unet.onnx", None, "onnx-float16/unet.onnx is missing (HTTP 404): this page belongs"),
        ("onnx-float16/unet.onnx", b"x", "onnx-float16/unet.onnx is not the file that the manifest records"),
        ("web/worker.js", None, "web/worker.js is missing, or this browser is too old for it."),
    ],
)
def test_broken_files_are_one_line(page, bundle, tmp_path, name, content, line):
    with site_of(broken(bundle, name, content=content, folder=tmp_path)) as url:
        opened(page, url, state="failed")
        assert status(page).startswith(line)


@needs_runtime
def test_captions_that_the_miniature_knows(page, bundle, tmp_path):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["known_captions"] = known_captions(vocabulary_size=VOCABULARY_SIZE)
    known = {"name": "manifest.json", "content": json.dumps(manifest).encode(), "folder": tmp_path}
    with site_of(broken(bundle, **known)) as url:
        opened(page, f"{url}?caption=a+dog")
        unknown = "document.getElementById('unknown')"
        assert page.evaluate(f"{unknown}.hidden") is False
        assert f"It knows {NUM_CAPTIONS:,} captions" in page.evaluate(f"{unknown}.textContent")
        page.evaluate(CHOOSE)
        assert page.evaluate(f"{unknown}.hidden") is True
        caption = page.evaluate("document.getElementById('caption').value")
        assert caption == "a small red circle at the top on a gray background"
        assert knows_caption(caption)


CHOOSE = """(() => {
  const [size, color, shape, position, background] = document.querySelectorAll("#builder select");
  background.value = "gray";
  background.dispatchEvent(new Event("input", { bubbles: true }));
})()"""


@pytest.mark.slow
def test_a_browser_without_simd_is_told(bundle, tmp_path):
    with served(bundle) as url, chromium(tmp_path / "profile", WITHOUT_SIMD) as old:
        page = opened(Page(old), url, state="failed")
        assert status(page) == (
            "This browser has no WebAssembly with SIMD, which ONNX Runtime needs: take a newer one."
        )
