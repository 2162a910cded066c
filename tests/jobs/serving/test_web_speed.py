"""Speed of a bundle's page in Chromium: beside native ONNX Runtime, and until it can draw.

BUNDLE=runs/demo/mobile pytest -m slow --capture=no tests/jobs/serving/test_web_speed.py
"""

import json
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from browser import BROWSER, Page, chromium

from jobs import compile_mobile
from jobs.serving.bundle_page import FETCHED, page_files
from jobs.serving.site import Site
from snapfusion.export.bundle import MODULES, open_bundle
from snapfusion.export.onnx_runtime import OnnxProgram

TURNS = 15
CALLS = 10
OPENINGS = 6
VARIANT = "onnx-float16"
MAX_RATIO, MAX_READY_SECONDS, MAX_BYTES = 4.0, 2.0, 5e6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here"),
    pytest.mark.skipif(not FETCHED.is_dir(), reason="onnxruntime-web is not here: make web fetches it"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The bundle that BUNDLE names, else that of the miniature in four steps."""
    if named := os.environ.get("BUNDLE"):
        return Path(named)
    out = tmp_path_factory.mktemp("speed")
    settings = ["executorch=[]", "coreml=[]", 'onnx=["float32", "float16"]', "decoder=null", "steps=4"]
    words = [word for setting in settings for word in ("--set", f"mobile.{setting}")]
    assert compile_mobile.main(["mini-v", "--out", str(out), *words]) == 0
    return out / "mobile"


@contextmanager
def page_of(bundle, profile):
    files = page_files(bundle, runtime=None)
    with Site(files, front="web/", port=0) as site, chromium(profile) as browser:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield Page(browser), site.url
        site.shutdown()
        thread.join()


OPEN = """(async () => {{
  const load = (name) => import(`{url}web/${{name}}`);
  const [files, runtime, model] = await Promise.all(["files.js", "runtime.js", "text_to_image.js"].map(load));
  const ort = await runtime.loadRuntime("wasm", 1);
  const bundle = await model.openBundle(files.readFile, "{variant}");
  self.inputs = {{}};
  for (const [name, ports] of Object.entries({inputs})) {{
    const feeds = {{}};
    for (const [port, {{ type, values, shape }}] of Object.entries(ports)) {{
      const data = type === "int32" ? Int32Array.from(values) : Float32Array.from(values);
      feeds[port] = new ort.Tensor(type, data, shape);
    }}
    inputs[name] = {{ session: await model.openModule(ort, bundle, name), feeds }};
  }}
}})()"""
TIME = """(async () => {{
  const {{ session, feeds }} = inputs["{name}"];
  await session.run(feeds);
  const began = performance.now();
  for (let call = 0; call < {calls}; call += 1) await session.run(feeds);
  return (performance.now() - began) / {calls};
}})()"""


def inputs_of(bundle):
    """Inputs of each module from the test vectors, and how often an image needs it."""
    opened = open_bundle(bundle)
    arrays, steps = opened.vectors.arrays, opened.sampler.steps
    conditions = opened.manifest["conditions"]
    t = np.array([steps[0].t], np.float32)
    inputs = {
        "text_encoder": {"token_ids": arrays["token_ids"][:1]},
        "unet": {"z_t": arrays["noise"], "t": t, "c": arrays["c"][:conditions]},
        "decoder": {"latent": arrays[f"z-{len(steps) - 1}"]},
    }
    return inputs, {"text_encoder": 2, "unet": len(steps) * 2 // conditions, "decoder": 1}


def as_json(ports):
    return {
        name: {"type": str(array.dtype), "values": array.ravel().tolist(), "shape": list(array.shape)}
        for name, array in ports.items()
    }


def native_milliseconds(program, arrays):
    program(arrays)
    began = time.perf_counter()
    for _ in range(CALLS):
        program(arrays)
    return 1000 * (time.perf_counter() - began) / CALLS


@pytest.mark.parametrize("variant", ["onnx", VARIANT])
def test_wasm_beside_native_onnx_runtime(variant, bundle, tmp_path):
    inputs, calls = inputs_of(bundle)
    opened = open_bundle(bundle)
    programs = {name: OnnxProgram(opened.files(variant, name)[0]) for name in MODULES}
    native, wasm = {name: [] for name in MODULES}, {name: [] for name in MODULES}
    with page_of(bundle, tmp_path / "profile") as (page, url):
        page.open(f"{url}web/noise.js")
        page.wait("document.readyState === 'complete' && location.pathname.endsWith('noise.js')")
        given = json.dumps({name: as_json(ports) for name, ports in inputs.items()})
        page.evaluate(OPEN.format(url=url, variant=variant, inputs=given))
        for _ in range(TURNS):
            for name in MODULES:
                native[name].append(native_milliseconds(programs[name], list(inputs[name].values())))
                wasm[name].append(page.evaluate(TIME.format(name=name, calls=CALLS)))
    print(f"\n{variant}, one thread, {TURNS} turns, ms: native, WASM, ratio")
    images = {"native": 0.0, "wasm": 0.0}
    for name in MODULES:
        ours, theirs = median(native[name]), median(wasm[name])
        ratio = median(b / a for a, b in zip(native[name], wasm[name], strict=True))
        print(f"  {name:12} {ours:8.2f} {theirs:8.2f} {ratio:6.2f}")
        images["native"] += calls[name] * ours
        images["wasm"] += calls[name] * theirs
    ratio = images["wasm"] / images["native"]
    print(f"  {'an image':12} {images['native']:8.2f} {images['wasm']:8.2f} {ratio:6.2f}")
    assert ratio <= MAX_RATIO


def test_the_page_is_soon_ready(bundle, tmp_path):
    ready = "performance.getEntriesByName('ready').at(0)"
    with page_of(bundle, tmp_path / "profile") as (page, url):
        seconds = []
        for _ in range(1 + OPENINGS):
            page.open(f"{url}web/?provider=wasm&threads=1")
            page.wait(f"document.readyState === 'complete' && {ready}")
            seconds.append(page.evaluate(f"{ready}.startTime") / 1000)
            page.open("about:blank")
            page.wait("location.href === 'about:blank'")
    first, *others = seconds
    print(f"\nready to draw: {first:.2f} s at first, {median(others):.2f} s with a warm cache")
    assert median(others) <= MAX_READY_SECONDS


def test_float16_is_a_small_download(bundle):
    modules = open_bundle(bundle).manifest["variants"][VARIANT]["modules"]
    size = sum(module["bytes"] for module in modules.values())
    print(f"\n{VARIANT}: {size:,} bytes")
    assert size <= MAX_BYTES
