"""Width of report pages on a phone and on a desk: a wide table scrolls in its box, and never the page."""

import dataclasses
import html
import json
import re
import shutil
import subprocess

import pytest
from test_report_page import LATENCY, PSNR, VARIANT, comparison, content, noise

from jobs.reports.run_page import render_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
LONG = "a_name_without_any_place_to_break_it" * 8

# The page forbids scripts: it is measured from outside, in a frame as wide as the screen.
FRAME = """<!doctype html><meta charset="utf-8"><pre id="found" hidden></pre>
<iframe style="border: 0; width: {width}px; height: 800px" srcdoc="{page}"></iframe>
<script>
document.querySelector("iframe").onload = event => {{
  const shown = event.target.contentDocument, boxes = [...shown.querySelectorAll(".scroll")];
  document.querySelector("#found").textContent = JSON.stringify({{
    page: shown.documentElement.scrollWidth,
    boxes: boxes.map(box => box.clientWidth),
    pictures: [...shown.querySelectorAll("img")].map(image => image.clientWidth),
  }});
}};
</script>"""


def measured(page, *, width, folder):
    """Widths in pixels of a page, of its boxes of tables and of its images, on a screen of that width."""
    file = folder / f"frame-{width}.html"
    file.write_text(FRAME.format(width=width, page=html.escape(page, quote=True)))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [BROWSER, *options, profile, file.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.search(r'<pre id="found" hidden="">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found[1]))


def long_content():
    """Content with long names, a wide table, and four variants of the programs side by side."""
    unets = tuple(dataclasses.replace(LATENCY.unets[0], name=f"{LONG}{number}") for number in range(6))
    return content(
        recipe=LONG,
        latencies=(
            dataclasses.replace(
                LATENCY, device=LONG, unets=unets, rows=((*LATENCY.rows[0][:4], *range(len(unets))),)
            ),
        ),
        measurements=(dataclasses.replace(PSNR, name=LONG, note=LONG),),
        mobile_variants=(dataclasses.replace(VARIANT, name=LONG),),
        mobile_comparisons=(comparison(noise(5), *map(noise, range(4)), caption=LONG),),
    )


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 800, 1200])
@pytest.mark.parametrize("made", [content, long_content])
def test_only_tables_scroll_sideways(tmp_path, width, made):
    found = measured(render_report(made()), width=width, folder=tmp_path)
    assert found["page"] == width
    assert max(found["boxes"]) <= width
    assert min(found["pictures"]) >= 60
