#!/usr/bin/env bash
# Make .venv and install this package into it, with its dependencies, the compilers for phones and the development
# tools. `make setup` calls this.
#
# PYTHON names the interpreter. TORCH is installed first, if .venv has no torch yet: one or more requirements, URLs,
# wheel files or options of pip, as for torch's builds without CUDA (docs/start.md).
set -euo pipefail
cd "$(dirname "$0")/.."

accepted='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
pip_install() {
    .venv/bin/pip install --disable-pip-version-check --progress-bar off -c infra/constraints.txt "$@"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c "$accepted" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11, 3.12 or 3.13 with its venv module was found (tried:" \
        "${PYTHON:-python3.11, python3.12, python3.13, python3};" \
        "python3 is $(python3 --version 2>&1 || true))." >&2
    echo "Install one (on Debian or Ubuntu: apt install python3.13 python3.13-venv), or name it: make setup PYTHON=/path/to/python3.13" >&2
    return 1
}

if ! .venv/bin/python -c "$accepted" 2>/dev/null; then
    python=$(find_python)
    rm -rf .venv
    "$python" -m venv .venv
fi
echo "Installing into .venv with $(.venv/bin/python --version): 3.5 GB to download, 7.2 GB on disk; torch and its CUDA libraries are most of it."
if [ -n "${TORCH:-}" ] && ! .venv/bin/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    echo "Installing first: $TORCH"
    # Several words are several requirements.
    # shellcheck disable=SC2086
    pip_install $TORCH
fi
pip_install -e '.[dev,mobile,lora,serve]'
