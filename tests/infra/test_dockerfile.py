"""The image of the nodes contains what a job needs. It was never built here, without a container engine."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "infra/Dockerfile").read_text()


def test_copied_files_suffice_for_a_job(tmp_path):
    copied = re.findall(r"^COPY --chown=ray:users (.*) (\S+)$", DOCKERFILE, re.MULTILINE)
    assert copied
    for sources, target in copied:
        for source in sources.split():
            path = tmp_path / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, path, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                path.mkdir(exist_ok=True)
                shutil.copy(ROOT / source, path)
    run = (
        "import jobs, runpy; print(jobs.__file__); runpy.run_module('jobs.run_pipeline', run_name='__main__')"
    )
    command = [sys.executable, "-c", run, "--dry-run", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    for name in (project["readme"], *project["license-files"]):
        assert (tmp_path / name).exists()
    assert "-c infra/constraints.txt" in DOCKERFILE
    assert (tmp_path / "infra/constraints.txt").exists()


def test_the_images_python_is_accepted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    major, minor = re.search(r"^FROM \S+-py(\d)(\d+)$", DOCKERFILE, re.MULTILINE).groups()
    assert SpecifierSet(project["requires-python"]).contains(f"{major}.{minor}")
