"""What a GPU shows in one command, most valuable first: whether everything is right on it, then what it costs.

    python -m benchmarks.gpu --minutes 8
    python -m benchmarks.gpu --device cpu --shape tiny       # the same on a CPU, in 90 seconds

Nothing is downloaded; weights are random, of real shapes. Each part runs in a process of its own with a limit of its
own; what it finds is written to OUTPUT/DATE-gpu-DEVICE.md and .json row by row. `--wheels FOLDER` first installs what
``fetch_wheels.sh`` has put there, for a machine that has torch, transformers, accelerate and peft and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
METHODS = ("ows", "ows-lean", "lora", "lisa", "galore", "full")
SHAPES = {"real": ("llama3-8b", "qwen2.5-7b"), "tiny": ("tiny",)}
TINY = {"hidden": 128, "heads": 2, "layers": "2", "vocab": 256, "tokens": 64, "gamma": 1, "rank": 8, "lora_rank": 2}
LIMITS = {
    "runs": 150,
    "mathematics": 60,
    "streams": 90,
    "frozen": 60,
    "costs": 900,
    "search": 40,
}  # seconds at most, by part
METHOD = 75  # seconds at most of a method in `costs`
PATIENCE = {"real": 1, "tiny": 4}  # times these limits: the CPUs that rehearse may be busy
LEAST = 10  # seconds, with less no part begins
ANCHORS = {  # what others publish, by (shape, method)
    ("llama3-8b", "lora"): "NeMo AutoModel, one H100: 12,473 tokens/s, 402 TFLOP/s",
    ("llama3-8b", "full"): "torchtune, 8-bit Adam, one RTX 4090: 1,650 tokens/s, 18.9 GiB",
    ("llama3-8b", "ows"): "the paper, LLaMA2-7B: 23 GB",
}
TABLES = {  # by part: key of a row -> head of its column
    "runs": {"what": "what", "result": "result", "seconds": "seconds", "loss": "last loss", "digest": "model"},
    "mathematics": {"what": "settings", "result": "result", "float64": "float64", "bfloat16": "bfloat16"},
    "streams": {"what": "what", "result": "result"},
    "frozen": {"what": "format", "result": "result", "loss": "loss apart", "made_ms": "made of codes [ms]",
               "plain_ms": "plain product [ms]", "product_ms": "product [ms]", "change_ms": "back and away [ms]"},
    "costs": {"shape": "shape", "method": "method", "result": "result", "tokens_per_second": "tokens/s",
              "tflops": "model TFLOP/s", "own_tflops": "own TFLOP/s", "mfu": "MFU [%]", "step_ms": "step [ms]",
              "planned_ms": "planned [ms]",
              "allocated_gib": "allocated [GiB]", "reserved_gib": "reserved [GiB]", "planned_gib": "planned [GiB]",
              "waits": "waits a step", "waits_refresh": "waits a refresh", "refresh_ms": "refresh [ms]",
              "refresh_share": "share [%]", "anchor": "published by others"},
    "search": {"what": "gradient", "result": "result", "range_ms": "range [ms]", "choice_ms": "choice [ms]",
               "product_error": "sum of products, relative error"},
}  # fmt: skip
NOTES = {
    "runs": "Whole programs on a tiny model, 9 steps with refreshes, draws, evaluation and checkpoints. A resumed run "
    "has to end in the same weights.",
    "mathematics": "Largest difference of ten losses between the CPU and the device: in float64 at most 1e-6, in "
    "bfloat16 at most 0.2.",
    "streams": "ZeRO-3 on two ranks, while what writes to shards is held up on its stream: losses have to be those of "
    "a run in which the host waits after each step. On one GPU over gloo, on two over NCCL.",
    "frozen": "Frozen weights in few bits. Loss apart: the largest relative difference of five losses between the CPU "
    "and the device in float32 (fp8: by products of the device, within 0.05). One bfloat16 matrix: made of its codes; "
    "2,048 tokens times it, plain and from codes; its real weights from the host to the device and away again.",
    "costs": "One sequence a step (of 4,096 tokens; tiny: 64), 5 layers sampled (tiny: 1), random weights. Model "
    "TFLOP/s: of a forward pass and a backward pass through activations, the same for every method; MFU: these over "
    "the data sheet's peak. Own: of all matrix products of the method's step. Allocated, reserved: torch's peaks, in "
    "a refresh where there is one. Planned: by the planner, without running. Waits: of the host for the GPU in a step, "
    "as torch counts. Refresh: what new projectors add; share: of all time, one every 200 steps; 0 without projectors.",
    "search": "A projector of one matrix, rank 128, and the gradient of coordinates from bfloat16 in float32 sums.",
}
UNKNOWN = "not measured"

# ------------------------------------------------------------------ parts; each yields rows


def runs(device: str, shape: str, seconds: float) -> Iterator[Row]:
    """Whole programs."""
    import torch

    from tests.support.tiny_run import write_inputs

    with tempfile.TemporaryDirectory() as place:
        folder = write_inputs(Path(place))
        recipe = folder / "recipe.yaml"
        recipe.write_text(f"""
