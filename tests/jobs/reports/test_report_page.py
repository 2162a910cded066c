"""The report page: complete without a network, deaf to hostile text, the same for the same content."""

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
"""That section is there where a UNet's parts were timed."""
HOSTILE = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)> {{ 7 * 7 }}'


def noise(seed, size=32):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def comparison(reference, *images, caption):
    held = tuple(ComparedImage(name="another", image=image, reference=reference) for image in images)
    return ImageComparison(caption=caption, name="torch", reference=reference, held=held)


def content(**changes):
    teacher = noise(5)
    half = np.clip(teacher.astype(int) + 2, 0, 255).astype(np.uint8)
    filled = {
        "recipe": "mini",
        "settings_hash": "5" * 64,
        "settings_json": '{"name": "mini"}',
        "versions": {"torch": "2.15.0"},
        "totals": (("512", "scenes read"),),
        "scenes": (CaptionedImage(image=noise(0), caption="a large red circle", note="row 7"),),
        "teacher_images": (CaptionedImage(image=noise(1), caption="a small blue ring"),),
        "fewer_steps": StepComparison(
            guidance=4.0,
            count=64,
            ways=(
                ModelMetrics(
                    name="student",
                    steps=4,
                    attributes_right=0.99,
                    all_attributes_right=0.953125,
                    clip=0.75,
                    distance=7.25,
                ),
            ),
            strips=(
                SampleRow(
                    caption="a cyan heart",
                    pictures=(
                        CaptionedImage(image=noise(2), caption="Student, 4 steps", note="5 of 5 right"),
                    ),
                ),
            ),
        ),
        "comparisons": (comparison(teacher, half, caption="a green cross"),),
        "phone": (comparison(teacher, half, half, caption="a pink star"),),
        "charts": (
            Chart(
                title="Loss", x_label="step", y_label="error", series=(Series(name="a", x=[0, 1], y=[2, 1]),)
            ),
        ),
        "measurements": (
            Measurement(name="held-out PSNR", value=30.25, unit="dB", count=64, counted="pairs", seed=3),
        ),
        "anatomies": (
            LatencyBreakdown(
                device="a phone",
                how="torch, float16, 4 threads",
                date="2026-11-21",
                batch=2,
                unets=(
                    WholeUNet(
                        name="origin",
                        measured_ms=1700.0,
                        predicted_ms=1615.0,
                        error=-0.05,
                        parameters=859_520_964,
                        macs=401_636_720_640,
                        turns=20,
                    ),
                ),
                charts=(
                    BarChart(
                        title="Latency",
                        y_label="latency (ms)",
                        categories=["Down-1", "Mid"],
                        bars=(Bars(name="ResNet, origin", values=[1, 2]),),
                    ),
                ),
                rows=(("Mid", 8, "ResNet", 1280, 7),),
            ),
        ),
        "artifacts": (
            MobileVariant(
                name="executorch-int8",
                kind="ExecuTorch: 8 bits",
                bytes=2_048_652,
                psnr_db={"text_encoder": None, "unet": 45.5, "decoder": 50.5, "images": 29.4},
                limit_db=20.0,
                override="",
                samples=16,
                how="executed",
            ),
        ),
        "lineage": (
            LineageNode(name="shards", kind="shards", place="runs/x/shards", identity="a" * 64),
            LineageNode(
                name="LATENTS",
                kind="table",
                place="runs/x/latents",
                identity="b" * 64,
                version=9,
                parents=("shards",),
                rows_read=512,
                rows_written=507,
                rejected={"not_an_image": 5},
            ),
        ),
        "rejections": (
            RejectionSummary(
                table="LATENTS",
                reason="not_an_image",
                count=5,
                examples=(RejectionExample(id="scenes-0001/17", detail="cannot identify"),),
            ),
        ),
        "timings": (
            StepTiming(step="encode", seconds=20.0, rows=500),
            StepTiming(step="report", seconds=0, skipped=True),
        ),
    }
    return ReportContent(**{**filled, **changes})


class Page(HTMLParser):
    """Tags, attributes and visible text of a page, as a browser would read them."""

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

    def values(self, name):
        return [value for _, found, value in self.attributes if found == name]


