"""The guides for applications agree with a bundle: their arithmetic, and every name in them."""

import base64
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from math import pi
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from conftest import tiny_bundle

import snapfusion.export.build
import snapfusion.export.variants
from jobs.training.mobile_bundle import publish_bundle
from snapfusion.export.bundle import LICENCE, MODULES, SAFETY_CHECKER, SAMPLER, TOKENIZER, VECTORS
from snapfusion.export.layout import MANIFEST
from snapfusion.export.loop import to_uint8_image
from snapfusion.export.modules import TIMESTEP
from snapfusion.export.settings import Licence, MobileSettings
from snapfusion.export.variants import variants_of
from snapfusion.export.vectors import INDEX, read_vectors

INFRA = Path(__file__).parents[2] / "infra"
SWIFT, KOTLIN = INFRA / "ios/TextToImage.swift", INFRA / "android/TextToImage.kt"
WEB = INFRA.parent / "snapfusion/export/web"
JAVASCRIPT = WEB / "text_to_image.js"
SOURCES = (SWIFT, KOTLIN, JAVASCRIPT)
GUIDES = (INFRA / "ios/README.md", INFRA / "android/README.md", INFRA / "onnx/README.md")
CAPTIONS = ("red", "a red square, it's large")
LONG = "red square " * 30
W = 7.5
STEPS = 4


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return publish(tiny_bundle(), tmp_path_factory.mktemp("mobile") / "bundle", guidance=W)


@pytest.fixture(scope="module")
def renoised(tmp_path_factory):
    """Of a student that takes one pass a step, and fresh noise after it."""
    bundle = tiny_bundle()
    bundle.distillation = {"steps": STEPS, "sampler": "consistency", "points": 2 * STEPS}
    bundle.distillation["cfg_range"] = {"low": 1.0, "high": 1.0}
    return publish(bundle, tmp_path_factory.mktemp("renoised") / "bundle", guidance=1.0)


def publish(bundle, path, *, guidance):
    """A bundle whose programs are torch's own networks, and these: nothing here is about compilers."""
    networks = {}

    def compile_executorch(module, **_):
        networks[module.name] = module
        return module.name.encode()

    licence = Licence(weights="Apache-2.0", data="made here")
    sampling = {"captions": CAPTIONS, "guidance": guidance, "steps": STEPS}
    settings = MobileSettings(executorch=("float32",), coreml=(), licence=licence, **sampling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapfusion.export.variants, "compile_executorch", compile_executorch)
        patch.setattr(
            snapfusion.export.variants, "ExecuTorchProgram", lambda path: networks[path.stem].reference
        )
        # In this process, where the compiler is replaced.
        patch.setattr(snapfusion.export.build, "worker_processes", lambda _: ThreadPoolExecutor(1))
        patch.setattr(snapfusion.export.build, "num_processes", lambda **_: 1)
        publish_bundle(settings, bundle=bundle, decoder=None, parents=PARENTS, out_url=str(path))
    return SimpleNamespace(
        folder=path,
        # In the order that a program takes them.
        inputs={name: [port.name for port in networks[name].inputs] for name in MODULES},
        manifest=json.loads((path / MANIFEST).read_text()),
        sampler=json.loads((path / SAMPLER).read_text()),
        vectors=read_vectors(path / VECTORS),
    )


PARENTS = {"model": {"source": "tiny", "settings_hash": None}, "decoder": None}


def block(text, name):
    """The lines between the markers of `name`, each translated to Python."""
    blocks = re.findall(rf"^ *// begin {name}\b.*\n((?:.*\n)+?) *// end {name}$", text, re.MULTILINE)
    assert len(blocks) == 1, name
    return [python(line.strip()) for line in blocks[0].splitlines()]


