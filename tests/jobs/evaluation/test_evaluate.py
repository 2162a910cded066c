"""An evaluation from captions to a page: sampled once, paired, and quoted with all that it depends on."""

import copy
import json
import pickle
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from in_process import in_process
from set_options import set_options

from jobs import evaluate as job
from jobs.evaluation.evaluation import evaluate
from jobs.evaluation.settings import Contender, Criterion, EvaluationSettings, FidGap, PromptSettings
from jobs.recipes.miniature import mini
from jobs.recipes.stable_diffusion import sd15
from jobs.reports.charts import standalone_svg
from jobs.reports.evaluation_page import evaluation_charts, render_evaluation
from pipelines.datasets.references import features_of, moments_of
from pipelines.datasets.settings import ReferencesSettings, SamplesSettings
from pipelines.sources.settings import CaptionSettings
from pipelines.stages.sample import SampleAndScore
from pipelines.stages.settings import Sampler, SamplingSettings
from pipelines.tables.table import open_table
from snapfusion.metrics.curve_point import ImageDistances
from snapfusion.metrics.frechet import frechet_distance
from snapfusion.metrics.moments import Moments
from snapfusion.mini.scenes import HELD_OUT, caption_of, scene_of
from snapfusion.models.guidance_embedding import with_guidance_embedding
from snapfusion.models.load import load
from snapfusion.models.save import save
from snapfusion.settings import SettingsError

SETTINGS = EvaluationSettings(
    contenders=(
        Contender(name="many", sampler=Sampler(steps=4)),
        Contender(name="few", sampler=Sampler(steps=1)),
        Contender(name="dpm++", sampler=Sampler(solver="dpm++", steps=3)),
    ),
    baseline="many",
    guidance=(1.0, 2.0, 3.0),
    prompts=PromptSettings(limit=12),
    references=ReferencesSettings(count=200),
    samples=SamplesSettings(drawing=SamplingSettings(batch_size=6), rows_per_unit=6),
    groups=3,
    floor_redraws=3,
    gaps=(FidGap(student="dpm++", few="few", many="many", w=2.0),),
    criteria=(
        Criterion(contender="few", against="many", w=2.0, metric="fid", at_most=0.0),
        Criterion(contender="many", against="few", w=2.0, metric="fid", at_most=0.0),
        Criterion(contender="dpm++", against="few", w=3.0, metric="clip", at_least=-2.0),
    ),
)


def run(settings, out):
    begun = []

    def start(name, parents):
        begun.append(name)
        return {"recipe": "test", "settings": "", "parents": parents}, lambda progress: None

    results = evaluate(settings, model="mini", out=str(out), start=start, run=in_process)
    return json.loads(json.dumps(results)), begun


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "evaluation"
    return out, *run(SETTINGS, out)


def test_every_contender_is_compared_with_the_baseline(made):
    out, results, begun = made
    assert begun == ["references", "many", "few", "dpm++", "redrawn"]
    assert open_table(str(out / "few")).num_rows == 36
    points = results["curves"]["few"]["points"]
    assert [point["w"] for point in points] == [1.0, 2.0, 3.0]
    assert [point["evaluations"] for point in points] == [1, 2, 2]
    for point in points:
        for figure in ("fid", "kid", "clip", "attributes"):
            value, low, high = point[figure]
            assert low <= value <= high
    assert set(results["differences"]) == set(results["equal_fid"]) == {"few", "dpm++"}
    [gap] = results["gaps"]
    assert ("closed" in gap) != ("no_reading" in gap)


