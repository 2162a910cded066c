#!/usr/bin/env bash
# Make the environment of img2dataset, by default in .venv-img2dataset. `make downloader` calls this.
#
#   infra/img2dataset/setup.sh [FOLDER]
#
# PYTHON names the interpreter it is made with (3.11 to 3.14); without it, that of .venv, else python3.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=${1:-.venv-img2dataset}
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
fi
if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'; then
    echo "$python is no Python 3.11 to 3.14 with its venv module; name one: PYTHON=/path/to/python3.13 $0" >&2
    exit 1
fi
echo "Installing img2dataset into $folder: 190 MB to download, 700 MB on disk, about a minute."
"$python" -m venv --clear "$folder"
"$folder/bin/pip" install --disable-pip-version-check --progress-bar off --quiet --no-deps -r infra/img2dataset/requirements.txt
