"""Fixtures of many tests: quiet libraries, and a Stable Diffusion small enough for a test."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

# Before torch and Ray are imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fsspec
import pytest
import s3fs
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from filelock import FileLock
from transformers import CLIPTextConfig, CLIPTextModel

import snapfusion.export.build as building
import snapfusion.export.variants as variants
from snapfusion.export.modules import FixedModule
from snapfusion.models.architecture import Architecture, Layer
from snapfusion.models.bundle import Bundle, weight_hash
from snapfusion.models.checksums import CHECKSUMS_FILE
from snapfusion.models.save import save
from snapfusion.models.tokenizer import build_tokenizer
from snapfusion.models.unet import build_unet
from snapfusion.schedule import Schedule
from snapfusion.settings import digest

if TYPE_CHECKING:
    from deletion_run import Run

    from jobs.training.progress_channel import OnReport

# Test files have unique names, so all their folders can be on the path of this process, of scripts that tests
# start and of Ray's workers. The checkout comes first, or an installed copy would be tested.
TESTS = Path(__file__).parent
_FOLDERS = [str(folder) for folder in (TESTS.parent, *sorted({file.parent for file in TESTS.rglob("*.py")}))]
sys.path[:0] = [folder for folder in _FOLDERS if folder not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])


SLOWEST = (
    *("test_compile_mobile", "test_trainer", "test_students", "test_submit", "test_run_on_s3"),
    *(
        "test_web_page",
        "test_execution",
        "test_targets",
        "test_coreml",
        "test_evolve_unet",
        "test_delete_rows",
    ),
    *("test_benchmark", "test_opens_and_resumes", "test_measure_efficiency", "test_train_mini"),
    *("test_train_efficient", "test_exits", "test_compare_chance", "test_isolation"),
    *("test_store_faults", "test_downloads", "test_mini_weights"),
    *("test_distill_decoder", "test_images", "test_latency", "test_duplicates", "test_executorch"),
    *("test_resolution", "test_processes", "test_forget", "test_attention", "test_part_cache", "test_report"),
    *("test_verify_bundle", "test_evaluate", "test_aws", "test_measure_latency", "test_samples"),
    *("test_measure_robustness", "test_without_compilers", "test_stock_diffusers", "test_source_faults"),
    *("test_read_throughput", "test_step_distillation", "test_latents", "test_fingerprints", "test_search"),
    *("test_efficient_unet_document", "test_plan_workload", "test_top_up", "test_robustness"),
)
"""The slowest files by their time. They come first: else the last of them would run while a core is idle."""
FILES_ON_RAY = pytest.StashKey[set[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --quick and --device."""
    parser.addoption("--device", choices=["cuda", "cpu"], default="cuda", help="of the tests marked gpu")
    parser.addoption("--quick", action="store_true", help="without Ray and without the slowest files")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names bytes by their argument: a case's name may hold no file, whose time stamps differ by process."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(trylast=True)  # when those that -m leaves out are gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort files that need Ray to the front, then the slowest; or leave both out."""
    if config.getoption("quick"):
        left_out = [item for item in items if item.path.stem in SLOWEST or item.get_closest_marker("ray")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    config.stash[FILES_ON_RAY] = {item.path for item in items if item.get_closest_marker("ray")}
    rank = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: (not _is_on_ray(item), rank.get(item.path.stem, len(SLOWEST))))


def _is_on_ray(item: pytest.Item) -> bool:
    return item.path in item.config.stash[FILES_ON_RAY]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the cluster at the first file that needs none, beside which its idle processes would go on."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized() and not _is_on_ray(item):
        ray.shutdown()


def pytest_collection_finish() -> None:
    """Keep the garbage collector from traversing the imported libraries, as long as the tests run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure() -> None:
    """Let libraries that look for leaks at the end find none."""
    gc.unfreeze()


def tiny_bundle(seed: int = 0, *, image_size: int = 16) -> Bundle:
    """Random weights in SD-v1.5's topology, 4x8x8 latents, well below a second to sample.

    Images are of 16 px, or of 32, as the miniature's judges need.
    """
    stages = (8, 16) if image_size == 16 else (8, 16, 16)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer([("r", "e"), ("re", "d</w>")], max_length=16)
    return Bundle(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=len(tokenizer) - 2,
                eos_token_id=len(tokenizer) - 1,
                pad_token_id=len(tokenizer) - 1,
            )
        ),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        vae=AutoencoderKL(
            sample_size=image_size,
            block_out_channels=stages,
            down_block_types=("DownEncoderBlock2D",) * len(stages),
            up_block_types=("UpDecoderBlock2D",) * len(stages),
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.4,
        ),
        schedule=Schedule(),
        prediction_type="epsilon",
        source="tiny",
    )


def tiny_student(seed: int = 0) -> Bundle:
    """As `tiny_bundle`, with few blocks, because each takes long to lower: a UNet of one level, for v."""
    bundle = tiny_bundle(seed)
    layer = Layer(resnet="0", attentions=("0",), skip=True)
    bundle.unet = build_unet(
        Architecture(
            channels=(8,),
            heads=(2,),
            down=((layer,),),
            middle=(Layer(resnet="0"),),
            up=((layer, Layer(resnet="1", skip=True)),),
            context=16,
            groups=4,
            sample_size=8,
        )
    )
    bundle.prediction_type = "v_prediction"
    bundle.__post_init__()
    return bundle


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Restore the number of torch's threads, which jobs set for their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other beside a busy process can take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A diffusers folder with the tiny bundle, sealed."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny_bundle(), folder)
    return str(folder)


def unsealed_copy(model: str, folder: Path) -> Path:
    """Copy a model, for a test that changes it, without its checksums."""
    shutil.copytree(model, folder)
    (folder / CHECKSUMS_FILE).unlink()
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: str) -> Run:
    """A run with LATENTS, TARGETS and PAIRS of a few planted rows; not to be changed."""
    from deletion_run import make_run

    return make_run(tmp_path_factory.mktemp("whole") / "run", teacher=tiny_teacher)


@pytest.fixture
def run(whole_run: Run, tmp_path: Path) -> Run:
    """A copy of it."""
    return whole_run.copy(tmp_path / "run")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests: of all processes of pytest-xdist, whose own folders lie in it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def mobile_model(shared: Path) -> str:
    """A diffusers folder of a tiny model that predicts v, as a student does; made at the first request."""
    folder = shared / "tiny-v"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            save(tiny_student(seed=3), folder, dtype=torch.float32)
    return str(folder)


MOBILE = (
    "mobile.guidance=2.0",
    'mobile.captions=["red", "a red thing"]',
    "mobile.steps=3",
    'mobile.executorch=["float32"]',  # lowering to 8 bits takes twice as long as all else
    "mobile.onnx=[]",  # test_onnx_bundle.py has a bundle of its own
    "mobile.decoder=null",
    "mobile.licence.weights=Apache-2.0",
    "mobile.licence.data=CC0-1.0",
)
"""Settings under which a tiny model's bundle is made soonest."""


