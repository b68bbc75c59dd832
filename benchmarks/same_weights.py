"""Whether two checkouts train the same weights, to the bit.

Both train a tiny LLaMA with dropout on two ranks for seven steps of two micro-batches, with refreshes and two changes
of the sampled layers: five methods, replicated and under ZeRO-3, in float64 and bfloat16. Compared are the models they
write.

    python benchmarks/same_weights.py OLD NEW

OLD and NEW are checkouts; both run in this interpreter's environment. Exit code 1 if weights differ by more than 1e-12
relative (Frobenius, of a tensor) in float64, or at all in bfloat16, but for `REORDERED`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("ows", "lisa", "galore", "full", "lora")
SHARDINGS = ("replicated", "zero3")
DTYPES = ("float64", "bfloat16")
LARGEST = {"float64": 1e-12, "bfloat16": 0.0}  # relative differences
# buckets sum the squares of a gradient's norm in an order of their own, which clipping shows in float32 masters
REORDERED = {("full", "replicated", "bfloat16"): 1e-8}
LIMIT = 900  # seconds for all runs of a checkout
RENAMED = {  # key now: key before
    "model.attn_implementation": "model.attention",
    "optim.merge_rounding": "optim.fold_rounding",
    "optim.update_proj_gap": "optim.refresh_gap",
    "train.eval_steps": "train.eval_every",
    "train.global_batch_size": "train.batch_size",
    "train.save_steps": "train.save_every",
    "train.save_total_limit": "train.keep_last",
}


def recipe(inputs: Path, output: Path, method: str, sharding: str, dtype: str) -> dict[str, Any]:
    """As the recipe's keys are called now."""
    return {
        "model": {"path": str(inputs / "model"), "dtype": dtype, "attn_implementation": "eager"},
        "data": {"train": str(inputs / "train.jsonl"), "max_length": 64, "cache": str(output.parent / "cache")},
        "method": {"name": method, "lora_rank": 4},
        "sampling": {"gamma": 1.5, "period": 3, "tau": 2.0, "calibration_samples": 4},
        "optim": {
            "rank": 4,
            "lr": 1e-2,
            "update_proj_gap": 2,
            "warmup_steps": 2,
            "weight_decay": 0.01,
            "moments_on_refresh": "keep",
        },  # its default was another one before
        "train": {
            "output_dir": str(output),
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "steps": 7,
            "sharding": sharding,
            "save_steps": 100,
        },
        "log": {"progress": "none", "trackers": []},
    }


def renamed(tree: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the keys of a checkout from before `RENAMED`."""
    return {
        section: {RENAMED.get(f"{section}.{key}", f".{key}").partition(".")[2]: value for key, value in keys.items()}
        for section, keys in tree.items()
    }


def ranks(checkout: Path, folder: Path, recipes: list[str]) -> None:
    """Have two ranks of ``checkout`` train all recipes, one after the other; what they print is in files."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    environment |= {
        "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    words = [sys.executable, "-c", _RANK, str(checkout), *recipes]
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    started = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(words, cwd=folder, env=own, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    for code, log in zip(codes, logs, strict=True):
        if code:
            raise SystemExit(f"{checkout}: a rank ended with exit code {code}:\n{log.read_text()[-4000:]}")


_RANK = """
import sys
import torch
import ows_ds.cli
assert ows_ds.__file__.startswith(sys.argv[1] + "/"), ows_ds.__file__
main = getattr(ows_ds.cli, "main")
main = getattr(main, "main", main)  # a module, or the function
torch.set_num_threads(1)
for recipe in sys.argv[2:]:
    code = main(["train", "--config", recipe])
    if code != 0:
        sys.exit(f"{recipe}: exit code {code}")
"""


def relative(old: dict[str, Any], new: dict[str, Any]) -> float:
    """The largest relative difference of a tensor; 0 where every bit is equal, infinite where tensors are missing."""
    import torch

    def differ(a: Any, b: Any) -> float:
        if a.dtype != b.dtype or a.shape != b.shape:
            return float("inf")
        if torch.equal(a, b):
            return 0.0
        found = float((a.double() - b.double()).norm() / a.double().norm())
        return found if found > 0 else float("inf")  # not a number is no equality

    return max(differ(old[name], new[name]) for name in old) if old.keys() == new.keys() else float("inf")


def compare(old: Path, new: Path, methods: Sequence[str] = METHODS) -> list[tuple[str, str, str, float]]:
    """Train with both; (method, sharding, dtype, largest relative difference) of each run."""
    from safetensors.torch import load_file

    sys.path.insert(0, str(ROOT))
    from tests.support.tiny_run import write_inputs

    cases = [(method, sharding, dtype) for sharding in SHARDINGS for dtype in DTYPES for method in methods]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = write_inputs(folder)
        for side, checkout in (("old", old), ("new", new)):
            (folder / side).mkdir()
            before = (checkout / "ows_ds" / "config.py").exists()  # keys are called as before
            files = []
            for case in cases:
                tree = recipe(inputs, folder / side / "-".join(case), *case)
                files.append(folder / side / f"{'-'.join(case)}.yaml")  # JSON is YAML
                files[-1].write_text(json.dumps(renamed(tree) if before else tree))
            ranks(checkout, folder / side, [str(file) for file in files])

        def weights(side: str, case: tuple[str, ...]) -> dict[str, Any]:
            return load_file(folder / side / "-".join(case) / "model" / "model.safetensors")

        begin = load_file(inputs / "model" / "model.safetensors")
        table = []
        for case in cases:
            one = weights("new", case)
            assert any((one[n].float() != begin[n].float()).any() for n in begin), f"{case}: nothing was trained"
            table.append((*case, relative(weights("old", case), one)))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path, metavar="OLD", help="folder of a checkout")
    parser.add_argument("new", type=Path, metavar="NEW", help="folder of another one")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, with commas (default: all)")
    chosen = parser.parse_args(argv)
    table = compare(chosen.old.resolve(), chosen.new.resolve(), chosen.methods.split(","))
    print("| method | sharding | dtype | equal to the bit | largest relative difference |\n|---|---|---|---|---|")
    for method, sharding, dtype, difference in table:
        print(f"| {method} | {sharding} | {dtype} | {'yes' if difference == 0 else 'no'} | {difference:.1e} |")
    return int(any(not found <= REORDERED.get((*case, dtype), LARGEST[dtype]) for *case, dtype, found in table))


if __name__ == "__main__":
    sys.exit(main())
