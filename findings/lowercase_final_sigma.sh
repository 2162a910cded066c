#!/usr/bin/env bash
# tokenizers 0.23.3 (Python, Rust) and @huggingface/tokenizers 0.2.0 (JavaScript): one tokenizer.json, two lower cases.
#
# Guess, before looking: both read the same tokenizer.json and give the same ids; its normalizer `Lowercase`, which
# CLIP's tokenizers have, is the same function in both.
# Seen: for a capital sigma at the end of a word Rust's Lowercase gives σ, letter by letter, and JavaScript's gives ς,
# as toLowerCase does by the word (and Python's str.lower). A caption in Greek capitals so has other ids in a browser
# than in the pipeline that made its training data.
#
# Output seen:
#   Python: [1, 2, 1, 3]
#   JavaScript: [1, 2, 1, 4]
#
# Fails if that changes. Needs Linux, Python 3.11 to 3.13 and Node.js 20 or later with npm; half a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check tokenizers==0.23.3 2>/dev/null
npm install --silent --no-audit --no-fund @huggingface/tokenizers@0.2.0 > /dev/null

venv/bin/python - <<'PYTHON' > output
from tokenizers import Tokenizer, models, normalizers

tokenizer = Tokenizer(models.BPE(vocab={"?": 0, "ο": 1, "δ": 2, "σ": 3, "ς": 4}, merges=[], unk_token="?"))
tokenizer.normalizer = normalizers.Lowercase()
tokenizer.save("tokenizer.json")
print("Python:", tokenizer.encode("ΟΔΟΣ").ids)
PYTHON
cat > encode.mjs <<'JAVASCRIPT'
import fs from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";

const tokenizer = new Tokenizer(JSON.parse(fs.readFileSync("tokenizer.json")), {});
console.log(`JavaScript: [${tokenizer.encode("ΟΔΟΣ").ids.join(", ")}]`);
JAVASCRIPT
node encode.mjs >> output
cat output
grep -qx 'Python: \[1, 2, 1, 3\]' output
grep -qx 'JavaScript: \[1, 2, 1, 4\]' output
