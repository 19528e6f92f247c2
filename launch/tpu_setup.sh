#!/bin/sh
# Run by `tpu_pod.py setup` and sky_tpu.yaml on every worker: an environment with this checkout and JAX for TPUs in it.
set -eu
cd "$(dirname "$0")/.."
python=$(command -v python3.12 || command -v python3.11 || command -v python3)
if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
    "$python" -m venv .venv || {
        sudo apt-get update -qq
        sudo apt-get install -y -qq "$(basename "$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')")-venv"
        "$python" -m venv .venv
    }
else # Ubuntu 22.04 has Python 3.10 alone, 26.04 has 3.14, which is not supported; uv, which SkyPilot puts there itself, brings 3.12
    [ -x "$HOME/.local/bin/uv" ] || "$python" -m pip install -qq --user uv
    "$HOME/.local/bin/uv" venv -q --allow-existing --seed --python 3.12 .venv
fi
# gcs: work directories and data may be gs:// paths. tpu: the libtpu of the JAX that is then there.
.venv/bin/python -m pip install -qq -c constraints.txt -e ".[gcs]"
.venv/bin/python -m pip install -qq -e ".[tpu]"