@pytest.fixture(scope="session")
def compiled_once(shared: Path) -> Iterator[None]:
    """Compile a module's program once in this run of the tests: lowering takes most of a bundle's time.

    In this process, where programs can be replaced, instead of several.
    """
    real = variants.compile_executorch

    def compiled(module: FixedModule, **options: Any) -> bytes:
        shapes = [port.shape for port in module.inputs]
        key = digest({"weights": weight_hash(module.network), "shapes": shapes, "options": options})
        path = shared / f"{module.name}-{key}.pte"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_bytes(real(module, **options))
            return path.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "compile_executorch", compiled)
        patch.setattr(building, "worker_processes", lambda _: ThreadPoolExecutor(1))
        patch.setattr(building, "num_processes", lambda **_: 1)
        yield


@pytest.fixture(scope="session")
def exported_once(shared: Path) -> Iterator[None]:
    """Export a module to ONNX once in this run of the tests, as `compiled_once` does for ExecuTorch."""
    real = variants.export_onnx

    def export(module: FixedModule, path: Path) -> None:
        shapes = [port.shape for port in module.inputs]
        key = digest({"weights": weight_hash(module.network), "shapes": shapes})
        kept = shared / f"{module.name}-{key}.onnx"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                real(module, kept)
        shutil.copy(kept, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "export_onnx", export)
        yield


@pytest.fixture(scope="session")
def mobile_bundle(shared: Path, mobile_model: str, compiled_once: None) -> Path:
    """The tiny model's bundle, with every variant that can be computed here; not to be changed.

    It is made at the first request, which takes a minute or two.
    """
    from jobs import compile_mobile

    run = shared / "bundle"
    settings = [word for setting in MOBILE for word in ("--set", setting)]
    with FileLock(f"{run}.lock"):
        if not (run / "mobile/manifest.json").exists():
            assert compile_mobile.main([mobile_model, "--out", str(run), *settings]) == 0
    return run / "mobile"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster, for all tests that need one; its workers can import the stages of tests."""
    import ray

    from jobs.runtime.cluster import connect
    from jobs.runtime.settings import ClusterSettings

    connect(ClusterSettings())
    yield
    ray.shutdown()


@contextlib.contextmanager
def ray_train_locally() -> Iterator[None]:
    """Ray Train's local mode: a training of one worker runs in this process, on no cluster.

    The actors of Ray Train take half a minute to start for a training that takes a second; tests of what a
    training makes need none of them.
    """
    import ray.train

    import jobs.cli.resources as resources
    import jobs.training.trainer as trainer

    @contextlib.contextmanager
    def channel(on_report: OnReport) -> Iterator[Any]:
        yield SimpleNamespace(put=SimpleNamespace(remote=on_report))

    def no_workers(*, num_workers: int, **_: object) -> ray.train.ScalingConfig:
        assert num_workers == 1
        return ray.train.ScalingConfig(num_workers=0)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "ScalingConfig", no_workers)
        patch.setattr(trainer, "progress_channel", channel)
        patch.setattr(resources, "connect", lambda *_: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def local_training() -> Iterator[None]:
    """Trainings of one worker in this process, as long as the tests of a file run."""
    with ray_train_locally():
        yield


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on an S3 server of this test's own."""
    with s3_server(subprocess.DEVNULL):
        yield "s3://bucket"


@contextlib.contextmanager
def s3_server(output: int | IO[str]) -> Iterator[None]:
    """An S3 server with an empty bucket `s3://bucket`, which writes a line for each request to `output`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # In a process of its own: deltalake holds the GIL while it waits for an answer.
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=output, stderr=output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        s3fs.S3FileSystem.clear_instance_cache()
        _await_answer(port)
        fsspec.filesystem("s3").mkdir("s3://bucket")
        yield
        s3fs.S3FileSystem.clear_instance_cache()
    server.terminate()
    server.wait()


def _await_answer(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise TimeoutError("the S3 server did not start")
