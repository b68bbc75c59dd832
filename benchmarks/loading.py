"""Peak memory of every rank while a checkpoint is loaded into shards and while the model is written, and the time.

A LLaMA with random weights is written once for each size, then loaded and exported by fresh processes. Counted is
anonymous memory, ``RssAnon`` of ``/proc/self/status``, sampled every 2 ms, above what the process had before (after
it has loaded and written a model of one layer, so that imports and buffers of gloo do not count). Pages of the files
that are mapped for reading are the page cache's, which any process may use and the system takes back: they are not in
it. glibc is set to give freed blocks back at once; otherwise it keeps some of what DeepSpeed and torch free.

    python benchmarks/loading.py --gigabytes 0.5,1 --worlds 2,4 --json loading.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HIDDEN, VOCABULARY = 2048, 32000
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Peak:
    """Seconds and the largest anonymous memory, in bytes above that at the beginning, of what runs within it."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous()
        self.stop = threading.Event()
        self.sampler = threading.Thread(target=self._sample)
        self.sampler.start()
        self.started = time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.started
        self.stop.set()
        self.sampler.join()
        self.bytes = max(self.most, anonymous()) - self.before


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def write_model(folder: Path, layers: int) -> None:
    """A LLaMA of ``layers`` layers with random bfloat16 weights, not tied, in one file or several of 300 MB."""
    import torch
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=5504,
        num_hidden_layers=layers,
        num_attention_heads=16,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300MB")


def layers_for(gigabytes: float) -> int:
    """How many layers make a model of about that many bytes."""
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 5504 + 2 * HIDDEN
    return max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / layer))


def work(small: str, model: str, sharding: str, output: str) -> None:
    """One process: load and export ``small``, then ``model``, which is measured."""
    from ows_ds import config
    from ows_ds.distributed.launch import start
    from ows_ds.model.pretrained import load_model
    from ows_ds.train.export import save_model

    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for path in (small, model):
        recipe = config.from_dict(
            {
                "model": {"path": path},
                "train": {"output_dir": output, "global_batch_size": world_size, "sharding": sharding},
                "data": {"train": "none"},
            }
        )
        runtime = start(recipe)
        with Peak() as loading:
            weights, _ = load_model(recipe, runtime)
        parameters = list(weights.module.parameters())
        resident = sum(weights.resident_slice(parameter)[1].nbytes for parameter in parameters)
        largest = max(weights.resident_slice(p)[1].element_size() * math.prod(weights.shape(p)) for p in parameters)
        folder = Path(output) / Path(path).name
        tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
        with Peak() as exporting:
            save_model(weights, tokenizer, folder)
        found = {
            "resident": resident,
            "largest": largest,
            "load": loading.bytes,
            "load_seconds": loading.seconds,
            "export": exporting.bytes,
            "export_seconds": exporting.seconds,
        }
        del weights, parameters
    Path(output, f"rank{rank}.json").write_text(json.dumps(found))


def measure(small: Path, model: Path, sharding: str, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """What every rank found, each in a fresh process."""
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, **MALLOC, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    words = [str(Path(__file__).resolve()), "--work", str(small), str(model), sharding, str(folder)]
    subprocess.run([*launch, *words], check=True, env=environment, cwd=root)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def main(words: Sequence[str] | None = None) -> None:
    """Measure all sizes, shardings and worlds; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", default="0.5,1", help="sizes of the model, in GB (1e9 bytes)")
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks")
    parser.add_argument("--shardings", default="zero3,replicated")
    parser.add_argument("--json", help="file for the numbers of every process")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.work:
        work(*given.work)
        return
    results = []
    print("| model, MB | sharding | ranks | resident, MB | largest tensor, MB | peak of loading | of resident + largest"
          " | s | peak of export beyond resident | s |\n"
          "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        write_model(temporary / "small", 1)
        for gigabytes in map(float, given.gigabytes.split(",")):
            model = temporary / f"model-{gigabytes:g}"
            write_model(model, layers_for(gigabytes))
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            for sharding in given.shardings.split(","):
                for world_size in map(int, given.worlds.split(",")):
                    output = temporary / f"{gigabytes:g}-{sharding}-{world_size}"
                    ranks = measure(temporary / "small", model, sharding, world_size, output)
                    worst = max(ranks, key=lambda rank: rank["load"])
                    results.append({"bytes": size, "sharding": sharding, "world_size": world_size, "ranks": ranks})
                    share = max(rank["load"] / (rank["resident"] + rank["largest"]) for rank in ranks)
                    seconds = [max(rank[key] for rank in ranks) for key in ("load_seconds", "export_seconds")]
                    numbers = [worst["resident"] / 1e6, worst["largest"] / 1e6, worst["load"] / 1e6]
                    print(
                        f"| {size / 1e6:.0f} | {sharding} | {world_size} | "
                        + " | ".join(f"{number:.0f}" for number in numbers)
                        + f" | {share:.2f} | {seconds[0]:.1f} | {max(rank['export'] for rank in ranks) / 1e6:.0f}"
                        + f" | {seconds[1]:.1f} |",
                        flush=True,
                    )
    if given.json:
        Path(given.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
