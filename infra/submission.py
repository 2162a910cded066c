"""Show what `ray job submit --working-dir .` would upload, and its largest files.

python infra/submission.py [FOLDER]

Exits with 2 above 100 MiB, which Ray's job server refuses by a bare HTTP 413.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMIT = 100 * 2**20
"""Bytes that the job server accepts, after compression; files are counted before it."""


def files(folder: Path) -> list[Path]:
    """Files that neither .gitignore nor .rayignore excludes."""
    listed = _git(folder, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    ignore = f"core.excludesFile={folder.absolute() / '.rayignore'}"
    excluded = set(_git(folder, "-c", ignore, "check-ignore", "--no-index", "--stdin", "-z", given=listed))
    return [folder / name for name in listed if name not in excluded and (folder / name).is_file()]


def _git(folder: Path, *words: str, given: list[str] | None = None) -> list[str]:
    text = None if given is None else "\0".join(given)
    done = subprocess.run(
        ["git", *words], cwd=folder, input=text, capture_output=True, text=True, check=False
    )
    return [name for name in done.stdout.split("\0") if name]


def main(folder: Path) -> int:
    """Print the total and the largest files."""
    sizes = {path: path.stat().st_size for path in files(folder)}
    total = sum(sizes.values())
    sys.stdout.write(
        f"{len(sizes)} files, {total / 2**20:.1f} MiB of at most {LIMIT >> 20} MiB; the largest:\n"
    )
    for path, size in sorted(sizes.items(), key=lambda item: -item[1])[:5]:
        sys.stdout.write(f"  {size / 2**20:7.1f} MiB  {path.relative_to(folder)}\n")
    if total <= LIMIT:
        return 0
    sys.stderr.write("too large for `ray job submit`: add what the job does not need to .rayignore\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
