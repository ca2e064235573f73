#!/usr/bin/env bash
# Installs the hpsv2 package without the old packages that it pins.
#
#   bash scripts/install_hps.sh                 into the active environment, for hps.backend="hpsv2"; needs a CUDA
#                                               build of torch, for which torchvision is published
#   bash scripts/install_hps.sh --target DIR    aside, torchvision included, as the tests' reference
#
# PYTHON names another interpreter than `python`. The default backend, "transformers", needs none of this.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
torchvision="torchvision==0.28.0"  # the release made for torch 2.13

if [[ $# -eq 0 ]]; then
    if ! cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null); then
        echo "install_hps.sh: $python has no torch; name the environment's interpreter, PYTHON=.venv/bin/python" >&2
        exit 1
    fi
    if [[ -z $cuda ]]; then
        echo "install_hps.sh: this torch has no CUDA, and torchvision beside it would break transformers and diffusers;" \
            "keep hps.backend=transformers, or install aside with --target DIR" >&2
        exit 1
    fi
    target=()
elif [[ $# -eq 2 && $1 == --target ]]; then
    target=(--target "$2")
else
    echo "usage: bash scripts/install_hps.sh [--target DIR]" >&2
    exit 2
fi

"$python" -m pip install --quiet --no-deps ${target[@]+"${target[@]}"} -r requirements-hps.txt "$torchvision"
