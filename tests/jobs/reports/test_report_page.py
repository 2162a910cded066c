"""Report page: self-contained, robust to hostile text, deterministic."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jobs.reports.charts import BarChart, Bars, Chart, Series
from jobs.reports.latency_breakdown import LatencyBreakdown, WholeUNet
from jobs.reports.run_page import (
    CaptionedImage,
    ComparedImage,
    ImageComparison,
    LineageNode,
    Measurement,
    MobileVariant,
    ModelMetrics,
    RejectionExample,
    RejectionSummary,
    ReportContent,
    SampleRow,
    StepComparison,
    StepTiming,
    mobile_variants_of,
    render_report,
)

SECTIONS = [
    *("scenes", "teacher", "student", "decoder", "curves"),
    *("figures", "mobile", "lineage", "rejected", "timings"),
]
WITH_BLOCKS = [*SECTIONS[:6], "blocks", *SECTIONS[6:]]
"""The section of blocks exists only if a UNet's parts were timed."""
HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)> {{ 7 * 7 }}'


def noise(seed, size=32):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def captioned(seed, caption, note=""):
    return CaptionedImage(image=noise(seed), caption=caption, note=note)


def comparison(reference, *images, caption):
    named = {f"another {number}": image for number, image in enumerate(images)}
    return ImageComparison(caption=caption, name="torch", reference=reference, images=named)


def chart(*series):
    return Chart(title="Loss", x_label="step", y_label="error", series=series)


STUDENT = ModelMetrics(
    name="student", steps=4, attributes_right=0.99, all_attributes_right=0.953125, clip=0.75, distance=7.25
)
UNET = WholeUNet(
    name="origin",
    measured_ms=1700.0,
    predicted_ms=1615.0,
    error=-0.05,
    parameters=859_520_964,
    macs=401_636_720_640,
    turns=20,
)
BARS = (Bars(name="ResNet, origin", values=[1, 2]),)
LATENCY = LatencyBreakdown(
    device="a phone",
    runtime="torch, float16, 4 threads",
    date="2026-11-21",
    batch=2,
    unets=(UNET,),
    disturbed=False,
    charts=(BarChart(title="Latency", y_label="latency (ms)", categories=["Down-1", "Mid"], bars=BARS),),
    rows=(("Mid", 8, "ResNet", 1280, 7),),
)
VARIANT = MobileVariant(
    name="executorch-int8",
    kind="ExecuTorch: 8 bits",
    bytes=2_048_652,
    psnr_db={"text_encoder": None, "unet": 45.5, "decoder": 50.5, "images": 29.4},
    limit_db=20.0,
    override="",
    samples=16,
    method="executed",
)
PSNR = Measurement(name="held-out PSNR", value=30.25, unit="dB", count=64, counted="pairs", seed=3)
SHARDS = LineageNode(name="shards", kind="shards", url="runs/x/shards", identity="a" * 64)
LATENTS = LineageNode(
    name="LATENTS",
    kind="table",
    url="runs/x/latents",
    identity="b" * 64,
    version=9,
    parents=("shards",),
    rows_read=512,
    rows_written=507,
    rejected={"not_an_image": 5},
)


ENCODED = StepTiming(step="encode", seconds=20.0, rows=500, network_busy=0.968)


def content(**changes):
    teacher = noise(5)
    half = np.clip(teacher.astype(int) + 2, 0, 255).astype(np.uint8)
    row = SampleRow(caption="a cyan heart", images=(captioned(2, "Student, 4 steps", "5 of 5 correct"),))
    example = RejectionExample(id="scenes-0001/17", detail="cannot identify")
    filled = ReportContent(
        recipe="mini",
        settings_hash="5" * 64,
        settings_json='{"name": "mini"}',
        versions={"torch": "2.15.0"},
        totals=(("512", "scenes read"),),
        scenes=(captioned(0, "a large red circle", "row 7"),),
        teacher_images=(captioned(1, "a small blue ring"),),
        step_comparison=StepComparison(
            guidance=4.0, num_captions=64, scorer="open_clip's ViT-g-14", models=(STUDENT,), rows=(row,)
        ),
        decoder_comparisons=(comparison(teacher, half, caption="a green cross"),),
        mobile_comparisons=(comparison(teacher, half, half, caption="a pink star"),),
        charts=(chart(Series(name="a", x=[0, 1], y=[2, 1])),),
        measurements=(PSNR,),
        latencies=(LATENCY,),
        mobile_variants=(VARIANT,),
        lineage=(SHARDS, LATENTS),
        rejections=(RejectionSummary(table="LATENTS", reason="not_an_image", count=5, examples=(example,)),),
        timings=(ENCODED, StepTiming(step="report", seconds=0, skipped=True)),
    )
    return dataclasses.replace(filled, **changes)


