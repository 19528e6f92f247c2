#!/bin/sh
# Run by `tpu_pod.py setup` on every worker: an environment with this checkout and JAX for TPUs in it.
set -eu
cd "$(dirname "$0")/.."
python=$(command -v python3.12 || command -v python3.11 || command -v python3)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is older than Python 3.11: choose a newer --runtime-version" >&2
    exit 1
}
"$python" -m venv .venv || {
    sudo apt-get update -qq
    sudo apt-get install -y -qq "$(basename "$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')")-venv"
    "$python" -m venv .venv
}
# gcs: work directories and data may be gs:// paths. jax[tpu] brings the libtpu of the JAX that is already pinned.
.venv/bin/python -m pip install -qq -c constraints.txt -e ".[gcs]"
jax=$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("jax"))')
.venv/bin/python -m pip install -qq "jax[tpu]==$jax"