def python(line):
    """A statement of Swift, Kotlin or JavaScript in Python, for the few forms that the marked lines have."""
    line = re.sub(r"^(let|val|const) ", "", line).removesuffix(";").replace("===", "==")
    line = re.sub(r"^(\w+ = )if \((.+?)\) (.+?) else if \((.+?)\) (.+?) else (.+)$", TERNARY, line)
    line = re.sub(r"^(\w+ = )(.+?) \? (.+?) : (.+?) \? (.+?) : (.+)$", TERNARY, line)
    line = re.sub(r"^(\w+ = )(.+)\.rounded\(\.toNearestOrEven\)$", r"\1rint(\2)", line)
    line = re.sub(r"\.to(Double|Int)\(\)", "", line)
    line = re.sub(r"\b(?:Math|Double)\.", "", line)
    line = re.sub(r"\b(\w+)\.(?:size|count|length)\b", r"len(\1)", line)
    for theirs, ours in (("&&", "and"), (" shl ", " << "), (") or (", ") | ("), (") or blue", ") | blue")):
        line = line.replace(theirs, ours)
    return line


TERNARY = r"\1\3 if \2 else \5 if \4 else \6"


def compute(text, name, **given):
    """The variables after executing the marked lines in NumPy's arithmetic."""
    known = {"max": np.maximum, "min": np.minimum, "rint": np.rint, "UInt8": np.uint8, "len": len}
    known |= {"sqrt": np.sqrt, "log": np.log, "cos": np.cos, "pi": pi, "PI": pi, "fround": np.float32}
    values = {"__builtins__": {}, **known, **given}
    for line in block(text, name):
        exec(line, values)
    return values


def advance(text, *, z, outputs, w, step):
    """The latent after a step; `i` in the source stands for all indices at once."""
    values = SimpleNamespace(fromZ=np.float32(step["from_z"]), fromOutput=np.float32(step["from_output"]))
    indices = np.arange(z.size)
    latent = compute(text, "advance", z=z, outputs=outputs, w=np.float32(w), step=values, i=indices)["next"]
    assert latent.dtype == np.float32
    return latent


def renoise(text, *, z, fresh, step):
    """The latent with fresh noise; Swift names the coefficient alone."""
    coefficient = np.float32(step["from_noise"])
    known = {"step": SimpleNamespace(fromNoise=coefficient), "fromNoise": coefficient}
    return compute(text, "renoise", z=z, fresh=fresh, i=np.arange(z.size), **known)["next"]


def check_steps(text, published):
    arrays, sampler = published.vectors.arrays, published.sampler
    z = arrays["noise"].ravel()
    for number, step in enumerate(sampler["steps"]):
        expected = arrays[f"z-{number}"].ravel()
        outputs = arrays[f"output-{number}"].ravel()
        # Of a single output the other one counts for nothing.
        outputs = np.concatenate([outputs, outputs]) if outputs.size == z.size else outputs
        z = advance(text, z=z, outputs=outputs, w=sampler["guidance"], step=step)
        if step.get("from_noise"):
            z = renoise(text, z=z, fresh=arrays[f"noise-{number}"].ravel(), step=step)
        np.testing.assert_allclose(z, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_each_step_reproduces_the_vectors(source, published):
    assert published.vectors.num_steps == STEPS == len(published.sampler["steps"])
    check_steps(source.read_text(), published)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_fresh_noise_reproduces_the_vectors(source, renoised):
    assert (renoised.manifest["format"], renoised.sampler["solver"]) == (3, "consistency")
    text = source.read_text()
    check_steps(text, renoised)
    for right, wrong in (("z[i] + ", "z[i] - "), ("fresh[i]", "fresh[0]")):
        begin, mark, after = text.partition("begin renoise")
        assert right in after
        changed = begin + mark + after.replace(right, wrong, 1)
        with pytest.raises(AssertionError):
            check_steps(changed, renoised)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("w * cond - (w - 1) * uncond", "w * cond - w * uncond"),
        ("w * cond - (w - 1) * uncond", "w * uncond - (w - 1) * cond"),
        ("uncond = outputs[i]", "uncond = outputs[0]"),
        ("step.fromZ * z[i] + step.fromOutput * output", "step.fromOutput * z[i] + step.fromZ * output"),
        ("step.fromZ * z[i] + step.fromOutput * output", "step.fromZ * z[i] - step.fromOutput * output"),
        ("step.fromZ * z[i]", "z[i]"),
        ("// begin advance", "//"),
    ],
)
def test_wrong_steps_are_noticed(source, right, wrong, published):
    text = source.read_text()
    assert right in text
    with pytest.raises(AssertionError):
        check_steps(text.replace(right, wrong), published)