class Page(HTMLParser):
    """Tags, attributes and visible text of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def sections(self):
        return [value for tag, name, value in self.attributes if (tag, name) == ("section", "id")]

    @property
    def images(self):
        data = [address.split(",", 1)[1] for address in self.values("src")]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in data]

    def values(self, name):
        return [value for _, other, value in self.attributes if other == name]


def rendered(**changes):
    return Page(render_report(content(**changes)))


def test_every_section_is_filled():
    page = rendered()
    assert page.sections == WITH_BLOCKS
    for words in (
        "torch 2.15.0",
        "5" * 12,
        "a large red circle row 7",
        "a small blue ring",
        "at guidance 4",
        "CLIP is the cosine of image and caption by open_clip's ViT-g-14",
        "a cyan heart Student, 4 steps 5 of 5 correct",
        "64 held-out captions",
        "student 4 99.0 % 95.3 % 0.750 7.2 of 255",
        "a green cross",
        "amplified 8 times",
        "held-out PSNR 30.25 dB 64 pairs 3",
        "a phone · torch, float16, 4 threads · batch of 2 · 2026-11-21",
        "latency (ms)",
        "origin 1,700 ms 1,615 ms -5.0 % 859,520,964 401,636,720,640",
        "Mid ResNet 8 1280 7",
        "a pink star",
        "executorch-int8 ExecuTorch: 8 bits 2.05 MB every bit agrees 45.5 dB 50.5 dB 29.4 dB 20.0 dB 16",
        "LATENTS table, version 9 507 rows from shards",
        "not_an_image 5",
        "512 507 5 runs/x/latents",
        "scenes-0001/17 cannot identify",
        "25 rows/s · its network computed in 97% of the time between units",
        "committed before",
    ):
        assert words in page.text, words


def test_a_disturbed_latency_is_no_result():
    assert "Disturbed" not in rendered().text
    disturbed = dataclasses.replace(LATENCY, disturbed=True)
    assert "Disturbed: the parts do not add up" in rendered(latencies=(disturbed,)).text


def test_captions_that_the_miniature_does_not_know_are_marked():
    mark = "The miniature does not know this caption."
    assert mark not in rendered().text
    marked = rendered(unknown_captions=frozenset({"a small blue ring", "a green cross", "a pink star"})).text
    assert marked.count(mark) == 3
    for words in (f"a small blue ring {mark}", f"a green cross {mark}", f"a pink star {mark}"):
        assert words in marked
    example = "a small red circle at the top on a white background"
    assert f'the miniature knows 1,200 captions like "{example}", of size small or large;' in marked


def test_an_empty_run_has_every_section():
    empty = ReportContent(recipe="mini", settings_hash="0" * 64, settings_json="{}", versions={})
    page = Page(render_report(empty))
    assert page.sections == SECTIONS
    assert "No row was rejected" in page.text
    assert "table" not in page.tags


def test_nothing_is_loaded_from_the_network():
    text = render_report(content())
    page = Page(text)
    assert "script" not in page.tags
    assert "default-src 'none'" in " ".join(page.values("content"))
    for address in [*page.values("src"), *page.values("href")]:
        assert address.startswith(("data:", "#"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert not any(word in text for word in ("@import", "http:", "https:"))


def test_it_supports_phones_and_dark_mode():
    text = render_report(content())
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text


def hostile(value):
    """The same content with hostile text for every string."""
    if isinstance(value, BarChart):
        # Long names of categories leave no room for the bars.
        return dataclasses.replace(value, title=HOSTILE, y_label=HOSTILE)
    if dataclasses.is_dataclass(value):
        fields = {field.name: hostile(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple | list):
        return type(value)(map(hostile, value))
    if isinstance(value, dict):
        # The names of modules are ours.
        return {key: hostile(inner) for key, inner in value.items()}
    return HOSTILE if isinstance(value, str) else value


def test_hostile_text_stays_text():
    given = dataclasses.replace(hostile(content()), versions={HOSTILE: HOSTILE})
    tame, wild = rendered(), Page(render_report(given))
    assert "script" not in wild.tags
    assert set(wild.tags) <= set(tame.tags)
    assert {name for _, name, _ in wild.attributes} <= {name for _, name, _ in tame.attributes}
    assert HOSTILE in wild.text
    assert all(address.startswith(("data:", "#")) for address in [*wild.values("src"), *wild.values("href")])


def test_control_characters_and_long_text_are_removed():
    caption = "a\x00b\x1b[31m\u202egnp.exe\u2066" + "x" * 100_000
    text = render_report(content(scenes=(captioned(0, caption),)))
    assert not re.search("[\x00\x1b\u202e\u2066]", text)
    assert "x" * 500 not in text
    assert "…" in Page(text).text


def test_surrogates_of_broken_names_can_be_written():
    broken = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    example = RejectionExample(id=broken, detail=broken)
    rejection = RejectionSummary(table="T", reason="r", count=1, examples=(example,))
    assert b"caf" in render_report(content(rejections=(rejection,))).encode("utf-8")


def test_the_same_content_gives_the_same_bytes():
    assert render_report(content()) == render_report(content())


def test_small_images_are_inside_bit_for_bit():
    page = rendered()
    np.testing.assert_array_equal(page.images[0], noise(0))
    assert "pixels" in page.values("class")


def test_large_images_are_reduced():
    large = CaptionedImage(image=noise(0, size=600), caption="large")
    assert rendered(scenes=(large,)).images[0].shape == (256, 256, 3)


def test_difference_is_amplified_and_psnr_of_8_bits():
    teacher = np.full((4, 4, 3), 100, np.uint8)
    item = ComparedImage(name="half", image=teacher - 5, reference=teacher)
    assert (item.difference == 40).all()
    assert item.psnr_db == pytest.approx(20 * np.log10(255 / 5))
    assert (ComparedImage(name="half", image=teacher + 100, reference=teacher).difference == 255).all()


def test_equal_images_have_no_decibels():
    equal = comparison(noise(0), noise(0), caption="c")
    assert "every bit agrees" in rendered(decoder_comparisons=(equal,), mobile_variants=()).text


NO_IMAGES = (noise(0).astype(np.float32), noise(0)[..., 0], noise(0)[..., :2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"scenes": (CaptionedImage(image=image, caption="c"),)}, "uint8") for image in NO_IMAGES),
        ({"lineage": (LATENTS,)}, "LATENTS names parent 'shards'"),
        ({"charts": (chart(),)}, "0 series"),
    ],
)
def test_content_that_cannot_be_shown_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        rendered(**changes)


def test_rows_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match=r"LATENTS: 512 .* 506"):
        dataclasses.replace(LATENTS, rows_written=501)


def test_mobile_variants_are_read_from_a_manifest():
    parity = {"psnr_db": 70.3, "limit_db": 35.0, "samples": 16, "override": None}
    record = {
        "runtime": "ExecuTorch",
        "weights": "float32",
        "measured": "executed",
        "modules": {name: {"bytes": 3, "parity": parity} for name in ("text_encoder", "unet", "decoder")},
        "images": parity | {"psnr_db": None, "samples": 2, "override": "a reason"},
    }
    assert mobile_variants_of({"variants": {"executorch": record}}) == (
        MobileVariant(
            name="executorch",
            kind="ExecuTorch: float32",
            bytes=9,
            psnr_db={"text_encoder": 70.3, "unet": 70.3, "decoder": 70.3, "images": None},
            limit_db=35.0,
            override="a reason",
            samples=2,
            method="executed",
        ),
    )


def test_commands_and_the_bundles_page_are_linked():
    command, page = "snapfusion serve mini --bundle run/mobile", "../mobile/web/index.html"
    with_both = rendered(usage=(command,), page=page)
    assert with_both.sections[-4:] == ["usage", *WITH_BLOCKS[-3:]]
    assert command in with_both.text
    assert page in with_both.values("href")
    assert page not in rendered(usage=(command,)).values("href")
