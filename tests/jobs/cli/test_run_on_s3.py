"""Runs with all URLs in an object store, and credentials that must not appear anywhere."""

import base64
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import fsspec
import pyarrow.parquet as pq
import pytest
from in_process import in_process
from ray_nodes import ray_head
from set_options import set_options

from jobs import compute_targets, encode_latents, render_scenes
from pipelines.storage.objects import list_parquet, read_bytes
from pipelines.tables.table import open_table

ROOT = Path(__file__).parents[3]
SCRIPT = str(Path(__file__).with_name("run_on_s3.py"))
KEY, SECRET = "AKIAKEYOFTHISTEST", "Secret/of+this/TEST0123456789abcdefghijkl"
TOKEN = "Token/of+this==TEST0123456789"
SMALL = (
    *("source.scenes=24", "source.scenes_per_shard=12", "latents.rows_per_unit=12", "targets.draws=2"),
    *("distill.student=null", "distill.targets=table", "verification.units=1"),
    *("distill.loop.num_steps=4", "distill.loop.global_batch=8", "distill.trainer.micro_batch=8"),
    *("distill.trainer.checkpoint_every=2", "distill.trainer.curve_every=1", "distill.trainer.num_workers=1"),
)


@pytest.fixture
def sessions() -> Iterator[Path]:
    """Folder of Ray's sessions, with a name short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    """A file like a mounted Kubernetes Secret."""
    file = tmp_path / "credentials"
    file.touch(mode=0o600)
    file.write_text(f"AWS_ACCESS_KEY_ID={KEY}\nAWS_SECRET_ACCESS_KEY={SECRET}\nAWS_SESSION_TOKEN={TOKEN}\n")
    return file


def run(*words: str, sessions: Path) -> str:
    """Output of a command, in an environment without variables of stores."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    own = {
        "RAY_TMPDIR": str(sessions),
        "SNAPFUSION_CACHE": str(sessions / "cache"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *words]
    result = subprocess.run(command, cwd=sessions, env=inherited | own, check=False, **pipes)
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout


def options(out: str, settings: tuple[str, ...]) -> list[str]:
    return ["--out", out, *set_options(settings)]


def on_s3(credentials: Path) -> tuple[str, ...]:
    """Storage settings that replace the environment's variables."""
    endpoint = f"storage.endpoint={os.environ['AWS_ENDPOINT_URL']}"
    return endpoint, "storage.region=us-east-1", f"storage.credentials={credentials}"


def contents(bucket: str, sessions: Path) -> Iterator[tuple[str, bytes]]:
    """Every object of the bucket and every file of Ray; of Parquet its schema and rows too."""
    filesystem = fsspec.filesystem("s3")
    filesystem.invalidate_cache()
    for name in filesystem.find(bucket):
        data = filesystem.cat_file(name)
        yield name, data
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
            yield name, f"{table.schema.to_string(show_schema_metadata=True)}{table.to_pylist()}".encode()
    for path in sessions.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()


def spellings(secret: str) -> list[bytes]:
    plain = secret.encode()
    encoded = [base64.b64encode(plain), base64.urlsafe_b64encode(plain), quote(secret, safe="").encode()]
    return [plain, *(text.rstrip(b"=") for text in encoded)]


def assert_secrets_hidden(bucket: str, *, sessions: Path, printed: str, credentials: Path) -> None:
    """The secrets appear nowhere; the path of their file, which is not secret, does."""
    found = [("output", printed.encode()), *contents(bucket, sessions)]
    for secret in (KEY, SECRET, TOKEN):
        leaks = [name for name, data in found if any(text in data for text in spellings(secret))]
        assert leaks == []
    shown = [name for name, data in found if str(credentials).encode() in data]
    assert "output" in shown
    assert any("/settings/" in name for name in shown)
    assert any("/logs/" in name and name.startswith(str(sessions)) for name, _ in found)


def data_files(url: str) -> dict[str, bytes]:
    return {name: read_bytes(f"{url}/{name}") for name in list_parquet(url)}


@pytest.mark.ray
def test_run_in_a_bucket_hides_its_secrets(bucket, credentials, sessions, tmp_path, monkeypatch):
    out, local = f"{bucket}/small", str(tmp_path / "here")
    jobs = ["in-process", "render_scenes", "encode_latents", "compute_targets", "distill_steps"]
    jobs += [f"verify_table,{out}/targets", "vacuum"]
    printed = run(SCRIPT, *jobs, "--", *options(out, (*SMALL, *on_s3(credentials))), sessions=sessions)
    assert_secrets_hidden(bucket, sessions=sessions, printed=printed, credentials=credentials)
    for job in (encode_latents, compute_targets):
        monkeypatch.setattr(job, "runner", lambda *_, **__: in_process)
    for job in (render_scenes, encode_latents, compute_targets):
        assert job.main(options(local, SMALL)) == 0
    for table in ("latents", "targets"):
        assert data_files(f"{out}/{table}") == data_files(f"{local}/{table}")
    assert open_table(f"{out}/targets").num_rows == 48
    names = {name.removeprefix("bucket/small/") for name in fsspec.filesystem("s3").find(out)}
    assert {"student/metrics.json", "student/model/model_index.json"} <= names
    assert any(name.startswith("student/logs/") for name in names)
    assert not any(name.startswith("student.training/") for name in names)


