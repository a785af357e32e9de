#!/usr/bin/env bash
# Install the plugins of examples/ as a stranger would, and run their own tests.
# usage: examples.sh PYTHON, one that has qplug with its test extra
set -euo pipefail
python=$(realpath --no-symlinks "$1")
checkout=$(cd "$(dirname "$0")/.." && pwd)
away=$(mktemp --directory)
trap 'rm -rf "$away"' EXIT
"$python" -m venv "$away/venv"
# Torch need not be installed twice: the new environment sees the packages of the other one.
"$python" - "$away" <<'PYTHON'
import sys, sysconfig
from pathlib import Path
(inner,) = Path(sys.argv[1]).glob("venv/lib/python*/site-packages")
here = sysconfig.get_path("purelib")
(inner / "outer.pth").write_text(f"import site; site.addsitedir({here!r})\n")
PYTHON
cp -r "$checkout"/examples/qplug-* "$away"
cd "$away"
venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation \
    --constraint "$checkout/constraints.txt" './qplug-magr[test]' './qplug-gguf[test]'
venv/bin/python -m qplug plugins check
for plugin in qplug-magr qplug-gguf; do
    (cd "$plugin" && ../venv/bin/python -m pytest --quiet tests)
done
venv/bin/python -m qplug quantize qplug:demo --algo magr+gptq --samples 8 --seq-len 64 \
    --scheme W4A16 --group-size 32 --backend gguf --out out
venv/bin/python -m qplug verify out
