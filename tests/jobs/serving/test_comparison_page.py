"""The page of `snapfusion serve MODEL...` in Chromium: what it shows, saves, requests and says."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from browser import BROWSER, Page, chromium
from PIL import Image
from served_app import Client, png, served, served_model

from jobs.serving.image_request import Limits

LIMITS = Limits(steps=1_000)
FOLDED = {"steps": 2, "sampler": "ddim", "cfg_range": {"low": 1.0, "high": 1.0}}
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def url(tiny_teacher, mobile_model):
    teacher = served_model(tiny_teacher, limits=LIMITS)
    with served([teacher, served_model(mobile_model, limits=LIMITS, distillation=FOLDED)]) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(browser, url):
    opened = Page(browser)
    opened.open(f"{url}?caption=red&seed=7")
    wait(opened, "ready")
    # The teacher takes 50 steps otherwise.
    opened.evaluate("document.querySelector('#models .steps').value = 3")
    return opened


def wait(page, state):
    page.wait(f"document.body?.dataset.state === {state!r}")


def generate(page, *, state="ready"):
    page.evaluate("document.getElementById('form').requestSubmit()")
    wait(page, state)


def texts(page, selector):
    return page.evaluate(f"[...document.querySelectorAll({selector!r})].map((each) => each.textContent)")


def test_images_are_shown_compared_and_saved(page, url, tiny_teacher, mobile_model):
    generate(page)
    request = {"caption": "red", "seed": 7}
    models = [{"name": tiny_teacher, "steps": 3}, {"name": mobile_model}]
    first, student = Client(url).post({**request, "models": models})[1]["images"]
    for number, image in enumerate((first, student)):
        shown = page.evaluate(PIXELS % number)
        expected = np.asarray(Image.open(io.BytesIO(png(image))))
        np.testing.assert_array_equal(np.array(shown).reshape(*expected.shape[:2], 4)[..., :3], expected)
    assert texts(page, "#images .name") == [tiny_teacher, mobile_model]
    assert texts(page, "#images .settings")[1].startswith("2 steps of ddim, guidance 1, 16 × 16 pixels: ")
    (note,) = texts(page, "#images .difference-note:not(:empty)")
    difference = student["difference"]
    largest, decibels = difference["largest"], difference["psnr_db"]
    assert note == f"difference to the first × 32; at most {largest} of 255, {decibels:.1f} dB"
    name = page.evaluate("document.querySelectorAll('#images .download')[1].download")
    assert name == "image-7-1.png"
    assert page.errors == []


PIXELS = """(() => {
  const canvas = document.querySelectorAll("#images canvas.image")[%d];
  return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
})()"""


def test_what_is_part_of_a_model_is_fixed(page):
    assert page.evaluate("document.querySelectorAll('#models .guidance')[1].disabled") is True
    assert texts(page, "#models .guidance-note")[1] == "part of this model"


def test_the_command_is_the_request(page, url, tiny_teacher, mobile_model):
    page.evaluate("document.getElementById('caption').value = \"it's red\"")
    page.evaluate("document.getElementById('form').dispatchEvent(new Event('input'))")
    command = page.evaluate("document.getElementById('command').textContent")
    start, _, body = command.partition(" --json ")
    assert start == f"curl {url}api/images"
    assert json.loads(body[1:-1].replace("'\\''", "'")) == {
        "caption": "it's red",
        "seed": 7,
        "models": [
            {"name": tiny_teacher, "steps": 3, "sampler": "ddim", "guidance": 2.5},
            {"name": mobile_model, "steps": 2, "sampler": "ddim"},
        ],
    }


def test_images_are_added_and_removed(page):
    page.evaluate("document.getElementById('add').click()")
    page.evaluate("document.querySelectorAll('#models .steps')[2].value = 2")
    page.evaluate("document.querySelectorAll('#models .remove')[1].click()")
    generate(page)
    assert [line.split(" of ")[0] for line in texts(page, "#images .settings")] == ["3 steps", "2 steps"]


def test_what_the_server_refuses_is_one_line(page):
    page.evaluate("document.getElementById('negative').value = 'blue'")
    generate(page, state="failed")
    (line,) = texts(page, "#status")
    assert line.endswith("negative 'blue': this model takes none at guidance 1.")
    page.evaluate("document.getElementById('negative').value = ''")
    generate(page)


def test_a_request_can_be_stopped(page, url):
    page.evaluate("document.querySelector('#models .steps').value = 1000")
    page.evaluate("document.getElementById('form').requestSubmit()")
    page.wait("document.querySelector('#images progress')?.value > 1")
    page.evaluate("document.getElementById('stop').click()")
    wait(page, "ready")
    assert texts(page, "#status") == ["Stopped."]
    generate_again = Client(url).post({"caption": "red", "models": [models_of(page)[1]]})
    assert generate_again[0] == 200


def models_of(page):
    return json.loads(page.evaluate("document.getElementById('command').textContent").split("'")[1])["models"]


def test_no_request_leaves_the_server(page, url):
    generate(page)
    assert [name for name in page.requests if not name.startswith((url, "data:", "blob:"))] == []


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_the_screen(page, width):
    page.resize(width)
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(Path(folder) / f"compare-{width}.png")


def test_a_server_that_has_ended_is_one_line(browser, mobile_model):
    with served([served_model(mobile_model)]) as url:
        page = Page(browser)
        page.open(url)
        wait(page, "ready")
        page.evaluate("document.getElementById('caption').value = 'red'")
    generate(page, state="failed")
    assert texts(page, "#status") == ["The server does not answer: see whether snapfusion serve still runs."]