model: {{path: {folder}/model}}
data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, max_length: 64, cache: {folder}/cache}}
sampling: {{gamma: 1.5, period: 4, tau: 2.0, calibration_samples: 4}}
optim: {{rank: 4, lr: 0.01, update_proj_gap: 3, warmup_steps: 2, weight_decay: 0.01}}
train: {{global_batch_size: 12, micro_batch_size: 2, steps: 9, save_steps: 3, eval_steps: 4}}
log: {{progress: none, trackers: []}}
""")

        def train(name: str, *options: str, ranks: int = 1) -> Row:
            output = folder / name.replace(" ", "-")
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
            words = [*launch, "-m", "ows_ds", "train", "--config", str(recipe), "--train.output_dir", str(output)]
            begun = time.monotonic()
            done = subprocess.run([sys.executable, *words, *options], cwd=ROOT, capture_output=True, text=True)
            row: Row = {"what": name, "seconds": round(time.monotonic() - begun, 1), "result": "ok"}
            if done.returncode:
                return row | {"result": f"failed: {(done.stderr.strip() or 'no word').splitlines()[-1][:300]}"}
            model = (output / "model" / "model.safetensors").read_bytes()
            last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
            return row | {"digest": hashlib.sha256(model).hexdigest()[:12], "loss": round(last["loss"], 4)}

        def compared(row: Row, with_: Row, key: str, within: float = 0.0) -> Row:
            if (row["result"], with_["result"]) != ("ok", "ok"):
                return row
            same = abs(row[key] - with_[key]) <= within if within else row[key] == with_[key]
            return row if same else row | {"result": f"{key} differs from {with_['what']}"}

        whole = train("train")
        yield whole
        if whole["result"] != "ok":
            return
        with ThreadPoolExecutor(2) as beside:
            from_six = ("--train.resume", str(folder / "train" / "checkpoints" / "step-6"))
            resumed = beside.submit(train, "resume", *from_six)
            sharded = beside.submit(train, "zero3", "--train.sharding", "zero3")
            yield compared(resumed.result(), whole, "digest")
            yield compared(sharded.result(), whole, "loss", 0.02)
        if shape == "real":
            extras = ("--data.packing", "true", "--train.global_batch_size", "2", "--train.micro_batch_size", "1",
                      "--train.gradient_checkpointing", "true", "--optim.refresh", "sketch",
                      "--optim.merge_rounding", "stochastic")  # fmt: skip
            yield train("packing checkpointing sketch", *extras)
        two = {"two ranks": (), "two ranks zero3": ("--train.sharding", "zero3")}
        for name, options in two.items():
            if device == "cuda" and torch.cuda.device_count() < 2:
                yield {"what": name, "result": f"{UNKNOWN}: one GPU"}
            elif shape == "real" or options:
                yield compared(train(name, *options, ranks=2), whole, "loss", 0.1)


SETTINGS: tuple[Row, ...] = (
    {}, {"refresh": "sketch"}, {"always_on": "none"}, {"always_on": "low_rank"}, {"rank": None}, {"projector": "svd"},
    {"accumulation": 2}, {"accumulation": 2, "refresh_batch": "first"}, {"moments_on_refresh": "rotate"},
    {"merge_rounding": "stochastic"},
)  # fmt: skip


def mathematics(device: str, shape: str, seconds: float) -> Iterator[Row]:
    """The same losses on the CPU and on the device."""
    import torch
    import transformers as tf

    from ows_ds import OWS
    from ows_ds.train.loss import token_losses

    def losses(where: str, dtype: torch.dtype, settings: Row) -> list[float]:
        config = tf.LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=4,
                                num_attention_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
                                tie_word_embeddings=False)  # fmt: skip
        torch.manual_seed(0)
        model: Any = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)  # on the CPU: the same anywhere
        model.config.use_cache = False
        given = {"gamma": 2, "period": 4, "rank": 8, "update_proj_gap": 3, "lr": 1e-2, "seed": 1, "weight_decay": 0.1}
        given |= settings
        ows, count = OWS(model.to(where).train(), [1.0, 2.0, 3.0, 4.0], **given), given.get("accumulation", 1)
        noise = torch.Generator().manual_seed(0)

        def loss() -> torch.Tensor:
            ids = torch.randint(3, 256, (2, 24), generator=noise)
            return token_losses(ows.weights, {"input_ids": ids.to(where), "labels": ids}) / 46 / count

        found = torch.stack([ows.train_step([loss] * count) for _ in range(10 if shape == "real" else 5)]).tolist()
        ows.close()
        return list(found)

    for settings in SETTINGS:
        row: Row = {"what": ", ".join(f"{key} {value}" for key, value in settings.items()) or "default"}
        for name, dtype in (("float64", torch.float64), ("bfloat16", torch.bfloat16)):
            pairs = zip(*(losses(where, dtype, settings) for where in ("cpu", device)), strict=True)
            row[name] = float(f"{max(abs(a - b) for a, b in pairs):.1e}")
        good = row["float64"] <= 1e-6 and row["bfloat16"] <= 0.2
        yield row | {"result": "ok" if good else "failed: other losses"}


def streams(device: str, shape: str, seconds: float) -> Iterator[Row]:
    """Whether gathers see what was just written, on real streams."""
    import torch

    from ows_ds.distributed.rendezvous import free_port

    if device == "cpu":
        yield {"what": "gathers after held-up writes", "result": f"{UNKNOWN}: no GPU"}
        return
    around = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", "rank", "--shape", shape]
    ranks = []
    for rank in map(str, range(2)):
        own = around | {"RANK": rank, "LOCAL_RANK": rank if torch.cuda.device_count() > 1 else "0"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=own, text=True, **pipes))  # type: ignore[call-overload]
    for rank, one in enumerate(ranks):
        said = one.communicate()[0]
        [found] = [json.loads(line[4:]) for line in said.splitlines() if line.startswith("ROW ")] or [None]
        row: Row = {"what": f"gathers after held-up writes, rank {rank}"}
        if found is None:
            yield row | {"result": f"failed: {(said.strip() or 'no word').splitlines()[-1][:300]}"}
        else:
            yield row | {"result": "ok" if found["held up"] == found["waited for"] else "failed: other losses"}


def rank(device: str, shape: str, seconds: float) -> Iterator[Row]:
    """One of the two ranks of `streams`."""
    import deepspeed
    import torch
    import torch.distributed as dist
    import transformers as tf

    from ows_ds import OWS

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.device_count() > 1 else "gloo")  # NCCL wants a GPU for each rank
    deepspeed.init_distributed()
    hidden, steps = (512, 10) if shape == "real" else (64, 5)

    def held(work: Callable[..., None], cycles: int) -> Callable[..., None]:
        def late(*args: Any, **kwargs: Any) -> None:
            if hasattr(torch._C, "_cuda_sleep"):  # not on a CPU's torch
                torch.cuda._sleep(cycles)
            work(*args, **kwargs)

        return late

    found: Row = {}
    for way in ("waited for", "held up"):
        torch.manual_seed(0)
        config = tf.LlamaConfig(vocab_size=1024, hidden_size=hidden, intermediate_size=43 * hidden // 16,
                                num_hidden_layers=6, num_attention_heads=4, pad_token_id=None, bos_token_id=None,
                                eos_token_id=None, tie_word_embeddings=False)  # fmt: skip
        model: Any = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.config.use_cache = False
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        settings = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "zero_optimization": zero}
        engine = deepspeed.initialize(model=model, config=settings | {"gradient_accumulation_steps": 1})[0]
        ows = OWS(engine, [1.0] * 6, gamma=3, period=4, rank=32, update_proj_gap=3, lr=3e-3, seed=1)
        weights: Any = ows.weights
        if way == "held up":  # about 0.1 s on the stream, before each write
            weights.write, weights.merge = held(weights.write, 200_000_000), held(weights.merge, 20_000_000)
        noise, losses = torch.Generator().manual_seed(2 + dist.get_rank()), []
        for ids in [torch.randint(3, 1024, (2, 128), generator=noise).cuda() for _ in range(steps)]:
            loss = engine.module(input_ids=ids, labels=ids).loss
            ows.backward(loss)
            ows.step()
            ows.zero_grad()
            losses.append(loss.detach())
            if way == "waited for":
                torch.cuda.synchronize()
        found[way] = torch.stack(losses).tolist()
        ows.close()
    yield found
    dist.barrier()


def search(device: str, shape: str, seconds: float) -> Iterator[Row]:
    """A projector, and sums of products."""
    import statistics

    import torch

    from ows_ds.bench.worker import timed
    from ows_ds.compat.torch import add_product
    from ows_ds.optim.projection import choose, find_range, start_basis

    sizes, r = ((4096, 4096), (14336, 4096)) if shape == "real" else ((64, 64),), 128 if shape == "real" else 8
    for m, n in sizes:
        gradient = torch.randn(m, n, device=device, dtype=torch.bfloat16)
        near = start_basis(n, r, 0).to(device)
        one = find_range(gradient, r, "randomized", 1)
        ways: dict[str, Callable[[], Any]] = {
            "range_ms": lambda g=gradient: find_range(g, r, "randomized", 1),  # type: ignore[misc]
            "choice_ms": lambda one=one, near=near: choose({"": one}, {"": near}, lambda _: near),  # type: ignore[misc]
        }
        row: Row = {"what": f"{m} x {n}", "result": "ok"}
        row |= {name: round(1e3 * statistics.median(timed(work) for _ in range(5)), 2) for name, work in ways.items()}
        a, b = (torch.randn(2048, width, device=device, dtype=torch.bfloat16) for width in (m, r))
        total = torch.zeros(m, r, device=device)
        add_product(total, a.t(), b)
        exact = a.t().double() @ b.double()
        row["product_error"] = float(f"{float((total - exact).norm() / exact.norm()):.1e}")
        yield row


def frozen(device: str, shape: str, seconds: float) -> Iterator[Row]:
    """Training over frozen weights in few bits: right, and what a matrix costs."""
    import statistics

    import torch
    import transformers as tf

    from ows_ds import OWS
    from ows_ds.bench.worker import timed
    from ows_ds.distributed.communicator import Communicator
    from ows_ds.distributed.formats import NAMES, Format, has_fp8_products
    from ows_ds.distributed.weights import Replicated
    from ows_ds.errors import UserError
    from ows_ds.model.layers import find_layers
    from ows_ds.model.loading import Unsharded
    from ows_ds.model.pretrained import formats, let_freeze
    from ows_ds.optim.hooks import hook_frozen
    from ows_ds.optim.low_rank import frozen_linear
    from ows_ds.train.loss import token_losses

    products = has_fp8_products(torch.device(device))

    def home(where: str, model: Any, name: str, dtype: torch.dtype) -> Replicated:
        real = let_freeze(
            model, formats(find_layers(model), name, dtype, products), Unsharded(torch.device(where), True)
        )
        weights = Replicated(model, Communicator())
        weights.freeze(real)
        hook_frozen(weights)
        return weights

    def losses(where: str, name: str) -> list[float]:
        tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        config = tf.LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=4,
                                num_attention_heads=2, **tokens)  # fmt: skip
        torch.manual_seed(0)
        model: Any = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.config.use_cache = False
        weights = home(where, model.to(where).train(), name, torch.float32)
        ows = OWS(weights, [1.0, 2.0, 3.0, 4.0], gamma=1, scheme="fixed", period=2, rank=8, lr=1e-2)
        noise = torch.Generator().manual_seed(0)

        def loss() -> torch.Tensor:
            ids = torch.randint(3, 256, (2, 24), generator=noise)
            return token_losses(weights, {"input_ids": ids.to(where), "labels": ids}) / 46

        found = torch.stack([ows.train_step([loss]) for _ in range(5)]).tolist()
        ows.close()
        return list(found)

    def milliseconds(work: Callable[[], Any]) -> float:
        work()
        return round(1e3 * statistics.median(timed(work) for _ in range(5)), 3)

    size = (14336, 4096) if shape == "real" else (64, 64)
    for name in NAMES:
        row: Row = {"what": name}
        try:
            apart = max(abs(a - b) / a for a, b in zip(losses("cpu", name), losses(device, name), strict=True))
        except UserError as error:  # bitsandbytes is not there
            yield row | {"result": f"not measured: {error}"}
            continue
        row["loss"] = float(f"{apart:.1e}")
        good = apart <= (0.05 if name == "fp8" else 1e-4)
        module = torch.nn.Linear(size[1], size[0], bias=False, device=device, dtype=torch.bfloat16)
        x = torch.randn(2048, size[1], device=device, dtype=torch.bfloat16)
        row["plain_ms"] = milliseconds(lambda module=module, x=x: module(x))  # type: ignore[misc]
        made = Unsharded(torch.device(device), True).later(
            module.weight, Format(name, size, dtype=torch.bfloat16, products=products and name == "fp8")
        )
        made.use_in(module, "weight")
        weights, own = Replicated(module, Communicator()), [made.real]
        weights.freeze(own)

        def both(weights: Replicated = weights, own: Any = own) -> None:
            weights.thaw(own)
            weights.freeze(own)

        def product(made: Any = made, x: torch.Tensor = x) -> None:
            frozen_linear(x, made.codes, None, [], False)

        def dense(made: Any = made) -> None:
            made.format.dense(made.codes, made.scales)

        row |= {"change_ms": milliseconds(both), "made_ms": milliseconds(dense), "product_ms": milliseconds(product)}
        yield row | {"result": "ok" if good else "failed: other losses"}


def costs(device: str, shape: str, seconds: float) -> Iterator[Row]:
    """Time and memory of a step, by shape and method."""
    import torch

    from ows_ds.bench.setting import Setting, flops_of_limit, resolve
    from ows_ds.bench.time import summarize
    from ows_ds.bench.workers import WorkerError, Workers
    from ows_ds.planner.cluster import GPUS, known_gpu

    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    known = known_gpu(name)
    total = torch.cuda.get_device_properties(0).total_memory if cuda else 2**62
    end = time.monotonic() + seconds
    digits = 2 if shape == "real" else 5  # of GiB
    for model in SHAPES[shape]:
        given = TINY if shape == "tiny" else {"shape": model, "layers": "all", "gamma": 5, "tokens": 4096}
        setting = resolve(Setting(**given, device=device), cuda)
        for method in METHODS:
            row: Row = {"shape": model, "method": method, "result": "ok", "anchor": ANCHORS.get((model, method), "")}
            if (left := end - time.monotonic() - 5) < LEAST:
                yield row | {"result": f"{UNKNOWN}: no time left"}
                continue
            planned, expected = _planned(setting, method, known)
            row |= {"planned_gib": round(planned / 2**30, digits), "planned_ms": expected and round(1e3 * expected, 1)}
            if planned > total:
                sizes = f"planned {planned / 2**30:.1f} GiB of {total / 2**30:.1f}"
                yield row | {"result": f"does not fit: {sizes}"}
                continue
            try:
                with contextlib.closing(
                    Workers(setting, method, seconds=min(left, METHOD * PATIENCE[shape]))
                ) as workers:
                    found = workers.ask("time", 2, 6)
                    [flops], [memory], [waits] = (workers.ask(question) for question in ("flops", "memory", "waits"))
            except WorkerError as error:
                yield row | {"result": f"failed: {error}"}
                continue
            time_ = summarize([found[0] | flops], setting.update_proj_gap)
            step, last = time_["seconds"]["median"], "step" if memory["refresh"] is None else "refresh"
            row |= {"tokens_per_second": round(setting.tokens / step), "step_ms": round(1e3 * step, 1)}
            model_flops = flops_of_limit(setting.widths, setting.tokens)
            for key, flop in (("tflops", model_flops), ("own_tflops", time_["flops"])):
                row[key] = round(flop / step / 1e12, 1 if cuda else 4)
            row |= {"waits": waits["step"], "waits_refresh": waits["refresh"]}
            if known is not None:
                row["mfu"] = round(100 * model_flops / step / (GPUS[known]["tflops"] * 1e12), 1)
            row["planned_gib"] = round(memory[f"{last}_planned"] / 2**30, digits)  # of the layers that were sampled
            for kind in ("allocated", "reserved"):
                size = memory[f"{last}_{kind}"]
                row[f"{kind}_gib"] = size and round(size / 2**30, digits)
            refresh, share = time_["refresh"] or {"median": 0.0}, time_["refresh_share"] or 0.0
            row |= {"refresh_ms": round(1e3 * refresh["median"], 1), "refresh_share": round(100 * share, 2)}
            yield row


def _planned(setting: Any, method: str, gpu: str | None) -> tuple[int, float | None]:
    """Bytes at the most, with a refresh, and seconds of a plain step with all overlap."""
    import transformers as tf

    from ows_ds.bench.trial import recipe_of
    from ows_ds.config import changed
    from ows_ds.model.shapes import read_model
    from ows_ds.planner.cluster import read_cluster
    from ows_ds.planner.forecast import Planner

    with tempfile.TemporaryDirectory() as folder:
        sizes = asdict(setting.widths)
        tf.LlamaConfig(
            vocab_size=sizes["vocab"], hidden_size=sizes["hidden"], intermediate_size=sizes["intermediate"],
            num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv_heads"], tie_word_embeddings=False,
        ).save_pretrained(folder)  # fmt: skip
        recipe = changed(recipe_of(setting, method, 1), {"data.max_length": setting.tokens, "model.path": folder})
        planner = Planner(recipe, read_model(folder))
        choice = planner.choice(1, "replicated")
        times = None if gpu is None else planner.forecast(read_cluster(f"1x{gpu}"), choice).times
        return planner.peak(choice), None if times is None else times.overlapped


PARTS = {
    "runs": runs, "mathematics": mathematics, "streams": streams, "frozen": frozen, "costs": costs, "search": search,
}  # fmt: skip

# ------------------------------------------------------------------ the command


def report(summary: Row, output: Path) -> None:
    """OUTPUT.json and OUTPUT.md, as far as there is something."""
    from ows_ds.bench.report import heading, sections
    from ows_ds.files import write_text
    from ows_ds.tables import Table

    def shown(value: Any) -> str:
        return UNKNOWN if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    lines = heading(f"What a GPU shows: {summary['device']}", summary)
    for part, columns in TABLES.items():
        rows = [one for one in summary["rows"] if one["part"] == part]
        cells = [[shown(one.get(key)) for key in columns] for one in rows]
        said = summary["parts"].get(part, UNKNOWN)
        lines += sections([Table(f"{part}: {said}", list(columns.values()), cells)])
        lines += ["", NOTES[part]]
    write_text(output.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
    write_text(output.with_suffix(".md"), "\n".join(lines) + "\n")


def measure(part: str, arguments: Sequence[str], seconds: float, take: Callable[[Row], None]) -> str:
    """Run a part in a process of its own for at most so long; each of its rows goes to ``take``. How it ended."""
    if seconds < LEAST:
        return "no time left"
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--seconds", f"{seconds:.0f}", *arguments]
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )

        def stop() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # what it has started, too

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("ROW "):
                    take(json.loads(line[4:]))
            code = child.wait()
        finally:
            timer.cancel()
            stop()
        took = f"{time.monotonic() - begun:.0f} s"
        errors.seek(0)
        last = (errors.read().strip() or "no word").splitlines()[-1][:300]
    if code:
        how = f"stopped after {took}" if code == -signal.SIGKILL else f"failed after {took}: {last}"
        take({next(iter(TABLES[part])): "all of it", "result": how})
        return how
    return took


def install(wheels: Path) -> None:
    """Start this command again with what is in ``wheels``."""
    place = Path(tempfile.gettempdir()) / f"ows_ds-wheels-{os.getuid()}"
    if not place.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target"]
        with tempfile.TemporaryDirectory(dir=place.parent) as unfinished:
            subprocess.run([*pip, f"{unfinished}/site", *map(str, wheels.glob("*.whl"))], check=True)
            os.rename(f"{unfinished}/site", place)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(place), os.environ.get("PYTHONPATH", "")])
    words = iter(sys.argv[1:])
    kept = [word for word in words if word != "--wheels" or next(words) is None]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *kept])


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Measure and write; the Markdown file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together (8)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="real")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the files")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="all")
    parser.add_argument("--wheels", type=Path, help="folder of fetch_wheels.sh, to be installed first")
    parser.add_argument("--part", choices=[*PARTS, "rank"], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.wheels is not None:
        install(args.wheels)
    if args.device == "cpu":
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if args.part is not None:
        for row in {**PARTS, "rank": rank}[args.part](args.device, args.shape, args.seconds):
            print("ROW " + json.dumps(row), flush=True)
        return None

    import torch

    from ows_ds.bench.report import facts

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is to be seen; --device cpu --shape tiny does the same on a CPU")
    end = time.monotonic() + 60 * args.minutes
    words = ["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    day = datetime.date.today().isoformat()
    output = args.output / f"{day}-gpu-{'-'.join(name.lower().replace('nvidia', '').split())}"
    args.output.mkdir(parents=True, exist_ok=True)
    summary: Row = {"format": 1, **facts(shlex.join(words), 1), "device": name, "parts": {}, "rows": []}
    for part in args.parts:

        def take(row: Row, part: str = part) -> None:
            summary["rows"].append({"part": part, **{key: row.get(key) for key in TABLES[part]}})
            print(json.dumps(summary["rows"][-1]), flush=True)
            report(summary, output)

        limit = min(LIMITS[part] * PATIENCE[args.shape], end - time.monotonic())
        summary["parts"][part] = measure(part, ["--device", args.device, "--shape", args.shape], limit, take)
        print(f"{part}: {summary['parts'][part]}", flush=True)
        report(summary, output)
    return output.with_suffix(".md")


if __name__ == "__main__":
    main()
