"""Tests of the ablations: their students, panels and page."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from jobs.ablate import ablate, preview
from jobs.cli.ablation import students_of
from jobs.cli.job import Job
from jobs.recipes.ablation import AblationSettings, Line, Panel, StudentVariant, table_name
from jobs.recipes.miniature import mini
from jobs.recipes.miniature_ablation import CHOSEN_RATES, LEARNING_RATES
from jobs.recipes.registry import RECIPES, recipe_named
from jobs.reports.ablation_page import ablation_charts, loss_charts, render_ablation
from jobs.reports.ablation_tables import panel_tables
from jobs.reports.charts import chart_svg
from snapfusion.settings import SettingsError
from snapfusion.training.passes import training_passes
from snapfusion.training.settings import CfgRange, StepDistillationSettings

ROOT = Path(__file__).parents[3]
ABLATION = recipe_named("ablation").ablation
VARIANTS = {variant.name: variant for variant in ABLATION.variants}
PANELS = {panel.name: panel for panel in ABLATION.panels}


def steps_of(panel):
    """The settings that each line's student learns by, but the last, in order of the legend."""
    students = [VARIANTS[line.variant].steps for line in PANELS[panel].lines if line.variant is not None]
    assert students[-1].w_conditioned, "every panel ends with the w-conditioned student"
    return students[:-1]


def test_the_panels_are_the_papers():
    assert set(PANELS) == {"learning-rates", "6a", "6b", "6c", "6d", "7a", "7b", "7c", "8-steps"}
    assert {name: panel.seeds for name, panel in PANELS.items() if panel.seeds != 3} == {
        "learning-rates": 1,
        "6c": 6,
    }
    # Fig. 6(c): vanilla, mixed, CFG-aware; and the control on L_ori alone, which the paper has not.
    assert [steps and steps.cfg_probability for steps in steps_of("6c")] == [0.0, 0.3, 1.0, None]
    assert [steps and steps.student_steps for steps in steps_of("8-steps")] == [8, 8, 8, None]
    # Fig. 7(a): with and without the original loss; 7(b): dynamic 0.01, 0.2, 1 and constant 0, 1.
    assert [steps.gamma for steps in steps_of("7a")] == [0.2, 0.0]
    assert [(steps.gamma_rule, steps.gamma) for steps in steps_of("7b")] == [
        *(("dynamic", gamma) for gamma in (0.01, 0.2, 1.0)),
        *(("constant", gamma) for gamma in (0.0, 1.0)),
    ]
    # Fig. 7(c): vanilla, from teachers of more and more steps.
    assert [steps.k * steps.student_steps for steps in steps_of("7c")] == [8, 16, 32, 64]
    assert {steps.cfg_probability for steps in steps_of("7c")} == {0.0}


def test_the_settings_of_fig_6d_are_ordered():
    settings = [(steps.cfg_probability, steps.cfg_range.high) for steps in steps_of("6d")]
    assert len(settings) == 7
    assert settings[0][0] == 0.0
    assert settings[-1][0] == 1.0
    assert settings[1:] == sorted(settings[1:])


def test_rival_students_halve_the_steps():
    for panel, last in (("6a", "progressive-4"), ("6b", "w-cond-4")):
        lineage = [variant.steps for variant in ABLATION.lineage(last)]
        assert [(steps.student_steps, steps.k) for steps in lineage] == [(16, 2), (8, 2), (4, 2)]
        assert {steps.w_conditioned for steps in lineage} == {panel == "6b"}
        assert {steps.gamma for steps in lineage} == {0.0}


def passes_of(name):
    """Passes for a row of the batch in the trainings of a student and those that it starts from."""
    lineage = ABLATION.lineage(name)
    return sum(
        one.num_steps
        * training_passes(one.steps, w_conditioned_teacher=bool(one.after and one.steps.w_conditioned))
        for one in lineage
    )


def test_methods_are_trained_for_equally_many_passes():
    # A CFG-aware step: two teacher steps of two passes; of the student two for Eq. 10 and one for L_ori, each
    # with its backward pass.
    assert training_passes(VARIANTS["cfg"].steps) == 2 * 2 + 3 * 3
    assert training_passes(VARIANTS["vanilla"].steps) == 2 + 3 * 2
    assert training_passes(VARIANTS["w-conditioned"].steps) == 2 * 2 + 3
    assert training_passes(None) == 3
    assert VARIANTS["cfg"].num_steps == 300
    lines = [line for name, panel in PANELS.items() if name[0] in "68" for line in panel.lines]
    on_the_way = {variant.after for variant in ABLATION.variants}
    for name in {line.variant for line in lines} - on_the_way - {None}:
        assert passes_of(name) == pytest.approx(300 * 13, rel=0.01), name
    for panel in ("7a", "7b", "7c"):
        *students, _ = [line.variant for line in PANELS[panel].lines if line.variant is not None]
        assert len({VARIANTS[name].num_steps for name in students}) == 1