def test_every_section_is_there_and_filled():
    page = Page(render_report(content()))
    assert [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")] == WITH_BLOCKS
    for words in (
        "a large red circle",
        "a small blue ring",
        "a cyan heart",
        "at guidance 4: by the teacher",
        "Student, 4 steps",
        "64 held-out captions",
        "95.3 %",
        "0.750",
        "7.2 of 255",
        "a green cross",
        "held-out PSNR",
        "30.25 dB",
        "a phone · torch, float16, 4 threads · batch of 2 · 2026-11-21",
        "latency (ms)",
        "origin 1,700 ms 1,615 ms -5.0 % 859,520,964 401,636,720,640",
        "Mid ResNet 8 1280 7",
        "a pink star",
        "executorch-int8",
        "2.05 MB",
        "29.4 dB",
        "LATENTS",
        "version 9",
        "from shards",
        "507",
        "not_an_image",
        "cannot identify",
        "25 rows/s",
        "committed before",
        "5" * 12,
        "torch 2.15.0",
        "amplified 8 times",
    ):
        assert words in page.text, words


def test_an_empty_run_says_so_in_every_section():
    empty = ReportContent(recipe="mini", settings_hash="0" * 64, settings_json="{}", versions={})
    page = Page(render_report(empty))
    assert [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")] == SECTIONS
    assert "No row was set aside: every row that was read was written." in page.text
    assert "table" not in page.tags


def test_nothing_is_asked_of_the_network():
    text = render_report(content())
    page = Page(text)
    assert "script" not in page.tags
    assert "default-src 'none'" in " ".join(page.values("content"))
    for address in [*page.values("src"), *page.values("href")]:
        assert address.startswith(("data:", "#"))
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "http:" not in text
    assert "https:" not in text


def test_it_is_made_for_a_phone_and_for_the_dark():
    text = render_report(content())
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text


def hostile_content():
    picture = CaptionedImage(image=noise(0), caption=HOSTILE, note=HOSTILE)
    given = content()
    return dataclasses.replace(
        given,
        recipe=HOSTILE,
        settings_json=HOSTILE,
        finished=HOSTILE,
        versions={HOSTILE: HOSTILE},
        totals=((HOSTILE, HOSTILE),),
        scenes=(picture,),
        teacher_images=(picture,),
        fewer_steps=dataclasses.replace(
            given.fewer_steps,
            ways=(dataclasses.replace(given.fewer_steps.ways[0], name=HOSTILE),),
            strips=(SampleRow(caption=HOSTILE, pictures=(picture,)),),
        ),
        comparisons=(dataclasses.replace(given.comparisons[0], caption=HOSTILE, name=HOSTILE),),
        phone=(dataclasses.replace(given.phone[0], caption=HOSTILE),),
        charts=(dataclasses.replace(given.charts[0], title=HOSTILE, x_label=HOSTILE),),
        measurements=(dataclasses.replace(given.measurements[0], name=HOSTILE, note=HOSTILE),),
        anatomies=(
            dataclasses.replace(
                given.anatomies[0],
                device=HOSTILE,
                how=HOSTILE,
                date=HOSTILE,
                unets=(dataclasses.replace(given.anatomies[0].unets[0], name=HOSTILE),),
                charts=(dataclasses.replace(given.anatomies[0].charts[0], y_label=HOSTILE),),
            ),
        ),
        artifacts=(dataclasses.replace(given.artifacts[0], name=HOSTILE, how=HOSTILE),),
        lineage=(LineageNode(name=HOSTILE, kind=HOSTILE, place=HOSTILE, identity=HOSTILE),),
        rejections=(
            RejectionSummary(
                table=HOSTILE,
                reason=HOSTILE,
                count=1,
                examples=(RejectionExample(id=HOSTILE, detail=HOSTILE),),
            ),
        ),
        timings=(StepTiming(step=HOSTILE, seconds=1.0),),
    )


def test_text_of_others_stays_text():
    tame, wild = Page(render_report(content())), Page(render_report(hostile_content()))
    assert "script" not in wild.tags
    assert set(wild.tags) <= set(tame.tags)
    assert {name for _, name, _ in wild.attributes} <= {name for _, name, _ in tame.attributes}
    assert HOSTILE in wild.text
    assert all(address.startswith(("data:", "#")) for address in [*wild.values("src"), *wild.values("href")])


def test_control_and_direction_characters_and_endless_text_are_tamed():
    caption = "a\x00b\x1b[31m\u202egnp.exe\u2066" + "x" * 100_000
    text = render_report(content(scenes=(CaptionedImage(image=noise(0), caption=caption),)))
    assert not re.search("[\x00\x1b\u202e\u2066]", text)
    assert "x" * 500 not in text
    assert "…" in Page(text).text


def test_surrogates_of_broken_names_can_be_written():
    broken = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    rejection = RejectionSummary(
        table="T", reason="r", count=1, examples=(RejectionExample(id=broken, detail=broken),)
    )
    assert b"caf" in render_report(content(rejections=(rejection,))).encode("utf-8")


def test_the_same_content_gives_the_same_bytes():
    assert render_report(content()) == render_report(content())


def images_of(text):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1]))))
        for address in Page(text).values("src")
    ]