FULL = (
    *("source.scenes=48", "source.scenes_per_shard=24", "latents.rows_per_unit=24", "latency.turns=2"),
    *("efficient.training.loop.num_steps=4", "efficient.training.loop.global_batch=16"),
    *("efficient.training.trainer.micro_batch=16", "efficient.training.trainer.num_workers=1"),
    "distill.trainer.num_workers=1",
    *("distill.loop.num_steps=4", "distill.loop.global_batch=16", "distill.trainer.micro_batch=16"),
    *("distill.validation.every=2", "distill.validation.prompts.limit=4"),
    *("captions.limit=32", "pairs.rows_per_unit=16", "pairs.generation.steps=8"),
    *("decoder.loop.num_steps=4", "decoder.loader.held_out=0.3"),
    *("decoder.timing_batches=[1]", "decoder.timing_repeats=2"),
    *('mobile.executorch=["float32"]', 'mobile.coreml=["float16"]', "mobile.onnx=[]"),
    'evaluation.contenders=[{"name": "ddim-50", "sampler": {"steps": 4}}, '
    '{"name": "student", "model": "run:student/model", "sampler": {"steps": 4}}]',
    *("evaluation.guidance=[2.0]", "evaluation.prompts.limit=8", "evaluation.references.count=16"),
    *("evaluation.groups=2", "oracle_floor=null"),
)
# None of these depends on measured times.
WEIGHTS = (
    "efficient/model/unet/diffusion_pytorch_model.safetensors",
    "student/model/unet/diffusion_pytorch_model.safetensors",
    "student/raw/unet/diffusion_pytorch_model.safetensors",
    "decoder/decoder.safetensors",
)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_pipeline_in_a_bucket_equals_one_on_disk(bucket, credentials, sessions, tmp_path, capsys):
    out, local = f"{bucket}/full", str(tmp_path / "here")
    words = ["--recipe", "mini", *options(out, (*FULL, *on_s3(credentials)))]
    # Shards are in the bucket already, as in a run at full size.
    printed = run("-m", "jobs.render_scenes", *words, sessions=sessions)
    words += ["--set", f"source.url={out}/shards"]
    printed += run("-m", "jobs.run_pipeline", *words, sessions=sessions)
    tables = [f"{out}/{name}" for name in ("latents", "pairs")]
    after = [*(f"verify_table,{table}" for table in tables), "evaluate", "vacuum", "report"]
    printed += run(SCRIPT, *after, "--", *words, sessions=sessions)
    assert printed.count("no fault found") == 2
    assert_secrets_hidden(bucket, sessions=sessions, printed=printed, credentials=credentials)
    jobs = ["render_scenes", "encode_latents", "train_efficient", "distill_steps"]
    jobs += ["generate_pairs", "distill_decoder"]
    run(SCRIPT, *jobs, "--", "--recipe", "mini", *options(local, FULL), sessions=sessions)
    for name in ("latents", "pairs"):
        assert data_files(f"{out}/{name}") == data_files(f"{local}/{name}")
    for name in WEIGHTS:
        assert read_bytes(f"{out}/{name}") == read_bytes(f"{local}/{name}"), name
    names = {name.removeprefix("bucket/full/") for name in fsspec.filesystem("s3").find(out)}
    assert {"mobile/manifest.json", "report/index.html", "metrics.json", "evaluation/results.json"} <= names
    for folder in ("student/logs/", "student/watch/", "student/best/"):
        assert any(name.startswith(folder) for name in names), folder
    assert not any(".training/" in name for name in names)
    with capsys.disabled():
        print(f"\n{len(names)} objects of a whole run in a bucket; tables and weights as on a disk")


@pytest.mark.slow
@pytest.mark.ray
def test_workers_read_credentials_on_their_node(bucket: str, credentials: Path, sessions: Path) -> None:
    words = options(f"{bucket}/joined", (*SMALL, *on_s3(credentials)))
    printed = run("-m", "jobs.render_scenes", *words, sessions=sessions)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with ray_head(sessions) as head:
            code, output = head.submit("encode", "jobs.encode_latents", *words)
            assert code == 0, output
            listed = subprocess.run(head.job("list"), env=head.environment, capture_output=True, check=True)
    assert open_table(f"{bucket}/joined/latents").num_rows == 24
    printed += output + listed.stdout.decode() + listed.stderr.decode()
    assert_secrets_hidden(bucket, sessions=sessions, printed=printed, credentials=credentials)
