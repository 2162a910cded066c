"""Submits every command to a head, and checks exit code and output.

The settings are minimal: all steps of a job, few rows, few training steps.
"""

import json
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
from set_options import set_options

from jobs import command
from jobs.training.initial_weights import own_architecture

DOWNLOADER = REPOSITORY / ".venv-img2dataset/bin/python"
ORIGIN = own_architecture("mini-v")
TABLE = known_table(ORIGIN)
LANES = 2
"""Jobs that run at once; others wait for their inputs."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A submitted command.

    Attributes:
        name: the submission id.
        verb: a module of jobs, or a verb of `snapfusion`.
        words: its arguments; {run} is the run's folder, {beside} that of other runs, {inputs} one of the
            test's, {model} a tiny model's.
        settings: assignments of --set.
        after: names of submissions whose output it reads.
        outputs: files and folders in the run afterwards.
        prints: part of its output.
    """

    name: str
    verb: str
    words: tuple[str, ...] = ("--out", "{run}")
    settings: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    prints: str = ""

    def command(self, **paths: str) -> list[str]:
        """Arguments of `python -m`."""
        module = [f"jobs.{self.verb}"]
        return [*module, *(fill(word, paths) for word in (*self.words, *set_options(self.settings)))]


def fill(word: str, paths: dict[str, str]) -> str:
    for name, path in paths.items():
        word = word.replace(f"{{{name}}}", path)
    return word


def job(verb: str, *settings: str, after: str = "", outputs: str = "", **more: object) -> Submission:
    """A job under its own name; several names are separated by spaces."""
    lists = {"settings": settings, "after": tuple(after.split()), "outputs": tuple(outputs.split())}
    return Submission(**{"name": verb, "verb": verb} | lists | more)


def short(prefix: str, *, steps: int = 2) -> tuple[str, ...]:
    """A training of few steps of few rows."""
    loop = (f"num_steps={steps}", "global_batch=8", "warmup_steps=0")
    others = ("loader.held_out=0.2", "trainer.num_workers=1")
    return (*(f"{prefix}.loop.{setting}" for setting in loop), *(f"{prefix}.{one}" for one in others))


def training(
    verb: str, prefix: str, *settings: str, folder: str, after: str = "encode_latents"
) -> Submission:
    """A short training that publishes a model."""
    outputs = f"{folder}/model {folder}/metrics.json"
    return job(verb, *short(prefix), *settings, after=after, outputs=outputs)


