"""Every command there is, submitted to a head as on a cluster: it ends with 0 and leaves what it promises.

The settings are the least that is still real: all steps of a job, few rows, few steps of a training.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import local_web
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MOBILE
from latency_inputs import known_table
from ray_nodes import REPOSITORY, Head, ray_head

from jobs import command
from jobs.training.initial_weights import own_architecture

DOWNLOADER = REPOSITORY / ".venv-img2dataset/bin/python"
ORIGIN = own_architecture("mini-v")
TABLE = known_table(ORIGIN)
LANES = 2
"""Jobs that are submitted at once; those after them wait for what they read."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A command as it is submitted.

    Attributes:
        name: the submission id.
        verb: the module of jobs, or what `snapfusion` calls it.
        words: its arguments; {run} is the run's folder, {beside} that of other runs, {inputs} one of the
            test's, {model} a tiny model's.
        settings: each behind a --set.
        after: names of submissions whose outcome it reads.
        leaves: what is there afterwards, in the run.
        says: what it prints.
    """

    name: str
    verb: str
    words: tuple[str, ...] = ("--out", "{run}")
    settings: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    says: str = ""

    def command(self, **places: str) -> list[str]:
        """What stands behind `python -m`."""
        module = ["jobs.command", self.verb] if self.verb in LOOKS else [f"jobs.{self.verb}"]
        given = [word for setting in self.settings for word in ("--set", setting)]
        return [*module, *(placed(word, places) for word in (*self.words, *given))]


def placed(word: str, places: dict[str, str]) -> str:
    """A word with its places filled in."""
    for name, place in places.items():
        word = word.replace(f"{{{name}}}", place)
    return word


LOOKS = ("generate", "verify_bundle", "benchmark")
"""What only `snapfusion` runs."""


def job(verb: str, *settings: str, after: str = "", **more: object) -> Submission:
    """A job under its own name."""
    return Submission(
        **{"name": verb, "verb": verb, "settings": settings, "after": tuple(after.split())} | more
    )


def short(prefix: str, *, steps: int = 2) -> tuple[str, ...]:
    """A training of few steps of few rows."""
    loop = f"{prefix}.loop"
    return (
        f"{loop}.num_steps={steps}",
        f"{loop}.global_batch=8",
        f"{loop}.warmup_steps=0",
        f"{prefix}.loader.held_out=0.2",
    )


SCENES = ("source.scenes=96", "source.scenes_per_shard=48")
JUDGED = ("prompts.limit=8", "references.count=8", "groups=4", "guidance=[2.0]")
PARTS = ("autoencoder", "decoder", "text", "scorer", "oracle", "denoiser", "velocity")
EVALUATION = {
    "contenders": [
        {"name": "ddim-2", "sampler": {"steps": 2}},
        {"name": "student", "model": "run:student/model", "sampler": {"steps": 4}},
    ],
    "baseline": "ddim-2",
    "guidance": [2.0],
    "prompts": {"limit": 8},
    "references": {"count": 8},
    "groups": 4,
}
ABLATION = {
    "variants": [{"name": "control"}],
    "panels": [
        {
            "name": "small",
            "title": "A small panel",
            "lines": [
                {"name": "teacher-2", "steps": 2},
                {"name": "undistilled-1", "steps": 1},
                {"name": "control", "variant": "control", "steps": 1},
            ],
            "baseline": "undistilled-1",
            "control": "control",
            "many": "teacher-2",
            "gap_at": [2.0],
        }
    ],
    "pictures_at": 2.0,
}

SUBMISSIONS = (
    job("render_scenes", *SCENES, leaves=("shards/00001.tar",)),
    job(
        "compile_mobile",
        *MOBILE,
        'mobile.executorch=["float32"]',
        'mobile.coreml=["float16"]',
        words=("{model}", "--out", "{beside}/tiny"),
        leaves=("../tiny/mobile/manifest.json",),
    ),
    job(
        "train_mini",
        *(f"{part}.{size}" for part in PARTS for size in ("samples=12", "batch=6")),
        "scenes=12",
        words=("--out", "{beside}/mini"),
        leaves=("../mini/weights/manifest.json", "../mini/report.html"),
    ),
    job("encode_latents", *SCENES, after="render_scenes", leaves=("latents/_delta_log",), says="96 rows"),
    job(
        "finetune_vpred",
        *short("vpred"),
        after="encode_latents",
        leaves=("vpred/model", "vpred/metrics.json"),
    ),
    job(
        "find_duplicates",
        *SCENES,
        after="render_scenes",
        leaves=("fingerprints/_delta_log", "duplicates/_delta_log"),
    ),
    job(
        "generate_pairs",
        "captions.limit=48",
        "pairs.generation.steps=10",
        after="encode_latents",
        leaves=("pairs/_delta_log",),
        says="48 rows",
    ),
    job(
        "train_robust",
        *short("robust.training"),
        after="encode_latents",
        leaves=("robust/model", "robust/metrics.json"),
    ),
    job(
        "evolve_unet",
        *short("evolution.training"),
        "evolution.table={inputs}/latency.json",
        f"evolution.latency_ms={TABLE.predict_ms(ORIGIN) - 1.0}",
        "evolution.pace.removed=3",
        "evolution.pace.growths=0",
        "evolution.prompts.limit=4",
        "evolution.sampler.steps=1",
        after="train_robust",
        leaves=("evolution/architecture.json", "evolution/page.html"),
    ),
    job("measure_efficiency", "efficiency.turns=2", leaves=("efficiency/torch-float32-cpu.json",)),
    job("compute_targets", "targets.draws=2", after="encode_latents", leaves=("targets/_delta_log",)),
    job("measure_latency", "latency.turns=2", leaves=("latency/torch-float32-cpu.json",)),
    job(
        "benchmark",
        words=(
            *("{beside}/tiny/mobile", "--variant", "executorch"),
            *("--repeats", "20", "--json", "{run}/benchmark.json"),
        ),
        after="compile_mobile",
        leaves=("benchmark.json",),
    ),
    job("verify_bundle", words=("{beside}/tiny/mobile",), after="compile_mobile"),
    job(
        "train_efficient",
        *short("efficient.training"),
        after="encode_latents",
        leaves=("efficient/model", "efficient/metrics.json"),
    ),
    job(
        "distill_plan",
        *short("distill"),
        "schedule=direct",
        after="encode_latents",
        leaves=("direct-8/model", "direct-8/metrics.json"),
    ),
    job(
        "distill_decoder",
        *short("decoder"),
        "decoder.timing_repeats=2",
        after="generate_pairs",
        leaves=("decoder/metrics.json",),
    ),
    job(
        "distill_steps",
        *short("distill"),
        after="train_efficient",
        leaves=("student/model", "student/metrics.json"),
    ),
    job(
        "generate",
        words=(
            "a large red circle at the top on a white background",
            *("--model", "{run}/student/model", "--out", "{run}/picture.png"),
        ),
        after="distill_steps",
        leaves=("picture.png",),
    ),
    job(
        "evaluate",
        f"evaluation={json.dumps(EVALUATION)}",
        after="distill_steps",
        leaves=("evaluation/results.json", "evaluation/page.html"),
    ),
    job(
        "measure_robustness",
        *("scenes=50", "seeds=[0]", "steps=1"),
        words=("mini-v", "{run}/robust/model", "--out", "{run}/robustness"),
        after="train_robust",
        leaves=("robustness/robustness.json", "robustness/robustness.html"),
    ),
    job(
        "measure_mini",
        *("scenes=200", 'models=["sd-v"]', "steps=[1]", "guidance=[2.0]"),
        words=("--out", "{run}/measured.json"),
        leaves=("measured.json", "measured.html"),
    ),
    job(
        "compare_chance",
        *short("random_baseline.training", steps=1),
        *(f"random_baseline.evaluation.{one}" for one in JUDGED),
        "random_baseline.count=1",
        "random_baseline.sampler.steps=1",
        "random_baseline.timing.turns=2",
        "evolution.table={inputs}/latency.json",
        after="evolve_unet",
        leaves=("chance/chance.json",),
    ),
    job(
        "plan",
        "plan.rates=a100-published-high",
        "plan.node=a100-40gb-x8",
        'plan.steps=["encode_latents","generate_pairs"]',
        leaves=("plan.json",),
    ),
    job(
        "report",
        after="generate_pairs distill_decoder distill_steps",
        leaves=("report/index.html", "metrics.json"),
    ),
    job(
        "download_shards",
        "download.links={inputs}/links.parquet",
        "download.rows_per_shard=4",
        "download.place=downloaded",
        f"download.fetching.python={DOWNLOADER}",
        'download.fetching.private_networks=["127.0.0.1"]',
        "download.fetching.threads=2",
        leaves=("downloaded/00000.tar",),
        says="5 images in 2 shards",
    ),
    job(
        "top_up",
        *("captions.limit=48", "pairs.generation.steps=10", "pairs.draws=2", "quota.rows=32"),
        words=("generate_pairs", "--out", "{run}"),
        after="report",
        says="32 rows more",
    ),
    job(
        "verify_table",
        words=("{run}/pairs",),
        settings=("pairs.generation.steps=10",),
        after="top_up",
        says="no fault found",
    ),
    job(
        "forget",
        words=("--out", "{run}", "--url", "{inputs}/forget.txt"),
        after="verify_table compute_targets compare_chance distill_plan finetune_vpred",
        leaves=("forgotten/receipts",),
    ),
    job("vacuum", "vacuum.hours=0", words=("--out", "{run}", "--delete"), after="forget", says="deleted"),
    job(
        "ablate",
        *SCENES,
        *short("distill"),
        *(f"evaluation.{one}" for one in JUDGED),
        f"ablation={json.dumps(ABLATION)}",
        words=("--recipe", "ablation", "--out", "{beside}/ablated"),
        leaves=("../ablated/ablation/page.html",),
    ),
    job(
        "run_pipeline",
        *SCENES,
        *("captions.limit=48", "pairs.generation.steps=10", "latency.turns=2"),
        *(setting for one in ("efficient.training", "distill", "decoder") for setting in short(one)),
        'mobile.executorch=["float32"]',
        "mobile.coreml=[]",
        words=("--out", "{beside}/pipeline"),
        leaves=(
            "../pipeline/report/index.html",
            "../pipeline/mobile/manifest.json",
            "../pipeline/metrics.json",
        ),
    ),
)


def commands() -> set[str]:
    """What can be run: every module with an entry, and what `snapfusion` offers beside them."""
    entries = (
        path
        for path in (REPOSITORY / "jobs").rglob("*.py")
        if re.search(r'^if __name__ == "__main__"', path.read_text(), re.M)
    )
    return {*(path.stem for path in entries), *command.VERBS} - {"command"}


def test_every_command_is_submitted():
    assert {one.verb for one in SUBMISSIONS} == commands()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a submission went: exit code of `ray job submit`, all it printed, and how long it took."""

    code: int
    printed: str
    seconds: float


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("submitted") / "run"