def test_criteria_are_judged_by_the_measured_difference(made):
    _, results, _ = made
    few, many, clip = results["criteria"]
    assert few["difference"] == results["differences"]["few"][1]["fid"]
    # One step is worse than four; the other way round the difference has the other sign.
    assert few["difference"][0] == -many["difference"][0] > 0
    assert [one["met"] for one in (few, many, clip)] == [False, True, True]
    page = render_evaluation(results)
    assert page.count('<td data-label="met">') == 3
    costs = re.findall(r'<td data-label="(passes|seconds) of each">(.*?)</td>', page)
    assert [cost for key, cost in costs if key == "passes"] == ["6 / 2 / 8", "2 / 8", "8 / 2", "6 / 2"]
    assert all(re.fullmatch(r"[\d.e-]+( / [\d.e-]+)+", cost) for _, cost in costs)
    assert "torch" in results["versions"]


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        ({"contender": "none"}, "there is no contender 'none'"),
        ({"w": 2.5}, r"w = 2.5 is none of the scales \[1.0, 2.0, 3.0\] of 'few'"),
        ({"at_most": None}, "either at_least or at_most"),
        ({"at_least": 0.0}, "either at_least or at_most"),
    ],
)
def test_a_criterion_that_cannot_be_judged_is_refused(criterion, reason):
    values = SETTINGS.to_values()
    values["criteria"] = [values["criteria"][0] | criterion]
    with pytest.raises(SettingsError, match=reason):
        EvaluationSettings.parse(values)


def test_an_evaluation_may_have_no_contenders():
    assert EvaluationSettings(contenders=()).contenders == ()


def test_the_protocol_has_what_metrics_depend_on(made):
    _, results, _ = made
    protocol = results["protocol"]
    assert protocol["captions"]["listed"] == protocol["captions"]["compared"] == 12
    assert protocol["reference"]["compared"] == 200
    assert protocol["reference"]["prepared"] == "as drawn"
    assert protocol["features"]["network"] == "oracle"
    assert len(protocol["features"]["sha256"]) == len(protocol["scorer"]["sha256"]) == 64
    [note] = protocol["notes"]
    assert note.startswith("drawn: 12 feature vectors of 128 numbers")


def test_the_floor_is_of_other_real_images(made):
    out, results, _ = made
    floor = results["floor"]
    assert (floor["redraws"], floor["images"]) == (3, 12)
    redrawn = open_table(str(out / "redrawn"))
    sets = torch.from_numpy(features_of(redrawn, limit=36)).split(12)
    reference = moments_of(open_table(str(out / "references")))
    fids = [frechet_distance(Moments.of(one), reference) for one in sets]
    assert floor["fid"] == {"mean": pytest.approx(mean(fids)), "sd": pytest.approx(stdev(fids))}
    ids = [
        table.read_unit(unit, ["id"]).column("id").to_pylist()
        for table in (redrawn, open_table(str(out / "references")))
        for unit in table.units
    ]
    assert len({id_ for part in ids for id_ in part}) == 36 + 200
    assert "as many real images" in render_evaluation(results)


def test_a_second_run_samples_nothing(made, monkeypatch):
    out, results, _ = made

    def refuse(*_):
        raise AssertionError("nothing is left to draw")

    monkeypatch.setattr(SampleAndScore, "__call__", refuse)
    again, _ = run(SETTINGS, out)
    assert again == results


@pytest.mark.parametrize("last", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_an_evaluation_killed_among_points_continues(made, monkeypatch, last):
    out, results, _ = made
    shutil.rmtree(out / "distances")
    compute, calls = ImageDistances.of, []

    def killed(*args, **options):
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(1)
        return compute(*args, **options)

    monkeypatch.setattr(ImageDistances, "of", killed)
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, out)
    calls.clear()
    monkeypatch.setattr(
        ImageDistances, "of", lambda *args, **options: calls.append(1) or compute(*args, **options)
    )
    again, _ = run(SETTINGS, out)
    assert (again, len(calls)) == (results, 9 - last)