def swapped_rows(text):
    text = re.sub(r"uncond = (outputs\[i\])", r"uncond = OTHER", text)
    text = re.sub(r"cond = (outputs\[z\.\w+ \+ i\])", r"cond = outputs[i]", text, count=1)
    return text.replace("OTHER", "outputs[z.count + i]")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_swapped_rows_are_noticed(source, published):
    with pytest.raises(AssertionError):
        check_steps(swapped_rows(source.read_text()), published)


def test_the_empty_caption_is_the_first_row(published):
    token_ids = published.vectors.token_ids
    assert published.vectors.arrays["token_ids"].tolist() == [token_ids[""], token_ids[CAPTIONS[0]]]


def pixels(source, image, *, text=None):
    """The pixels [H,W,3] that the source computes from an image [1,3,H,W]."""
    text, (height, width) = text or source.read_text(), image.shape[2:]
    size, flat = height * width, image.ravel()
    indices = np.arange(size)
    if source == KOTLIN:

        def level(value):
            return compute(text, "level", value=value)["level"].astype(np.int64)

        colors = compute(text, "colors", image=flat, size=size, i=indices, level=level)["color"]
        assert (colors >> 24 == 255).all()
        return np.stack([colors >> shift & 255 for shift in (16, 8, 0)], axis=-1).reshape(height, width, 3)
    rgba = np.full(4 * size, 255, np.float32 if source == JAVASCRIPT else np.uint8)
    for channel in range(3):
        compute(text, "rgba", image=flat, size=size, i=indices, channel=channel, bytes=rgba)
    if source == JAVASCRIPT:
        assert "bytes = new Uint8ClampedArray(" in text
        # As that array stores numbers.
        rgba = np.rint(rgba).clip(0, 255).astype(np.uint8)
    rgba = rgba.reshape(height, width, 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_pixels_are_those_of_the_bundle(source, published):
    image = published.vectors.arrays["image"]
    np.testing.assert_array_equal(pixels(source, image), to_uint8_image(image))
    # Halves round to even, and what rounding in float16 pushes out of the range is put back.
    values = [0, 1, 0.5 / 255, 1.5 / 255, 2.5 / 255, -0.001, 1.001, 0.5]
    edges = np.array(values * 6, np.float32).reshape(1, 3, 4, 4)
    np.testing.assert_array_equal(pixels(source, edges), to_uint8_image(edges))


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        (SWIFT, "channel * size + i", "3 * i + channel"),
        (SWIFT, "255 * image", "256 * image"),
        (SWIFT, ".rounded(.toNearestOrEven)", " - 0.5"),
        (JAVASCRIPT, "channel * size + i", "3 * i + channel"),
        (JAVASCRIPT, "255 * image", "256 * image"),
        (KOTLIN, "red shl 16", "red shl 0"),
        (KOTLIN, "level(image[size + i])", "level(image[i + 1])"),
        (KOTLIN, "Math.rint((255 * value).toDouble())", "(255 * value).toDouble()"),
    ],
)
def test_wrong_pixels_are_noticed(source, right, wrong):
    text = source.read_text()
    assert right in text
    image = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    changed, expected = text.replace(right, wrong), to_uint8_image(image)
    with pytest.raises((AssertionError, IndexError)):
        np.testing.assert_array_equal(pixels(source, image, text=changed), expected)