def test_each_method_is_tried_at_each_rate():
    lines = [line for line in PANELS["learning-rates"].lines if line.variant is not None]
    rates = [(line.family, VARIANTS[line.variant].learning_rate) for line in lines]
    assert rates == [(method, rate) for method in CHOSEN_RATES for rate in LEARNING_RATES]
    assert all(VARIANTS[method].learning_rate == rate for method, rate in CHOSEN_RATES.items())


def test_every_panel_can_be_drawn():
    for panel in PANELS.values():
        lines = [line_of(label, evaluations=8) for label in dict.fromkeys(line.label for line in panel.lines)]
        for line in lines:
            line["best"] = line["points"][0]
        record = panel_of(lines)
        record["panel"] = panel.to_values()
        assert all(chart_svg(chart) for chart in ablation_charts(record).values())


def test_quoted_figures_are_the_panels():
    """A figure is written twice, so that it can be quoted; not two figures."""
    panel = json.loads((ROOT / "docs" / "ablation" / "6c.json").read_text())
    assert panel["seeds"] == [0, 1, 2]
    points = {line["name"]: {point["w"]: point for point in line["points"]} for line in panel["over_seeds"]}
    readme = (ROOT / "docs" / "ablation" / "README.md").read_text()
    section = readme.partition("## Results of step distillation")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:3] == "| `"
    ]
    assert len(rows) == 6
    for name, _, *figures in rows:
        at = points[name.split("`")[1]]
        quoted = [f"{at[w]['fid'][0]:.2f}" for w in (2.0, 4.0, 6.0)] + [
            f"{at[w]['clip'][0]:.3f}" for w in (4.0, 6.0)
        ]
        assert figures == quoted
    closed = {(gap["student"], gap["w"]): gap["closed"] for gap in panel["evaluation"]["gaps"]}
    for w, low, high, begins in ((2.0, 0.21, 0.65, None), (4.0, 0.93, 1.0, 0.84), (6.0, 0.88, 0.9, 0.76)):
        of_cfg = [closed[f"cfg-seed{seed}", w] for seed in range(3)]
        shares = sorted(gap[0] for gap in of_cfg)
        assert (round(shares[0], 2), round(shares[-1], 2)) == (low, high)
        if begins is None:  # zero is inside
            assert all(gap[1] < 0.0 < gap[2] for gap in of_cfg)
        else:
            assert min(gap[1] for gap in of_cfg) > begins


def formatted(interval, *, digits):
    """A metric as the document has it: mean over the seeds, and the range if they differ."""
    mean, least, largest = (f"{value:.{digits}f}" for value in interval)
    return mean if least == largest else f"{mean} ({least}–{largest})"


DOCUMENTS = ROOT / "docs" / "ablation"
RECORDS = {path.stem: json.loads(path.read_text()) for path in sorted(DOCUMENTS.glob("*.json"))}
OF_EARLIER_PROTOCOL = [name for name, panel in RECORDS.items() if "best" not in panel["over_seeds"][0]]


def section_of(name):
    return (DOCUMENTS / "README.md").read_text().split(f"## `{name}`")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", RECORDS)
def test_the_document_shows_the_panel(name):
    assert '"/' not in (DOCUMENTS / f"{name}.json").read_text(), "a local path"
    assert f"({name}-fid.svg)" in section_of(name)
    assert (DOCUMENTS / f"{name}-fid.svg").read_text().startswith("<svg")
    if name not in OF_EARLIER_PROTOCOL:
        assert panel_tables(RECORDS[name]) in section_of(name)


@pytest.mark.parametrize("name", OF_EARLIER_PROTOCOL)
def test_the_documents_table_is_that_of_the_earlier_panel(name):
    panel = RECORDS[name]
    rows = [line for line in section_of(name).splitlines() if line.startswith("| `")]
    for row, line, figures in zip(rows, panel["panel"]["lines"], panel["over_seeds"], strict=True):
        at = {point["w"]: point for point in figures["points"]}
        cells = [f"`{line['name']}`", str(line["steps"])]
        cells += [formatted(at[w]["fid"], digits=2) for w in (1.0, 2.0, 4.0, 6.0)]
        cells += [formatted(at[w]["clip"], digits=3) for w in (4.0, 6.0)]
        assert [cell.strip() for cell in row.split("|")[1:-1]] == cells


