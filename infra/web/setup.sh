#!/usr/bin/env bash
# Fetch onnxruntime-web, which the page of a bundle runs its models by, into .web/onnxruntime-web. `make web` calls this.
#
#   infra/web/setup.sh [BUNDLE]
#
# It is fetched by npm from the registry that npm is configured for, and kept only if its hashes are those of
# snapfusion/export/web/onnxruntime-web.sha256. BUNDLE is a bundle to copy it into, for a static host.
set -euo pipefail
cd "$(dirname "$0")/../.."

hashes=$PWD/snapfusion/export/web/onnxruntime-web.sha256
folder=$PWD/.web/onnxruntime-web
bundle=${1:-}
package=$(sed -n '1s/^# //p' "$hashes")

has_files() {
    (cd "$1" 2>/dev/null && sha256sum --check --quiet --strict "$hashes" 2>/dev/null)
}

if [ -n "$bundle" ] && [ ! -f "$bundle/web/index.html" ]; then
    echo "BUNDLE=$bundle has no page web/index.html: compile it with ONNX models" >&2
    exit 2
fi
if ! has_files "$folder"; then
    if ! command -v npm > /dev/null; then
        echo "npm is not here, which fetches $package: install Node.js with npm" >&2
        exit 1
    fi
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    echo "Fetching $package by npm: 33 MB to download, 41 MB are kept."
    archive=$(cd "$scratch" && npm pack --silent "$package")
    tar -xzf "$scratch/$archive" -C "$scratch" package/dist
    if ! has_files "$scratch/package/dist"; then
        echo "$package as npm fetched it has other hashes than snapfusion/export/web/onnxruntime-web.sha256" >&2
        exit 1
    fi
    mkdir -p "$folder"
    (cd "$scratch/package/dist" && cp $(sed -n 's/^[0-9a-f]\{64\}  //p' "$hashes") "$folder")
fi
if [ -n "$bundle" ]; then
    mkdir -p "$bundle/web/onnxruntime-web"
    cp "$folder"/* "$bundle/web/onnxruntime-web"
fi
