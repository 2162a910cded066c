#!/usr/bin/env bash
# coremltools 9.0: converting one program twice gives two different packages.
#
# Guess, before looking: the converter is deterministic, so a package can be cached, deduplicated or compared by a
# hash of its files, as an ExecuTorch program can.
# Seen: of a program with two convolutions, converted in four processes, weight.bin is equal, and no two model.mlmodel
# are: their protobuf messages are equal, but maps are serialized in an order that changes from process to process.
# Manifest.json differs as well, as it names its items by new UUIDs. So hash weight.bin, and compare the parsed messages.
#
# Output seen:
#   weight.bin: 1 of 4 different
#   model.mlmodel: 4 of 4 different, parsed: 1
#   Manifest.json: 4 of 4 different
#
# Fails if that changes. Needs Linux and Python 3.11 to 3.13; 0.3 GB and a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check coremltools==9.0 'numpy==2.3.5' 2>/dev/null

cat > convert.py <<'PYTHON'
import sys

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb

WEIGHT = (np.arange(144, dtype=np.float32) / 100).reshape(4, 4, 3, 3)


@mb.program(input_specs=[mb.TensorSpec(shape=(1, 4, 8, 8))])
def program(x):
    x = mb.relu(x=mb.conv(x=x, weight=WEIGHT, pad_type="same"))
    return mb.conv(x=x, weight=WEIGHT[::-1].copy(), pad_type="same")


target = ct.target.iOS17
ct.convert(program, convert_to="mlprogram", minimum_deployment_target=target).save(sys.argv[1])
PYTHON
for number in 1 2 3 4; do
    venv/bin/python convert.py "$number.mlpackage" >/dev/null 2>&1
done

venv/bin/python - 2>/dev/null <<'PYTHON' | tee output
from pathlib import Path

import coremltools as ct

packages = [Path(f"{number}.mlpackage") for number in (1, 2, 3, 4)]


def different(name):
    return len({next(package.rglob(name)).read_bytes() for package in packages})


specs = [ct.utils.load_spec(str(package)) for package in packages]
parsed = 1 + sum(spec != specs[0] for spec in specs)
print(f"weight.bin: {different('weight.bin')} of 4 different")
print(f"model.mlmodel: {different('model.mlmodel')} of 4 different, parsed: {parsed}")
print(f"Manifest.json: {different('Manifest.json')} of 4 different")
PYTHON
grep -qx 'weight.bin: 1 of 4 different' output
grep -qxE 'model.mlmodel: [234] of 4 different, parsed: 1' output
grep -qx 'Manifest.json: 4 of 4 different' output