def fit_tokens(text, *, ids, empty):
    last = len(empty) - 1
    known = {"ids": ids, "empty": empty, "last": last, "end": empty[1], "padding": empty[last]}
    return [compute(text, "fitTokens", **known, i=i)["id"] for i in range(len(empty))]


@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"], ids=["SD-v1.5", "SD-v2"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_token_ids_are_fitted(source, padding):
    text, bundle = source.read_text(), tiny_bundle()
    bundle.tokenizer.pad_token = padding
    captions = ("", *CAPTIONS, LONG)
    empty, *_ = rows = bundle.tokenize(captions).tolist()
    for caption, row in zip(captions, rows, strict=True):
        plain = bundle.tokenizer(caption, padding=False, truncation=False)["input_ids"]
        # From a tokenizer that neither cuts nor pads, and from one that does both.
        assert fit_tokens(text, ids=plain, empty=empty) == fit_tokens(text, ids=row, empty=empty) == row
    assert len(plain) > len(empty)
    names = ("last", "end", "padding")
    first, *others = [re.search(rf"{name} = (empty[^;\n]*)", text)[1] for name in names]
    first = re.sub("count|length", "size", first)
    assert (first, others) == ("empty.size - 1", ["empty[1]", "empty[last]"])


@pytest.mark.parametrize("conditions", [1, 2])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_conditions_are_split_for_the_unet(source, conditions, published):
    _, length, width = published.manifest["variants"]["executorch"]["modules"]["unet"]["inputs"]["c"]["shape"]
    manifest = SimpleNamespace(conditions=conditions)
    bundle = SimpleNamespace(conditions=conditions, manifest=manifest)
    (line,) = block(source.read_text(), "part")
    values = {"c": [0.0] * (2 * length * width), "manifest": manifest, "bundle": bundle, "len": len}
    exec(line.replace("/", "//"), values)
    assert values["part"] == conditions * length * width


def test_noise_is_unit_gaussian():
    u, v = np.random.default_rng(0).random((2, 100_000))
    normal = compute(SWIFT.read_text(), "gaussian", u=1 - u, v=v)["normal"]
    assert scipy.stats.kstest(normal, "norm").pvalue > 0.01


def quoted(source):
    """Every string in the code, without comments."""
    code = re.sub(r"//.*|/\*[\s\S]*?\*/", "", source.read_text())
    return set(re.findall(r'"([^"]*)"', code))


def keys_of(value):
    """Every key of a JSON value, at any depth."""
    if isinstance(value, list):
        return {key for each in value for key in keys_of(each)}
    if not isinstance(value, dict):
        return set()
    return value.keys() | {key for each in value.values() for key in keys_of(each)}


@pytest.mark.parametrize("source", [SWIFT, KOTLIN], ids=lambda path: path.name)
def test_names_in_the_source_are_the_bundles(source, published, renoised):
    names = keys_of([published.manifest, published.sampler, renoised.sampler])
    known = {MANIFEST, SAMPLER, "mlmodelc", *MODULES, *names}
    assert quoted(source) <= known
    used = {name for names in published.inputs.values() for name in names}
    assert quoted(source) >= {MANIFEST, SAMPLER, *MODULES, *used, "from_z", "from_output", "from_noise"}
    assert (published.folder / MANIFEST).exists()
    assert (published.folder / SAMPLER).exists()


def test_kotlin_passes_inputs_in_order(published):
    text, inputs = KOTLIN.read_text(), published.inputs
    assert inputs == {"text_encoder": ["token_ids"], "unet": ["z_t", "t", "c"], "decoder": ["latent"]}
    assert "unet.compute(zT, t, it)" in text
    ports = re.findall(
        r'val (\w+) = Tensor\.fromBlob\(.*inputShape\("unet", "(\w+)"\)\)$', text, re.MULTILINE
    )
    assert {("zT", "z_t"), ("t", "t")} <= set(ports)


