#!/usr/bin/env bash
# Make .venv and install this package, its dependencies and the development tools into it. `make setup` calls this.
set -euo pipefail
cd "$(dirname "$0")/.."

accepted='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c "$accepted" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or 3.12 with its venv module was found (tried: ${PYTHON:-python3.11, python3.12, python3};" \
        "python3 is $(python3 --version 2>&1 || true))." >&2
    echo "Install one (on Debian or Ubuntu: apt install python3.11 python3.11-venv), or name it: make setup PYTHON=/path/to/python3.11" >&2
    return 1
}

if ! .venv/bin/python -c "$accepted" 2>/dev/null; then
    python=$(find_python)
    rm -rf .venv
    "$python" -m venv .venv
fi
echo "Installing into .venv with $(.venv/bin/python --version): 3.5 GB to download, 7.2 GB on disk; torch and its CUDA libraries are most of it."
.venv/bin/pip install --disable-pip-version-check --progress-bar off -c infra/constraints.txt -e '.[dev]'