def test_a_lost_caption_is_left_out_everywhere(tmp_path, monkeypatch):
    draw = SampleAndScore.sample

    def poisoned(self, texts, keys, *, w):
        latents = draw(self, texts, keys, w=w)
        if self.sampler.steps == 1 and w == 2.0:
            latents[0] = float("nan")
        return latents

    monkeypatch.setattr(SampleAndScore, "sample", poisoned)
    results, _ = run(
        SETTINGS.with_values(["guidance=[1.0,2.0]", "groups=2", "criteria=[]"]), tmp_path / "evaluation"
    )
    assert results["protocol"]["captions"]["compared"] == 10  # two batches, one row of each


def test_the_page_and_the_charts(made):
    _, results, _ = made
    page = render_evaluation(results)
    assert "compared with" in page.lower()
    assert all(name in page for name in ("many", "few", "dpm++"))
    charts = list(evaluation_charts(results))
    assert len(charts) == 2
    for chart in charts:
        assert ET.fromstring(standalone_svg(chart)).tag == "{http://www.w3.org/2000/svg}svg"


def test_the_page_has_attributes_only_where_an_oracle_read_them(made):
    _, results, _ = made
    results = copy.deepcopy(results)
    assert "<th>all attributes</th>" in render_evaluation(results)
    for curve in results["curves"].values():
        for point in curve["points"]:
            del point["attributes"], point["all_attributes"]
    assert "all attributes" not in render_evaluation(results)


def test_many_contenders_are_shown_on_several_charts(made):
    _, results, _ = made
    few = results["curves"]["few"]
    crowd = {**results["curves"], **{f"few-{number}": few for number in range(6)}}
    charts = list(evaluation_charts({**results, "curves": crowd}))
    assert len(charts) == 4
    assert all(len(chart.series) <= 6 and chart.series[0].name == "many" for chart in charts)


def test_captions_come_from_a_list_too(tmp_path):
    lines = ["id\tcaption", *(f"{n}\t{caption_of(scene_of(HELD_OUT + n))}" for n in range(12))]
    (tmp_path / "list.tsv").write_text("\n".join(lines) + "\n")
    prompts = PromptSettings(
        name="list", url=str(tmp_path / "list.tsv"), reading=CaptionSettings(id_column="id"), limit=8
    )
    settings = SETTINGS.model_copy(
        update={
            "prompts": prompts,
            "contenders": SETTINGS.contenders[:2],
            "gaps": (),
            "criteria": (),
            "groups": 2,
        }
    )
    results, _ = run(settings, tmp_path / "evaluation")
    captions = results["protocol"]["captions"]
    counts = {"listed", "compared", "without_image"}
    assert captions.keys() == {"name", "url", "split", "draws", "sha256"} | counts
    assert captions.items() >= {"name": "list", "url": prompts.url, "listed": 8, "compared": 8}.items()


def test_w_conditioned_students_are_evaluated_once_per_step(tmp_path):
    bundle = load("mini")
    bundle.unet = with_guidance_embedding(bundle.unet)
    save(bundle, tmp_path / "student")
    student = Contender(name="distilled", model=str(tmp_path / "student"), sampler=Sampler(steps=2))
    settings = SETTINGS.model_copy(
        update={
            "contenders": (student,),
            "baseline": "distilled",
            "gaps": (),
            "criteria": (),
            "guidance": (1.0, 2.0),
        }
    )
    results, _ = run(settings, tmp_path / "evaluation")
    assert [point["evaluations"] for point in results["curves"]["distilled"]["points"]] == [2, 2]


def test_settings_that_contradict_themselves_are_refused():
    with pytest.raises(SettingsError, match="there is no contender 'teacher'"):
        SETTINGS.with_values(["baseline=teacher"])
    with pytest.raises(SettingsError, match="guidance must be one or more increasing"):
        SETTINGS.with_values(["guidance=[2.0,1.0]"])
    with pytest.raises(SettingsError, match="names of contenders repeat"):
        SETTINGS.with_values(['contenders=[{"name":"many"},{"name":"many"}]'])


def test_too_few_captions_for_the_groups_are_refused(tmp_path):
    with pytest.raises(ValueError, match="12 captions; 20 are needed"):
        run(SETTINGS.with_values(["groups=10"]), tmp_path / "evaluation")


