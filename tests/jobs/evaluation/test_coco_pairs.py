"""Captions of COCO's annotations are compared with their own images, whatever the order of the files."""

from pathlib import Path

import numpy as np
import pytest
from coco_inputs import IDS, YEARS, write_annotations, write_images
from evaluated_run import evaluate_in_process
from PIL import Image

from jobs.evaluation.caption_lists import list_captions
from jobs.evaluation.settings import Contender, EvaluationSettings, PromptSettings
from jobs.reports.charts import standalone_svg
from jobs.reports.evaluation_page import evaluation_charts, render_evaluation
from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.sources import SourceError
from pipelines.sources.settings import CaptionSettings
from pipelines.stages.metric_networks import lanczos
from pipelines.stages.settings import Sampler, SamplingSettings
from pipelines.tables.table import open_table
from snapfusion.mini.scenes import HELD_OUT, caption_of, scene_of
from snapfusion.settings import SettingsError


def prompts_of(url, **changes):
    return PromptSettings(name="coco", url=url, reading=CaptionSettings(id_column="image_id"), **changes)


def pairs_of(annotations, images):
    return list_captions(prompts_of(annotations), references_of(images)).pairs


def references_of(images):
    return ReferencesSettings(name="coco", url=images, paired=True, size=32)


def settings_of(annotations, images, **changes):
    return EvaluationSettings(
        contenders=(Contender(name="one", sampler=Sampler(steps=1)),),
        baseline="one",
        guidance=(1.0,),
        prompts=prompts_of(annotations, **changes),
        references=references_of(images),
        samples=SamplesSettings(drawing=SamplingSettings(batch_size=4), rows_per_unit=4),
        groups=2,
        kid_images=0,
    )


@pytest.mark.parametrize("year", [2014, 2017])
def test_captions_have_their_own_images(tmp_path, year):
    annotations = write_annotations(tmp_path, year=year)
    images = write_images(tmp_path, year=year)
    pairs = pairs_of(annotations, images)
    assert [row.id for row in pairs.captions] == [str(id_) for id_ in IDS]
    assert [row.text for row in pairs.captions] == [caption_of(scene_of(HELD_OUT + id_)) for id_ in IDS]
    assert [Path(name).name for name in pairs.image_names] == [YEARS[year].format(id_) for id_ in IDS]
    assert (pairs.without_image, pairs.without_caption, pairs.notes()) == (0, 0, [])


def test_captions_and_images_without_the_other_are_counted(tmp_path):
    annotations = write_annotations(tmp_path, year=2014)
    images = write_images(tmp_path, year=2014, ids=[*IDS[:5], 1000, 1001])
    pairs = pairs_of(annotations, images)
    assert [row.id for row in pairs.captions] == [str(id_) for id_ in IDS[:5]]
    assert pairs.missing_images == [YEARS[2014].format(id_) for id_ in IDS[5:]]
    assert (len(pairs.image_names), pairs.without_image, pairs.without_caption) == (5, 3, 2)
    assert pairs.notes() == [
        "captions: 3 have no image (COCO_val2014_000000000019.jpg, ...), and are left out",
        "images: 2 are not in the annotations, and are left out",
    ]


def test_annotations_of_another_split_are_refused(tmp_path):
    annotations = write_annotations(tmp_path, year=2017)
    images = write_images(tmp_path, year=2014)
    with pytest.raises(SourceError, match=r"name 000000000007\.jpg, and there is COCO_val2014_000000000007"):
        pairs_of(annotations, images)


def test_limit_bounds_captions_and_images(tmp_path):
    settings = settings_of(
        write_annotations(tmp_path, year=2014), write_images(tmp_path, year=2014, ids=IDS[:7]), limit=8
    )
    results = evaluate_in_process(settings, tmp_path / "evaluation")
    protocol = results["protocol"]
    assert protocol["captions"]["compared"] == protocol["reference"]["compared"] == 7
    assert protocol["captions"]["without_image"] == 1
    references = open_table(str(tmp_path / "evaluation" / "references"))
    names = references.read(["id"]).column("id").to_pylist()
    assert [int(Path(name).stem[-12:]) for name in names] == IDS[:7]
    title = "coco: 7 captions; 7 real images, theirs by id; FID by the oracle at 32 px"
    assert protocol["title"] == title
    assert "1 have no image" in protocol["notes"][-1]
    assert title in render_evaluation(results)
    assert all(title in standalone_svg(chart).decode() for chart in evaluation_charts(results))
    fewer = settings.model_copy(update={"prompts": prompts_of(settings.prompts.url, limit=4)})
    assert evaluate_in_process(fewer, tmp_path / "fewer")["protocol"]["reference"]["compared"] == 4


def test_limit_counts_captions_that_have_an_image(tmp_path):
    annotations, present = write_annotations(tmp_path, year=2017), IDS[1::2]
    images = write_images(tmp_path, year=2017, ids=present)
    listed = list_captions(prompts_of(annotations, limit=4, draws=2), references_of(images))
    assert [row.id for row in listed.once] == [str(id_) for id_ in present]
    assert [row.id for row in listed.rows[4:]] == [f"{id_}-draw1" for id_ in present]
    assert listed.pairs.without_image == 4
    fewer = list_captions(prompts_of(annotations, limit=1_000), references_of(images))
    assert [row.id for row in fewer.once] == [str(id_) for id_ in present]


def test_images_are_resized_as_real_ones_are():
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    import torch

    found = lanczos(torch.from_numpy(image).permute(0, 3, 1, 2), size=24)
    expected = np.array(Image.fromarray(image[0]).resize((24, 24), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(found[0].permute(1, 2, 0).numpy(), expected)
    assert lanczos(found, size=24) is found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["prompts.reading.id_column=id"], "references.paired needs prompts.url"),
        (["references.url=null"], "references.paired needs"),
        (["samples.judging.features.scaled_to=24"], "references.size is 32 and .*scaled_to 24"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        settings_of("captions.json", "images").with_values(values)