def test_small_pictures_are_inside_bit_for_bit_and_shown_as_squares():
    text = render_report(content())
    np.testing.assert_array_equal(images_of(text)[0], noise(0))
    assert "pixels" in Page(text).values("class")


def test_large_pictures_are_shrunk():
    large = CaptionedImage(image=noise(0, size=600), caption="large")
    assert images_of(render_report(content(scenes=(large,))))[0].shape == (256, 256, 3)


def test_the_difference_picture_is_amplified_and_the_psnr_is_that_of_the_pictures_shown():
    teacher = np.full((4, 4, 3), 100, np.uint8)
    item = ComparedImage(name="half", image=teacher - 5, reference=teacher)
    assert (item.difference == 40).all()
    assert item.psnr_db == pytest.approx(20 * np.log10(255 / 5))
    assert (ComparedImage(name="half", image=teacher + 100, reference=teacher).difference == 255).all()


def test_equal_pictures_and_bits_have_no_figure_in_decibels():
    teacher = noise(0)
    page = Page(render_report(content(comparisons=(comparison(teacher, teacher, caption="c"),))))
    assert "every bit agrees" in page.text


@pytest.mark.parametrize("image", [noise(0).astype(np.float32), noise(0)[..., 0], noise(0)[..., :2]])
def test_other_arrays_than_images_are_refused(image):
    with pytest.raises(ValueError, match="uint8"):
        render_report(content(scenes=(CaptionedImage(image=image, caption="c"),)))


def test_rows_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="LATENTS: 10 rows were read, and 9 were written or set aside"):
        LineageNode(
            name="LATENTS",
            kind="table",
            place="p",
            identity="i",
            rows_read=10,
            rows_written=8,
            rejected={"bad": 1},
        )


def test_a_parent_that_does_not_come_before_is_refused():
    orphan = LineageNode(name="PAIRS", kind="table", place="p", identity="i", parents=("LATENTS",))
    with pytest.raises(ValueError, match="PAIRS names parent 'LATENTS'"):
        render_report(content(lineage=(orphan,)))


def test_a_chart_without_a_line_is_refused():
    with pytest.raises(ValueError, match="0 series"):
        render_report(content(charts=(Chart(title="t", x_label="x", y_label="y", series=()),)))


def manifest(*, images):
    parity = {"psnr_db": 70.3, "limit_db": 35.0, "samples": 16, "override": None}
    module = {"bytes": 3, "parity": parity}
    return {
        "variants": {
            "executorch": {
                "runtime": "ExecuTorch",
                "weights": "float32",
                "measured": "executed",
                "modules": dict.fromkeys(("text_encoder", "unet", "decoder"), module),
                "images": parity | images,
            }
        }
    }


def test_artifacts_are_read_from_a_bundles_manifest():
    (found,) = mobile_variants_of(manifest(images={"psnr_db": None, "samples": 2, "override": "a reason"}))
    assert found == MobileVariant(
        name="executorch",
        kind="ExecuTorch: float32",
        bytes=9,
        psnr_db={"text_encoder": 70.3, "unet": 70.3, "decoder": 70.3, "images": None},
        limit_db=35.0,
        override="a reason",
        samples=2,
        how="executed",
    )