def test_the_papers_protocol_is_in_its_recipe():
    settings = sd15().evaluation
    assert settings.guidance[0] == 1.0  # Fig. 4
    assert settings.guidance[-1] == 10.0
    assert settings.prompts.limit == settings.num_references == 30_000
    assert settings.references.paired
    assert settings.samples.judging.scorer.network == "ViT-g-14"
    assert settings.samples.judging.features.network == "inception"
    samplers = {(line.sampler.solver, line.sampler.steps) for line in settings.contenders if not line.model}
    assert samplers == {(solver, n) for solver in ("ddim", "dpm", "dpm++") for n in (4, 8, 16, 50)}
    assert mini().evaluation.samples.judging.features.network == "oracle"


def test_the_documented_protocols_are_settings():
    readme = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    section = readme.split("## The paper's protocol")[1].split("\n## ")[0]
    blocks = [re.findall(r"--set (\S+)", block) for block in section.split("```")[1::2]]
    few, other, small = (sd15().with_values(block).evaluation for block in blocks)
    assert few.prompts.limit == few.num_references == 6_000
    assert other.prompts.limit == other.num_references == 5_000
    assert small.references.size == small.samples.judging.features.scaled_to == 256
    assert {other.prompts.name, other.references.name} == {"coco2017"}
    assert all("2017" in url for url in (other.prompts.url, other.references.url))


def test_a_dry_run_counts_unet_evaluations(capsys):
    assert job.main(["--dry-run", "--set", "evaluation.guidance=[1.0,2.0]"]) == 0
    # 1200 captions, of each (1 + 2) times 3 (50 + 16 + 8 + 4) steps.
    assert "842,400 UNet evaluations" in capsys.readouterr().out


def test_evaluations_are_two_where_a_step_is_guided():
    sampler = Sampler(steps=4)
    limited = Sampler(steps=4, guidance_interval=(249, 749))
    assert [sampler.evaluations(w) for w in (1.0, 3.0)] == [4, 8]
    assert [limited.evaluations(w) for w in (1.0, 3.0)] == [4, 7]
    assert limited.evaluations(3.0, w_conditioned=True) == 4
    # Tables of version 0.1 do not have what is off.
    assert sampler.identity() == {"solver": "ddim", "steps": 4}
    assert limited.identity() == {"solver": "ddim", "steps": 4, "guidance_interval": [249, 749]}
    with pytest.raises(SettingsError, match="the first timestep, 749, is above the last, 249"):
        Sampler.parse({"guidance_interval": [749, 249]})


def test_the_job_leaves_figures_charts_and_a_page(tmp_path, capsys, monkeypatch):
    def as_on_ray(items, stages):
        """Ray hands stages and units over by pickling them."""
        return in_process(*pickle.loads(pickle.dumps((list(items), stages))))

    monkeypatch.setattr(job, "runner", lambda *_, **__: as_on_ray)
    save(load("mini"), tmp_path / "student" / "raw")
    raw = '{"name":"raw","model":"run:student/raw","sampler":{"steps":1}}'
    settings = [
        *("guidance=[1.0]", "prompts.limit=8", "references.count=8", "groups=2", "baseline=one"),
        f'contenders=[{{"name":"one","sampler":{{"steps":1}}}},{raw}]',
    ]
    options = set_options(f"evaluation.{setting}" for setting in settings)
    assert job.main(["--out", str(tmp_path), *options]) == 0
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert set(results["curves"]) == {"one", "raw"}
    # It is read where the run is not.
    assert results["curves"]["raw"]["model"] == "run:student/raw"
    assert str(tmp_path) not in json.dumps(results)
    assert (tmp_path / "evaluation" / "page.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "evaluation" / "chart-1.svg").exists()
    assert "8 feature vectors of 128 numbers" in capsys.readouterr().out