def test_students_follow_their_initial_students():
    names = [variant.name for variant, _ in students_of(ABLATION, PANELS["6a"])]
    assert names.index("progressive-16") < names.index("progressive-8") < names.index("progressive-4")
    seeds = [seed for variant, seed in students_of(ABLATION, PANELS["6c"]) if variant.name == "cfg"]
    assert seeds == [0, 1, 2, 3, 4, 5]
    fewer = ABLATION.model_copy(update={"most_seeds": 1})
    assert {seed for _, seed in students_of(fewer, PANELS["6c"])} == {0}


def test_panels_share_samples_of_equal_students():
    lines = [line for panel in PANELS.values() for line in panel.lines]
    tables = {(line.variant, repr(line.sampler)): table_name(line, 0) for line in lines}
    assert len(set(tables.values())) == len(tables) < len({line.name for line in lines})
    assert all(table_name(line, 0) == tables[line.variant, repr(line.sampler)] for line in lines)
    student = next(line for line in lines if line.variant is not None)
    assert table_name(student, 0) != table_name(student, 1)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ('ablation.only=["6z"]', "'6z'; accepted are learning-rates, 6c"),
        ('ablation.variants=[{"name": "a", "after": "b"}]', "variant a: after='b'"),
        ("ablation.variants=[]", "there is no variant"),
    ],
)
def test_unknown_names_are_refused(assignment, message):
    with pytest.raises(SettingsError, match=message):
        recipe_named("ablation").with_values([assignment])


def test_a_recipe_without_ablation_is_refused(tmp_path):
    job = Job(verb="ablate", recipe=mini(), out=str(tmp_path))
    with pytest.raises(ValueError, match="--recipe mini: it has no ablation; the recipe ablation has"):
        ablate(job)
    assert preview(job) == ["nothing: this recipe has no ablation"]


@pytest.fixture(scope="module")
def recipe():
    """Three students of two steps, and a panel of few lines."""
    steps = StepDistillationSettings(
        student_steps=2, cfg_probability=1.0, cfg_range=CfgRange(low=1.0, high=6.0)
    )
    one_step = steps.model_copy(update={"student_steps": 1})
    ablation = AblationSettings(
        variants=(
            StudentVariant(name="control"),
            StudentVariant(name="cfg", steps=steps, num_steps=2, learning_rate=2e-3),
            StudentVariant(name="cfg-1", steps=one_step, after="cfg"),
        ),
        panels=(
            Panel(
                name="small",
                title="A small panel",
                lines=(
                    Line(name="teacher-4", steps=4),
                    Line(name="undistilled-1", steps=1),
                    Line(name="control", variant="control", steps=1),
                    Line(name="cfg", variant="cfg-1", steps=1),
                    Line(name="rescale0.3", steps=1, guidance_rescale=0.3, family="rescale"),
                    Line(name="rescale0.7", steps=1, guidance_rescale=0.7, family="rescale"),
                ),
                baseline="undistilled-1",
                control="control",
                many="teacher-4",
                gap_at=(2.0,),
            ),
        ),
    )
    small = (
        "source.scenes=48",
        "source.scenes_per_shard=24",
        'distill.loop={"num_steps":1,"global_batch":8,"learning_rate":1e-3,"ema_decay":0.9}',
        'distill.trainer={"micro_batch":8,"curve_every":1}',
        "distill.evaluation_rows=4",
        "distill.loader.held_out=0.2",
        'evaluation={"guidance":[1.0,2.0,4.0],"floor_redraws":2,'
        '"prompts":{"name":"test","split":"test","limit":6,"draws":2},'
        '"references":{"name":"test","split":"test","count":150},'
        '"tuning":{"prompts":{"name":"validation","split":"validation","limit":6,"draws":2},'
        '"references":{"name":"validation","split":"validation","count":150}},'
        '"samples":{"drawing":{"batch_size":6},"rows_per_unit":6}}',
    )
    return RECIPES["ablation"]().with_values(small).model_copy(update={"ablation": ablation})


@pytest.fixture(scope="module")
def made(recipe, ray_cluster, tmp_path_factory):
    job = Job(verb="ablate", recipe=recipe, out=str(tmp_path_factory.mktemp("ablation")))
    ablate(job)
    return job