@pytest.fixture(scope="module")
def ended(request, run: Path, tmp_path_factory, mobile_model: str) -> Iterator[dict[str, Future[Ended]]]:
    """What tests of this session ask for, and what that needs, submitted in order; those under way."""
    asked = {item.callspec.params["one"] for item in request.session.items if "ended" in item.fixturenames}
    for one in reversed(SUBMISSIONS):
        asked |= {other for other in SUBMISSIONS if one in asked and other.name in one.after}
    inputs, going = run.with_name("inputs"), dict[str, Future[Ended]]()
    folder = tmp_path_factory.mktemp("head")  # a longer name is none for Ray's sockets
    lanes = ThreadPoolExecutor(LANES)
    with local_web.local_web() as web, ray_head(folder, cpus=8) as head:
        write_inputs(inputs, web)
        for one in SUBMISSIONS:
            if one in asked:
                before = [going[name] for name in one.after]
                places = {
                    "run": str(run),
                    "beside": str(run.parent),
                    "inputs": str(inputs),
                    "model": mobile_model,
                }
                words = one.command(**places)
                going[one.name] = lanes.submit(carried_out, head, one.name, words, before=before)
        yield going
        lanes.shutdown(wait=False, cancel_futures=True)


def write_inputs(folder: Path, web: local_web.Web) -> None:
    """A latency table, a list of URLs, and one of addresses to forget."""
    folder.mkdir()
    (folder / "latency.json").write_text(json.dumps(TABLE.to_values()))
    (folder / "forget.txt").write_text("scene:0/5\n")
    urls = [web.serve(f"/{number}.jpg", local_web.picture(number)) for number in range(5)]
    rows = {"url": [*urls, web.url("/none")], "text": [f"picture {row}" for row in range(6)]}
    pq.write_table(pa.table(rows), folder / "links.parquet")


def carried_out(head: Head, name: str, words: list[str], *, before: list[Future[Ended]]) -> Ended:
    """Submitted as soon as what it reads is there; a job that failed is told by its own test alone."""
    for other in before:
        if other.result().code != 0:
            return Ended(code=-1, printed="what it reads was not made", seconds=0.0)
    began = time.monotonic()
    process = head.start(name, *words)
    printed, _ = process.communicate(timeout=900)
    return Ended(code=process.returncode, printed=printed, seconds=time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("one", SUBMISSIONS, ids=lambda one: one.name)
def test_a_submitted_command_ends_well_and_leaves_what_it_promises(one: Submission, ended, run: Path, capsys):
    if one.verb == "download_shards" and not DOWNLOADER.exists():
        pytest.skip("img2dataset is not installed: `make downloader`")
    how = ended[one.name].result()
    with capsys.disabled():
        print(f"{one.name}: {how.seconds:.1f} s")
    assert how.code == 0, how.printed
    assert f"Job '{one.name}' succeeded" in how.printed
    assert one.says in how.printed
    assert [place for place in one.leaves if not (run / place).exists()] == []