def test_swift_passes_inputs_by_name(published):
    text = SWIFT.read_text()
    given = [re.findall(r'"(\w+)":', names) for names in re.findall(r"\.run\(\[(.*)\]\)", text)]
    assert given == list(published.inputs.values())
    # In a Core ML package `t` alone is float32.
    assert re.search(rf"let {TIMESTEP} = MLFeatureValue\(shapedArray: MLShapedArray<Float>\(", text)


def test_swift_decodes_existing_fields(published):
    """A `Decodable` fails on a missing key, so every field that is not optional must exist in the JSON."""
    text = SWIFT.read_text()
    module = published.manifest["variants"]["executorch"]["modules"]["unet"]
    values = {
        "Step": published.sampler["steps"][0],
        "Sampler": published.sampler,
        "Port": module["inputs"]["c"],
        "Module": module,
        "Variant": published.manifest["variants"]["executorch"],
        "Manifest": published.manifest,
    }
    renamed = dict(re.findall(r'case (\w+) = "(\w+)"', text))
    for name, json_values in values.items():
        indent, body = re.search(
            rf"^( *)struct {name}: Decodable {{\n([\s\S]*?)\n\1}}", text, re.MULTILINE
        ).groups()
        fields = re.findall(rf"^{indent}    let (\w+): [^?\n]+$", body, re.MULTILINE)
        assert fields
        assert {renamed.get(field, field) for field in fields} <= json_values.keys(), name


def leads_to_value(path, *, values):
    """Whether the path `a.b[].c` exists in JSON values; NAME stands for any key."""
    for part in path.split("."):
        key = part.removesuffix("[]")
        if key == "NAME":
            values = next(iter(values.values()))
        elif isinstance(values, dict) and key in values:
            values = values[key]
        else:
            return False
        if part.endswith("[]"):
            values = values[0]
    return True


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_tables_of_guides_name_existing_keys(guide, published):
    rows = re.findall(r"^\| `([\w./]+\.json)` \| `([^`]+)` \|", guide.read_text(), re.MULTILINE)
    assert len(rows) > 8
    for file, path in rows:
        assert leads_to_value(path, values=json.loads((published.folder / file).read_text())), (file, path)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_files_and_variants_of_guides_exist(guide, published):
    text = guide.read_text()
    every = MobileSettings(
        executorch=("float32", "int8", "coreml"),
        coreml=("float16", "palette-6", "palette-8", "int8"),
        onnx=("float32", "float16", "int8"),
    )
    variants = {variant.name for variant in variants_of(every)}
    named = set(re.findall(r"`((?:executorch|coreml|onnx)(?:-[\w-]+)?)/?`", text))
    assert named
    assert named <= variants
    for name in (MANIFEST, SAMPLER, f"{TOKENIZER}/tokenizer.json", f"{VECTORS}/{INDEX}"):
        assert f"`{name}`" in text
        assert (published.folder / name).exists()
    for name in (LICENCE, SAFETY_CHECKER, "MODEL_CARD.md"):
        assert f"`{name}`" in text


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_guides_state_the_step_of_their_source(guide):
    source = SOURCES[GUIDES.index(guide)].read_text()
    stated = dict(re.findall(r"^(output|z) += (.*)$", guide.read_text(), re.MULTILINE))
    assert re.search(rf"output = {re.escape(stated['output'])};?\n", source)
    formula = re.search(r"next = ([^;\n]*)", source)[1]
    for theirs, ours in (("step.fromZ", "from_z"), ("step.fromOutput", "from_output"), ("z[i]", "z")):
        formula = formula.replace(theirs, ours)
    assert formula == stated["z"]


@pytest.mark.parametrize(
    ("guide", "source"), list(zip(GUIDES, SOURCES, strict=True)), ids=["ios", "android", "onnx"]
)
def test_guides_call_functions_of_their_source(guide, source):
    code = source.read_text() + ((WEB / "noise.js").read_text() if source == JAVASCRIPT else "")
    defined = set(re.findall(r"\b(?:func?|function) (?:<T> )?(?:Module\.)?(\w+)", code))
    text = guide.read_text()
    for call in ("fitTokens", "gaussian", "generate"):
        assert call in defined
        assert re.search(rf"\b{call}\(", text)


