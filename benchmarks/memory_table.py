"""The README's table: planned peaks of methods on one GPU, in GiB. Nothing is measured.

python -m benchmarks.memory_table [MODEL ...]
"""

from __future__ import annotations

import sys

from ows_ds import config
from ows_ds.model.shapes import read_model
from ows_ds.planner.choices import Choice
from ows_ds.planner.forecast import DEVIATIONS, Planner

PLAIN = {
    "optim.always_on": "full", "optim.refresh_batch": "full", "model.frozen": "same", "optim.moments": "float32",
    "optim.master": "float32",
}  # fmt: skip
LEAN = {**PLAIN, "optim.always_on": "none", "optim.refresh_batch": "first"}
FIVE = {**LEAN, "sampling.gamma": 5}
ROWS = {
    "ows, nothing changed": PLAIN,
    "ows, embedding and head frozen": LEAN,
    "ows, and 5 layers at a time": FIVE,
    "ows, and frozen layers in int8": {**FIVE, "model.frozen": "int8"},
    "ows, and frozen layers in nf4": {**FIVE, "model.frozen": "nf4"},
    "lora": {**PLAIN, "method.name": "lora"},
    "lora over nf4 (QLoRA)": {**PLAIN, "method.name": "lora", "model.frozen": "nf4"},
    "galore": {**PLAIN, "method.name": "galore"},
    "lisa": {**PLAIN, "method.name": "lisa"},
    "full": {**PLAIN, "method.name": "full"},
}


def main() -> None:
    names = sys.argv[1:] or ["llama3-8b", "llama3-70b"]
    models = {name: read_model(name) for name in names}
    print("length 2048, batch 16, micro-batch 1, gradient checkpointing, bfloat16, replicated; GiB")
    print(f"| | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for title, settings in ROWS.items():
        tree: dict[str, dict[str, object]] = {"model": {"path": "m"}, "train": {"output_dir": "o"}}
        for key, value in {**settings, "data.max_length": 2048}.items():
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
        recipe = config.from_dict(tree)
        peaks = [Planner(recipe, one).peak(Choice(1, "replicated", 1, True), DEVIATIONS) for one in models.values()]
        print(f"| {title} | {' | '.join(f'{peak / 2**30:,.1f}' for peak in peaks)} |")


if __name__ == "__main__":
    main()