@pytest.mark.slow
def test_a_panel_has_every_line_and_seed(made):
    text = Path(f"{made.out}/ablation/small.json").read_text()
    assert made.out not in text
    assert '"run:students/cfg-1-seed0/model"' in text
    panel = json.loads(text)
    rescaled = panel["evaluation"]["tuning"]["families"]["rescale"]
    contenders = ["teacher-4", "undistilled-1", "control-seed0", "cfg-seed0", rescaled]
    assert [line["contenders"] for line in panel["over_seeds"]] == [[name] for name in contenders]
    assert [line["name"] for line in panel["over_seeds"]][-1] == "rescale"
    decided = panel["over_seeds"][3]["differences"]["undistilled-1"]["fid"]
    assert decided["is"] in ("higher", "lower", "undecided")
    for line in panel["over_seeds"]:
        assert [point["w"] for point in line["points"]] == [1.0, 2.0, 4.0]
        value = panel["evaluation"]["curves"][line["contenders"][0]]["points"][1]["fid"][0]
        assert line["points"][1]["fid"][0] == value
        assert line["best"]["fid"] in [point["fid"] for point in line["points"]]
    assert {gap["student"] for gap in panel["evaluation"]["gaps"]} == {"control-seed0", "cfg-seed0"}
    assert panel["evaluation"]["baseline"] == "undistilled-1"
    assert [student["name"] for student in panel["students"]] == ["control", "cfg", "cfg-1"]
    assert list(panel["evaluation"]["against"]) == ["teacher-4", "control-seed0"]
    # Each student's own training, and that it was the one that the panel says.
    for name, steps, teacher in (("control", None, None), ("cfg", 2, 4), ("cfg-1", 1, 2)):
        metrics = json.loads(Path(f"{made.out}/students/{name}-seed0/metrics.json").read_text())
        record = metrics["distillation"]
        assert (record and (record["steps"], record["teacher_steps"])) == (steps and (steps, teacher))
        loop = metrics["settings"]["loop"]
        expected = (2, 2e-3) if name == "cfg" else (1, 1e-3)
        assert (loop["num_steps"], loop["learning_rate"]) == expected


@pytest.mark.slow
def test_the_page_shows_every_line(made):
    page = Path(f"{made.out}/ablation/page.html").read_text()
    for text in (
        "A small panel",
        "Share of the FID gap from undistilled-1 to teacher-4",
        '<td>cfg-seed0</td><td data-label="compared with">control-seed0</td>',
        "CLIP above teacher-4 at equal FID",
        "L_dstl of guided steps",
    ):
        assert text in page
    assert page.count("data:image/png") == 4 * 8
    assert Path(f"{made.out}/ablation/small-fid.svg").read_text().startswith("<svg xmlns")
    panel = json.loads(Path(f"{made.out}/ablation/small.json").read_text())
    assert Path(f"{made.out}/ablation/small.md").read_text() == panel_tables(panel)


@pytest.mark.slow
def test_existing_students_and_samples_are_kept(made, monkeypatch, capsys):
    refuse = Mock(side_effect=AssertionError("trained or sampled again"))
    for name in ("distillation.distill_steps", "velocity.finetune_vpred"):
        monkeypatch.setattr(f"jobs.training.{name}", refuse)
    before = Path(f"{made.out}/ablation/small.json").read_text()
    monkeypatch.setattr(
        "jobs.cli.ablation.runner", lambda *_, **__: lambda items, stages: iter(list(items) and refuse())
    )
    ablate(made)
    assert Path(f"{made.out}/ablation/small.json").read_text() == before
    assert preview(made) == [
        "small: would train 3 students (3 exist) and sample 6 lines at 3 guidance scales"
    ]


def line_of(name, *, evaluations, seeds=1, student=False):
    points = [
        {
            "w": w,
            "evaluations": evaluations,
            **{figure: [value, value - seeds + 1, value + seeds - 1] for figure, value in figures.items()},
        }
        for w, figures in ((2.0, {"fid": 3.0, "clip": 0.97}), (4.0, {"fid": 9.0, "clip": 0.95}))
    ]
    return {"name": name, "student": student, "contenders": [name], "points": points}


def panel_of(lines):
    protocol = {"captions": {"compared": 500}, "reference": {"compared": 4000}}
    protocol |= {"features": {"network": "oracle"}, "scorer": {"network": "mini"}}
    return {
        "panel": {
            "name": "6x",
            "title": "Title",
            "baseline": "few",
            "many": "many",
            "control": None,
            "lines": [],
        },
        "seeds": [0, 1],
        "over_seeds": lines,
        "evaluation": {
            "protocol": protocol,
            "floor": {"fid": {"mean": 0.4, "sd": 0.03}, "redraws": 20},
            "gaps": [],
            "against": {},
        },
    }


