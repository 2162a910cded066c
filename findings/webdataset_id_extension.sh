#!/usr/bin/env bash
# webdataset 1.0.2: a part of a sample named `id` is written as the text that it is, and decoded as an integer.
#
# Guess, before looking: .decode() knows images, JSON and arrays by their extension, and leaves a text named `id` as
# text or bytes; if not, a text that is no number is the only one to fail.
# Seen: TarWriter stores "000123" in 000123's own six bytes, and .decode() makes it 123. Ids that a tool pads to one
# width lose their zeros, "0012" and "12" become one id, "1_2" becomes 12, and nothing is raised or warned of. A text
# that is no number raises DecodingError, whose text is empty. `index`, `inx`, `cls` and `cls2` are decoded alike, and
# so is `source.id`, whose last part counts. The same text under `txt` comes back as it was. Who joins rows by such
# ids joins the wrong ones: name the part `id.txt`, or put it into the sample's JSON.
#
# Output seen:
#   000123: stored b'000123', id 123, source.id 123, id.txt '000123'
#   0012: stored b'0012', id 12, source.id 12, id.txt '0012'
#   12: stored b'12', id 12, source.id 12, id.txt '12'
#   1_2: stored b'1_2', id 12, source.id 12, id.txt '1_2'
#   a12: stored b'a12', DecodingError ''
#
# Fails if that changes. Needs Linux and Python 3.11 to 3.13; 90 MB and half a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check webdataset==1.0.2 braceexpand==0.1.7 numpy==2.1.3 PyYAML==6.0.3 2>/dev/null

cat > read.py <<'PYTHON'
import tarfile

import webdataset

for text in ("000123", "0012", "12", "1_2", "a12"):
    with webdataset.TarWriter("rows.tar") as tar:
        tar.write({"__key__": "row", "id": text, "source.id": text, "id.txt": text})
    with tarfile.open("rows.tar") as tar:
        stored = tar.extractfile("row.id").read()
    rows = webdataset.WebDataset("rows.tar", shardshuffle=False).decode()
    try:
        [row] = rows
        found = f"id {row['id']!r}, source.id {row['source.id']!r}, id.txt {row['id.txt']!r}"
    except webdataset.autodecode.DecodingError as error:
        found = f"{type(error).__name__} {str(error)!r}"
    print(f"{text}: stored {stored}, {found}")
PYTHON
venv/bin/python read.py 2>/dev/null | tee output
grep -qx "000123: stored b'000123', id 123, source.id 123, id.txt '000123'" output
grep -qx "0012: stored b'0012', id 12, source.id 12, id.txt '0012'" output
grep -qx "12: stored b'12', id 12, source.id 12, id.txt '12'" output
grep -qx "1_2: stored b'1_2', id 12, source.id 12, id.txt '1_2'" output
grep -qx "a12: stored b'a12', DecodingError ''" output
