#!/usr/bin/env bash
# What a machine with Python 3.12, torch, transformers, accelerate and peft lacks, as wheels, for a GPU that reaches no
# package index: benchmarks/fetch_wheels.sh FOLDER [3.12], then there python -m benchmarks.gpu --wheels FOLDER
set -euo pipefail
folder=${1:?folder} python=${2:-3.12}
mkdir -p "$folder"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pinned() { # the version that is tested, if one is
    local line
    line=$(grep -iE "^$1==" "$root/launch/constraints.txt" | head -1 | cut -d" " -f1)
    echo "${line:-$1}"
}
fetch() {
    python3 -m pip download -q --only-binary=:all: --python-version "$python" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d "$folder" "$@"
}
fetch "$(pinned pydantic)" "$(pinned rich)" # with what they need: versions that fit each other
for name in einops hjson msgpack ninja packaging py-cpuinfo tqdm matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil six filelock psutil; do
    fetch --no-deps "$(pinned "$name")"
done
python3 -m pip wheel -q --no-deps --no-build-isolation -w "$folder" "$(pinned deepspeed)" # pure Python, from its source
ls "$folder"
