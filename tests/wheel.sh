#!/usr/bin/env bash
# Build the wheel, install it alone in a new environment, and quantize with it away from the checkout.
# usage: wheel.sh PYTHON
set -euo pipefail
python=$(realpath --no-symlinks "$1")
checkout=$(cd "$(dirname "$0")/.." && pwd)
away=$(mktemp --directory)
trap 'rm -rf "$away"' EXIT
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$away/dist" "$checkout"
"$python" -m venv "$away/venv"
"$away/venv/bin/pip" install --quiet --constraint "$checkout/constraints.txt" "$away"/dist/*.whl
cd "$away"
venv/bin/qplug plugins check
venv/bin/qplug quantize qplug:demo --out out
venv/bin/qplug verify out
venv/bin/qplug report out
