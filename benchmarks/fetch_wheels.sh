#!/usr/bin/env bash
# What a machine with Python 3.12, torch, transformers, accelerate and peft lacks, as wheels, for a GPU that reaches no
# package index: benchmarks/fetch_wheels.sh FOLDER, then there python -m benchmarks.gpu --wheels FOLDER
set -euo pipefail
folder=${1:?folder}
mkdir -p "$folder"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pinned() { grep -iE "^$1==" "$root/launch/constraints.txt" | head -1 | cut -d" " -f1; }
for name in hjson pydantic pydantic-core annotated-types typing-inspection rich markdown-it-py mdurl pygments \
    matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil six filelock psutil; do
    want=$(pinned "$name" || true)
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d "$folder" "${want:-$name}"
done
python3 -m pip wheel -q --no-deps --no-build-isolation -w "$folder" "$(pinned deepspeed)" # pure Python, from its source
ls "$folder"