SCENES = ("source.scenes=96", "source.scenes_per_shard=48")
FEW_PAIRS = ("captions.limit=48", "pairs.generation.steps=10")
PARTS = ("autoencoder", "decoder", "text", "scorer", "oracle", "denoiser", "velocity")
CONTENDERS = [
    {"name": "ddim-2", "sampler": {"steps": 2}},
    {"name": "student", "model": "run:student/model", "sampler": {"steps": 4}},
]
PANEL = {
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


def evaluated(prefix: str) -> list[str]:
    """An evaluation of few captions and images."""
    return [
        f"{prefix}.{one}" for one in ("prompts.limit=8", "references.count=8", "groups=4", "guidance=[2.0]")
    ]


SUBMISSIONS = (
    job("render_scenes", *SCENES, outputs="shards/00001.tar"),
    job(
        "compile_mobile",
        *MOBILE,
        *('mobile.executorch=["float32"]', 'mobile.coreml=["float16"]'),
        words=("{model}", "--out", "{beside}/tiny"),
        outputs="../tiny/mobile/manifest.json",
    ),
    job(
        "train_mini",
        *(f"{part}.{size}" for part in PARTS for size in ("samples=12", "batch=6")),
        "scenes=12",
        words=("--out", "{beside}/mini"),
        outputs="../mini/weights/manifest.json ../mini/report.html",
    ),
    job("encode_latents", *SCENES, after="render_scenes", outputs="latents/_delta_log", prints="96 rows"),
    training("finetune_vpred", "vpred", folder="vpred"),
    job(
        "find_duplicates",
        *SCENES,
        after="render_scenes",
        outputs="fingerprints/_delta_log duplicates/_delta_log",
    ),
    job("generate_pairs", *FEW_PAIRS, after="encode_latents", outputs="pairs/_delta_log", prints="48 rows"),
    training("train_robust", "robust.training", folder="robust"),
    job(
        "evolve_unet",
        *short("evolution.training"),
        "evolution.table={inputs}/latency.json",
        f"evolution.latency_ms={TABLE.predict_ms(ORIGIN) - 1.0}",
        *("evolution.pace.removed=3", "evolution.pace.growths=0"),
        *("evolution.prompts.limit=4", "evolution.sampler.steps=1"),
        after="train_robust",
        outputs="evolution/architecture.json evolution/page.html",
    ),
    job("measure_efficiency", "efficiency.turns=2", outputs="efficiency/torch-float32-cpu.json"),
    job("compute_targets", "targets.draws=2", after="encode_latents", outputs="targets/_delta_log"),
    job("measure_latency", "latency.turns=2", outputs="latency/torch-float32-cpu.json"),
    job(
        "benchmark",
        words=(
            *("{beside}/tiny/mobile", "--variant", "executorch"),
            *("--repeats", "20", "--json", "{run}/benchmark.json"),
        ),
        after="compile_mobile",
        outputs="benchmark.json",
    ),
    job("verify_bundle", words=("{beside}/tiny/mobile",), after="compile_mobile"),
    training("train_efficient", "efficient.training", folder="efficient"),
    training("distill_schedule", "distill", "schedule=direct", folder="direct-8"),
    job(
        "distill_decoder",
        *(*short("decoder"), "decoder.timing_repeats=2"),
        after="generate_pairs",
        outputs="decoder/metrics.json",
    ),
    training("distill_steps", "distill", folder="student", after="train_efficient"),
    job(
        "generate",
        words=(
            "a large red circle at the top on a white background",
            *("--model", "{run}/student/model", "--out", "{run}/image.png"),
        ),
        after="distill_steps",
        outputs="image.png",
    ),
    job(
        "evaluate",
        *evaluated("evaluation"),
        f"evaluation.contenders={json.dumps(CONTENDERS)}",
        "evaluation.baseline=ddim-2",
        after="distill_steps",
        outputs="evaluation/results.json evaluation/page.html",
    ),
    job(
        "measure_robustness",
        *("scenes=50", "seeds=[0]", "steps=1"),
        words=("mini-v", "{run}/robust/model", "--out", "{run}/robustness"),
        after="train_robust",
        outputs="robustness/robustness.json robustness/robustness.html",
    ),
    job(
        "measure_mini",
        *("scenes=200", 'models=["sd-v"]', "steps=[1]", "guidance=[2.0]"),
        words=("--out", "{run}/measured.json"),
        outputs="measured.json measured.html",
    ),
    job(
        "compare_chance",
        *short("random_baseline.training", steps=1),
        *evaluated("random_baseline.evaluation"),
        *("random_baseline.count=1", "random_baseline.sampler.steps=1", "random_baseline.timing.turns=2"),
        "evolution.table={inputs}/latency.json",
        after="evolve_unet",
        outputs="chance/chance.json",
    ),
    job(
        "plan",
        *("plan.rates=a100-published-high", "plan.node=a100-40gb-x8"),
        'plan.steps=["encode_latents","generate_pairs"]',
        outputs="plan.json",
    ),
    job(
        "report",
        after="generate_pairs distill_decoder distill_steps",
        outputs="report/index.html metrics.json",
    ),
    job(
        "download_shards",
        *("download.links={inputs}/links.parquet", "download.rows_per_shard=4"),
        *("download.folder=downloaded", "download.fetching.threads=2"),
        f"download.fetching.python={DOWNLOADER}",
        'download.fetching.private_networks=["127.0.0.1"]',
        outputs="downloaded/00000.tar",
        prints="5 images in 2 shards",
    ),
    job(
        "top_up",
        *(*FEW_PAIRS, "pairs.draws=2", "quota.rows=32"),
        words=("generate_pairs", "--out", "{run}"),
        after="report",
        prints="32 rows more",
    ),
    job(
        "verify_table",
        "pairs.generation.steps=10",
        words=("{run}/pairs",),
        after="top_up",
        prints="no fault found",
    ),
    job(
        "compact",
        words=("{run}/pairs", "--name", "pairs-large"),
        after="verify_table",
        outputs="pairs-large/_delta_log",
        prints="pairs-large version",
    ),
    job(
        "export_table",
        "export.rows_per_shard=20",
        words=("{run}/pairs", "--to", "webdataset"),
        after="verify_table",
        outputs="export/pairs/00000.tar export/pairs/shard_count.json",
        prints="samples in",
    ),
    job(
        "forget",
        words=("--out", "{run}", "--url", "{inputs}/forget.txt"),
        after="compact export_table compute_targets compare_chance distill_schedule finetune_vpred",
        outputs="forgotten/receipts",
    ),
    job("check", words=("mini",), prints="bundled model"),
    job(
        "export",
        words=("mini-v", "--to", "single-file", "--out", "{run}/mini-v.safetensors"),
        outputs="mini-v.safetensors",
    ),
    job(
        "publish",
        words=("{run}/student/model", "name/student", "--licence", "Apache-2.0", "--dry-run"),
        after="distill_steps",
        prints="README.md",
    ),
    job("recipes", words=("sd15",), prints="stable-diffusion-v1-5"),
    job("vacuum", "vacuum.hours=0", words=("--out", "{run}", "--delete"), after="forget", prints="deleted"),
    job(
        "ablate",
        *(*SCENES, *short("distill"), *evaluated("evaluation")),
        f"ablation={json.dumps({'variants': [{'name': 'control'}], 'panels': [PANEL], 'images_at': 2.0})}",
        words=("--recipe", "ablation", "--out", "{beside}/ablated"),
        outputs="../ablated/ablation/page.html",
    ),
    job(
        "run_pipeline",
        *(*SCENES, *FEW_PAIRS, "latency.turns=2"),
        *(setting for one in ("efficient.training", "distill", "decoder") for setting in short(one)),
        *('mobile.executorch=["float32"]', "mobile.coreml=[]", "mobile.onnx=[]"),
        words=("--out", "{beside}/pipeline"),
        outputs=" ".join(
            f"../pipeline/{file}" for file in ("report/index.html", "mobile/manifest.json", "metrics.json")
        ),
    ),
)


def commands() -> set[str]:
    """All verbs but `serve`, whose page is for the machine that it runs on."""
    return set(command.VERBS) - {"serve"}


def test_every_command_is_submitted():
    assert {one.verb for one in SUBMISSIONS} == commands()


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a submission: exit code of `ray job submit`, output and time."""

    code: int
    printed: str
    seconds: float


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("submitted") / "run"


@pytest.fixture(scope="module")
def results(request, run: Path, tmp_path_factory, mobile_model: str) -> Iterator[dict[str, Future[Result]]]:
    """Submissions that this session's tests need, by name, submitted in order."""
    needed = {item.callspec.params["one"] for item in request.session.items if "results" in item.fixturenames}
    for one in reversed(SUBMISSIONS):
        needed |= {other for other in SUBMISSIONS if one in needed and other.name in one.after}
    inputs, futures = run.with_name("inputs"), dict[str, Future[Result]]()
    folder = tmp_path_factory.mktemp("head")  # Longer names are too long for Ray's sockets.
    lanes = ThreadPoolExecutor(LANES)
    with local_web.local_web() as web, ray_head(folder, cpus=8) as head:
        write_inputs(inputs, web)
        for one in SUBMISSIONS:
            if one in needed:
                before = [futures[name] for name in one.after]
                paths = {"run": run, "beside": run.parent, "inputs": inputs, "model": mobile_model}
                words = one.command(**{name: str(path) for name, path in paths.items()})
                futures[one.name] = lanes.submit(run_submission, head, one.name, words, before=before)
        yield futures
        lanes.shutdown(wait=False, cancel_futures=True)


def write_inputs(folder: Path, web: local_web.Web) -> None:
    """Write a latency table, a list of URLs, and a list of URLs to forget."""
    folder.mkdir()
    (folder / "latency.json").write_text(json.dumps(TABLE.to_values()))
    (folder / "forget.txt").write_text("scene:0/5\n")
    urls = [web.serve(f"/{number}.jpg", local_web.image(number)) for number in range(5)]
    rows = {"url": [*urls, web.url("/none")], "text": [f"picture {row}" for row in range(6)]}
    pq.write_table(pa.table(rows), folder / "links.parquet")


def run_submission(head: Head, name: str, words: list[str], *, before: list[Future[Result]]) -> Result:
    """Submit a command after its inputs exist; only the test of a failed job itself reports it."""
    for other in before:
        if other.result().code != 0:
            return Result(code=-1, printed="an input is missing", seconds=0.0)
    began = time.monotonic()
    process = head.start(name, *words)
    printed, _ = process.communicate(timeout=900)
    return Result(code=process.returncode, printed=printed, seconds=time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("one", SUBMISSIONS, ids=lambda one: one.name)
def test_submitted_command(one: Submission, results, run: Path, capsys):
    if one.verb == "download_shards" and not DOWNLOADER.exists():
        pytest.skip("img2dataset is not installed: `make downloader`")
    result = results[one.name].result()
    with capsys.disabled():
        print(f"{one.name}: {result.seconds:.1f} s")
    assert result.code == 0, result.printed
    assert f"Job '{one.name}' succeeded" in result.printed
    assert one.prints in result.printed
    # Resolved, because a job outside the run does not make its folder.
    assert [path for path in one.outputs if not (run / path).resolve().exists()] == []