REPLAY = """
import fs from "node:fs/promises";
import path from "node:path";
const [, , source, folder, variant] = process.argv;
const { generate, openBundle, rgba } = await import(source);
const { noiseKey, stepNoise } = await import(path.join(path.dirname(source), "noise.mjs"));
const read = async (name) => new Uint8Array(await fs.readFile(path.join(folder, name))).buffer;
const floats = async (name) => new Float32Array(await read(`vectors/${name}.f32`));
const bundle = await openBundle(read, variant);
const index = JSON.parse(await fs.readFile(path.join(folder, "vectors/vectors.json")));
const rows = Object.values(index.token_ids);
const c = await floats("c");
let step = 0;
const run = async (inputs) => {
  if (inputs.token_ids) {
    const row = rows.findIndex((ids) => String(ids) === String(inputs.token_ids.data));
    return { c: { data: c.slice(row * c.length / 2, (row + 1) * c.length / 2) } };
  }
  if (inputs.latent) {
    const expected = await floats(`z-${step - 1}`);
    const close = expected.every((value, i) => Math.abs(value - inputs.latent.data[i]) < 1e-4);
    return { image: { data: close ? await floats("image") : new Float32Array(0) } };
  }
  const given = c.slice(inputs.c.data.length === c.length ? 0 : c.length / 2);
  const equal = inputs.c.data.every((value, i) => value === given[i]);
  const expected = equal && inputs.t.data[0] === bundle.steps[step].t;
  return { output: { data: expected ? await floats(`output-${step++}`) : [] } };
};
class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
const ort = { Tensor, InferenceSession: { create: async () => ({ run, release: async () => {} }) } };
const noise = await floats("noise");
const { seed } = bundle.manifest.identity.settings;
const freshNoise = stepNoise(noiseKey(seed, index.caption, 0), noise.length);
const image = await generate(ort, bundle, { rows: rows.slice(0, 2), noise, freshNoise });
process.stdout.write(Buffer.from(rgba(image)).toString("base64"));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_javascript_draws_the_vectors_image(published, tmp_path):
    check_replay(published, tmp_path)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_javascript_takes_one_pass_with_folded_guidance(tmp_path):
    bundle = tiny_bundle()
    bundle.distillation = {"steps": STEPS, "cfg_range": {"low": 1.0, "high": 1.0}}
    one_pass = publish(bundle, tmp_path / "bundle", guidance=1.0)
    assert (one_pass.manifest["conditions"], one_pass.manifest["folded_guidance"]) == (1, 1.0)
    check_replay(one_pass, tmp_path)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_javascript_adds_the_noise_of_generate(renoised, tmp_path):
    check_replay(renoised, tmp_path)


def check_replay(published, tmp_path):
    """The whole source, with a runtime that gives the outputs of the test vectors for their inputs."""
    (tmp_path / "replay.mjs").write_text(REPLAY)
    source = shutil.copy(JAVASCRIPT, tmp_path / "text_to_image.mjs")
    shutil.copy(WEB / "noise.js", tmp_path / "noise.mjs")
    command = ["node", tmp_path / "replay.mjs", source, published.folder, "executorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pixels = np.frombuffer(base64.b64decode(done.stdout), np.uint8).reshape(16, 16, 4)
    np.testing.assert_array_equal(pixels[..., :3], to_uint8_image(published.vectors.arrays["image"]))


def test_vectors_are_raw_numbers(published):
    for entry in json.loads((published.folder / VECTORS / INDEX).read_text())["arrays"].values():
        path = published.folder / VECTORS / entry["file"]
        assert path.suffix in {".f32", ".i32"}
        assert path.stat().st_size == 4 * np.prod(entry["shape"])