def test_nine_lines_have_nine_colors():
    charts = ablation_charts(panel_of([line_of(f"line-{n}", evaluations=8) for n in range(9)]))
    assert list(charts) == ["clip-over-fid", "fid", "clip"]
    svg = chart_svg(charts["fid"])
    assert all(f"var(--series-{n})" in svg for n in range(1, 10))
    lines = [line_of(f"line-{n}", evaluations=8) for n in range(19)]
    with pytest.raises(ValueError, match="19 series; 1 to 18"):
        chart_svg(ablation_charts(panel_of(lines))["fid"])
    ten = chart_svg(ablation_charts(panel_of(lines[:10]))["fid"])
    assert ten.count("stroke-dasharray") > svg.count("stroke-dasharray"), "the tenth is dotted"


def test_passes_are_compared_at_the_chosen_guidance():
    """Of the free baselines only the best is shown."""
    lines = [
        line_of(name, evaluations=n) for name, n in {"many": 100, "few": 8, "free": 8, "worse": 8}.items()
    ]
    assert "passes" not in ablation_charts(panel_of(lines))
    for line, fid in zip(lines, (2.0, 5.0, 3.0, 4.0), strict=True):
        line["best"] = {**line["points"][0], "fid": [fid, fid, fid]}
    panel = panel_of(lines)
    panel["panel"]["lines"] = [
        *({"name": name, "steps": 4} for name in ("many", "few")),
        *({"name": name, "steps": 4, "solver": "unipc"} for name in ("free", "worse")),
    ]
    passes = ablation_charts(panel)["passes"]
    assert [(line.name, line.x, line.y) for line in passes.series] == [
        ("many", [100], [2.0]),
        ("few", [8], [5.0]),
        ("free", [8], [3.0]),
    ]
    assert passes.limit == 0.4


def test_tables_give_each_value_with_its_interval():
    line = line_of("cfg", evaluations=8, seeds=2, student=True)
    line["best"] = line["points"][0] | {"w": [2.0, 1.5, 2.0]}
    of_fid = {"difference": [-0.25, -0.5, 0.125], "is": "undecided"}
    of_clip = {"difference": [0.01, 0.005, 0.02], "is": "higher"}
    line["differences"] = {"few": {"fid": of_fid, "clip": of_clip}}
    panel = panel_of([line])
    figures = {"fid": [3.5, 3.0, 4.0], "clip": [0.9, 0.8, 0.95]}
    panel["evaluation"]["tuning"] = {
        "best": {"cfg-a": {"w": 2.0, **figures}, "cfg-b": {"w": 1.5, **figures}},
        "families": {"cfg": "cfg-b"},
    }
    assert panel_tables(panel).splitlines() == [
        "FID of as many real images: 0.40, standard deviation 0.03 of 20 redraws.",
        "Test captions, at the guidance chosen on the tuning captions:",
        "",
        "| line | passes | w | FID | CLIP |",
        "|---|---|---|---|---|",
        "| `cfg` | 8 | 1.5, 2 | 3.00 (2.00 to 4.00) | 0.9700 (-0.0300 to 1.9700) |",
        "",
        "FID and CLIP at each guidance w:",
        "",
        "| line | 2 | 4 |",
        "|---|---|---|",
        "| `cfg` | 3.00, 0.970 | 9.00, 0.950 |",
        "",
        "Differences, averaged over guidance:",
        "",
        "| student | minus | FID | CLIP |",
        "|---|---|---|---|",
        "| `cfg` | `few` | -0.25 (-0.50 to +0.12), undecided | +0.0100 (+0.0050 to +0.0200), higher |",
        "",
        "On the tuning captions, at the best guidance:",
        "",
        "| line | w | FID | CLIP | chosen |",
        "|---|---|---|---|---|",
        "| `cfg-a` | 2 | 3.50 (3.00 to 4.00) | 0.9000 (0.8000 to 0.9500) |  |",
        "| `cfg-b` | 1.5 | 3.50 (3.00 to 4.00) | 0.9000 (0.8000 to 0.9500) | yes |",
    ]


def test_the_page_gives_the_spread_over_seeds():
    page = render_ablation([panel_of([line_of("a", evaluations=8, seeds=2)])], curves={}, rows={}, w=4.0)
    assert "2 – 4" in page
    assert "<img" not in page


def test_loss_curves_leave_out_untrained_branches():
    curve = [{"step": 10, "vanilla/loss": 0.5}, {"step": 20, "vanilla/loss": 0.4}]
    [chart] = loss_charts({"vanilla": curve, "control": [{"step": 10}]})
    assert chart.series[0].x == [10, 20]
