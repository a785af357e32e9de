#!/usr/bin/env bash
# Run the default tests on Python 3.13 or newer, in an environment of its own.
# usage: newer_python.sh FOLDER
#
# Looks for a Python 3.13 or 3.14 on PATH, among pyenv's, and among uv's, which downloads one if it
# has none; QPLUG_NEWER_PYTHON names another. Without any it fails, unless a person has decided to do
# without: QPLUG_WITHOUT_NEWER_PYTHON=1.
# PyPI's torch for Linux comes with CUDA: about 3 GB are downloaded the first time.
set -euo pipefail
folder=$(realpath --no-symlinks "$1")
cd "$(dirname "$0")/.."

first_newer() { # the first of the given Pythons that runs and is new enough; a shim of pyenv may not
    for candidate in "$@"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 13))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

find_newer() {
    local versions
    versions=$(pyenv root 2> /dev/null || echo ~/.pyenv)/versions
    first_newer ${QPLUG_NEWER_PYTHON:+"$QPLUG_NEWER_PYTHON"} python3.13 python3.14 \
        "$versions"/3.13.*/bin/python "$versions"/3.14.*/bin/python ||
        uv python find --no-project '>=3.13' 2> /dev/null ||
        (uv python install 3.13 && uv python find --no-project 3.13) 2> /dev/null
}

stamp=$folder/installed
if ! [[ $stamp -nt pyproject.toml && $stamp -nt constraints.txt ]]; then
    if ! python=$(find_newer); then
        echo "NOT TESTED: this machine has no Python 3.13 or newer, on PATH or from pyenv or uv." >&2
        echo "Install one, name one with QPLUG_NEWER_PYTHON, or set QPLUG_WITHOUT_NEWER_PYTHON=1." >&2
        [[ ${QPLUG_WITHOUT_NEWER_PYTHON:-} == 1 ]] && exit 0 || exit 1
    fi
    "$python" -m venv --clear "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable '.[test,docs]'
    touch "$stamp"
fi
"$folder/bin/python" --version
exec "$folder/bin/python" -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
