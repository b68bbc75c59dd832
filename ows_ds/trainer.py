"""The main job: scores -> layer sets -> steps -> checkpoints -> a Hugging Face model."""

from __future__ import annotations

import functools
import hashlib
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ows_ds import checkpoint, config, methods, scoring, signals
from ows_ds.communicate import together
from ows_ds.config import Recipe, accumulation
from ows_ds.data import IGNORE, MULTIPLE, Batches, Encoded, collate, encode_rows, held_out_batches
from ows_ds.errors import UserError
from ows_ds.export import save_model
from ows_ds.layers import ModelLayers
from ows_ds.log import RunLog, check_trackers
from ows_ds.loss import token_losses
from ows_ds.methods import Method
from ows_ds.rows import fetch, load_rows
from ows_ds.runtime import Runtime, load_model, load_tokenizer, start
from ows_ds.sample import METRIC_OF
from ows_ds.score import Scores
from ows_ds.weights import Weights

# what may differ between a run and its continuation; everything else decides the weights
MAY_CHANGE = {
    "train": {"resume", "save_every", "keep_last", "eval_every", "eval_batch_size", "sharding", "ds_config",
              "timeout_seconds", "micro_batch_size", "gradient_checkpointing", "output_dir"},
    "log": {"trackers", "progress"},
    "model": {"path", "attention"},
    "data": {"train", "eval", "eval_subset", "eval_split"},
    "sampling": {"scores", "calibration_samples", "calibration_batch_size"},
}  # fmt: skip


def train(recipe: Recipe) -> None:
    """Fine-tune as ``recipe`` says, into ``train.output_dir``. Collective over the launcher's processes.

    Raises UserError for whatever the user can put right, before anything is written; signals.Stopped where a signal
    came, after the step that was in hand (or the first one) and a checkpoint.
    """
    with signals.heeded() as told:
        _train(recipe, start(recipe), told)


def _train(recipe: Recipe, runtime: Runtime, told: threading.Event) -> None:
    run_dir = Path(recipe.train.output_dir)
    comm, main = runtime.comm, runtime.comm.index == 0
    with together(comm):
        _check_settings(recipe, comm.world)
    opened, passed = checkpoint.find(run_dir, recipe.train.resume, comm)
    with together(comm):
        _check_run_dir(run_dir, recipe, opened)
    job = _load(recipe, runtime)
    batches = Batches(
        job.rows, recipe.train.batch_size, recipe.train.micro_batch_size, comm.world, comm.index, recipe.train.seed
    )
    methods.check(recipe, job.layers)
    total = recipe.train.steps or max(1, round(recipe.train.epochs * batches.steps_per_epoch))
    if recipe.train.steps is None and recipe.optim.warmup_steps > total:  # train.steps is compared by config.check
        raise UserError("optim.warmup_steps", recipe.optim.warmup_steps, f"give at most the number of steps, {total}")
    method = methods.build(
        recipe, job.weights, job.layers, _importance(job, run_dir, opened), accumulation(recipe, comm.world)
    )
    scheduler = _scheduler(recipe, method, total)
    begin = 0
    if opened is not None:
        method.restore(opened.numbers["method"], opened.read)
        scheduler.load_state_dict(opened.numbers["scheduler"])
        begin = method.steps

    with RunLog(run_dir, total, len(job.layers.layers), main, recipe.log, runtime.accelerator, begin) as log:
        if main:
            (run_dir / "config.yaml").write_text(config.to_yaml(recipe))
        for line in passed:
            log.event(f"passed over a checkpoint: {line}")
        steps = _Steps(job, method, batches, told)
        if opened is not None:
            log.event(f"going on after step {begin} from {opened.folder}")
        elif job.held_out:
            log.step(steps.before_the_first())
        for step in range(begin, total):
            record = steps.take(step)
            scheduler.step()
            last = step + 1 == total
            # asked to stop, an evaluation could take longer than there is time
            if job.held_out and (last or (not steps.stop and _due(step + 1, recipe.train.eval_every))):
                record["eval_loss"] = evaluate(job)
            record["comm_bytes"] = steps.sent()
            log.step(record)
            if last or steps.stop or _due(step + 1, recipe.train.save_every):
                numbers = {"method": method.numbers(), "scheduler": scheduler.state_dict()}
                checkpoint.save(checkpoint.folder_of(run_dir, step + 1), method.pieces(), numbers, comm)
                if main:
                    checkpoint.prune(run_dir, recipe.train.keep_last)
            if steps.stop:
                log.event(f"stopped by a signal after step {step + 1} of {total}, saved; train.resume auto goes on")
                comm.barrier()  # not before process 0 is done, or a launcher could end it
                raise signals.Stopped
        method.close()
        if not comm.share((run_dir / "model").exists()):  # a run that was complete is resumed
            save_model(job.weights, job.tokenizer, run_dir / "model")
        log.event(f"done: {run_dir / 'model'}" + (f", {method.skipped} steps skipped" if method.skipped else ""))
    comm.barrier()


def score(recipe: Recipe, output: Path | None, kinds: Sequence[str] = ()) -> None:
    """Score the layers of ``model.path`` on rows of ``data.train``; write scores and a plot, print them. Collective.

    output: file of the scores; None: scores.json in ``train.output_dir``. kinds: see `ows_ds.scoring.report`.
    """
    job = _load(recipe, start(recipe), training=False)
    path = output or Path(recipe.train.output_dir) / "scores.json"
    scoring.report(recipe, job.weights, job.layers, functools.partial(_calibration, job), kinds, path)


@dataclass
class _Job:
    """What a run works on."""

    recipe: Recipe
    runtime: Runtime
    weights: Weights
    tokenizer: Any
    rows: list[Encoded]
    held_out: list[Encoded]
    layers: ModelLayers  # of the model without adapters

    @property
    def vocabulary(self) -> int:
        """Entries of the model's embedding."""
        module: Any = self.weights.module
        return int(self.weights.shape(module.get_input_embeddings().weight)[0])

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        pad = int(pad if pad is not None else self.tokenizer.eos_token_id or 0)
        return pad if pad < self.vocabulary else 0  # a token that was added for padding alone; it is masked

    def batch(self, rows: list[Encoded]) -> dict[str, Tensor]:
        """Right-padded tensors (rows, tokens): labels on the CPU, the others on the device."""
        batch = collate(rows, self.pad_id)
        return {name: t if name == "labels" else t.to(self.runtime.device) for name, t in batch.items()}


def _load(recipe: Recipe, runtime: Runtime, training: bool = True) -> _Job:
    """Data before weights: what is wrong with it shows at once."""
    assert recipe.data.train is not None  # config.check
    held_out: list[Encoded] = []
    with together(runtime.comm):
        if runtime.comm.index == 0:  # one process downloads, the others find the data sets in the cache
            fetch(recipe.data, evaluation=training)
    with together(runtime.comm):
        tokenizer = load_tokenizer(recipe)
        rows = _encode(recipe, tokenizer, recipe.data.train, "data.train", runtime)
        if training and recipe.data.eval is not None:
            held_out = _encode(recipe, tokenizer, recipe.data.eval, "data.eval", runtime)
    if training:
        weights, layers = load_model(
            recipe, runtime, functools.partial(methods.adapt, recipe), methods.deepspeed_trains(recipe)
        )
    else:
        weights, layers = load_model(recipe, runtime)
    job = _Job(recipe, runtime, weights, tokenizer, rows, held_out, layers)
    _check_rows(job)
    return job


def _check_settings(recipe: Recipe, world: int) -> None:
    """Refuse (UserError) what shows before the model is loaded, which may take long."""
    accumulation(recipe, world)
    check_trackers(recipe.log)
    if recipe.sampling.scores is not None and methods.importance_of(recipe) in METRIC_OF:
        Scores.read(Path(recipe.sampling.scores))


def _check_rows(job: _Job) -> None:
    """Refuse (UserError) rows with tokens or positions that the model has no embedding of."""
    rows, module = [*job.rows, *job.held_out], cast(Any, job.weights.module)
    largest = max(max(row["input_ids"]) for row in rows)
    if largest >= job.vocabulary:
        right = f"give a model that embeds all tokens of its tokenizer: rows have {largest}, it knows {job.vocabulary}"
        raise UserError("model.path", job.recipe.model.path, right)
    words = (module.get_input_embeddings(), module.get_output_embeddings())
    tables = [m.shape[0] for m in job.layers.embeddings if module.get_submodule(m.modules[0]) not in words]
    if not tables:
        return  # positions are computed
    positions = min(*tables, getattr(module.config, "max_position_embeddings", None) or tables[0])
    longest = max(len(row["input_ids"]) for row in rows)
    if -(-longest // MULTIPLE) * MULTIPLE > positions:
        right = f"give at most {positions // MULTIPLE * MULTIPLE}: the model has learned {positions} positions"
        raise UserError("data.max_length", job.recipe.data.max_length, right)


def _encode(recipe: Recipe, tokenizer: Any, path: str, key: str, runtime: Runtime) -> list[Encoded]:
    data = recipe.data
    train = key == "data.train"
    subset, split = (data.train_subset, data.train_split) if train else (data.eval_subset, data.eval_split)
    rows = load_rows(path, data.format, key, subset, split)
    encoded, counts = encode_rows(rows, tokenizer, data.max_length, data.loss_on, data.format, key, data.template)
    if runtime.comm.index == 0:
        notes = [f"{counts.dropped} without a trained token dropped"] if counts.dropped else []
        notes += [f"{counts.truncated} cut to {data.max_length} tokens"] if counts.truncated else []
        print(f"{key}: {counts.kept} rows, {counts.trained_tokens:,} trained tokens" + "".join(f"; {n}" for n in notes))
    return encoded


def _importance(job: _Job, run_dir: Path, opened: checkpoint.Checkpoint | None) -> list[float]:
    """What the method samples layers by; scores are looked for, or computed, only where it needs them."""
    earlier = None if opened is None else opened.folder.parent.parent
    batches = functools.partial(_calibration, job)
    return scoring.importance(job.recipe, job.weights, job.layers, run_dir, earlier, batches)


def _calibration(job: _Job) -> Iterator[dict[str, Tensor]]:
    """This process's batches of the rows that layers are scored on."""
    sampling, comm = job.recipe.sampling, job.runtime.comm
    rows = job.rows[: sampling.calibration_samples]
    lengths = [len(row["input_ids"]) for row in rows]
    for share in held_out_batches(len(rows), sampling.calibration_batch_size, comm.world, comm.index, lengths):
        yield job.batch([rows[i] for i in share])


def _scheduler(recipe: Recipe, method: Method, total: int) -> Any:
    from transformers import get_scheduler

    name = recipe.optim.schedule
    if name == "constant" and recipe.optim.warmup_steps:
        name = "constant_with_warmup"  # type: ignore[assignment]
    return get_scheduler(name, method, num_warmup_steps=recipe.optim.warmup_steps, num_training_steps=total)


class _Steps:
    """Optimizer steps, one after the other."""

    def __init__(self, job: _Job, method: Method, batches: Batches, told: threading.Event) -> None:
        self.job, self.method, self.batches, self.comm = job, method, batches, job.runtime.comm
        self.told, self.stop = told, False  # a signal came here; to any process before the last step's end
        self.before: Counter[str] = Counter()

    def take(self, step: int) -> dict[str, Any]:
        """Step number ``step`` (from 0) and its record for metrics.jsonl."""
        job, method, device = self.job, self.method, self.job.runtime.device
        started = time.perf_counter()
        self.before = Counter(self.comm.sent)
        # set anew for each step, so that dropout is the same after a resume and differs between processes
        name = f"{job.recipe.train.seed}/{step}/{self.comm.index}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little"))
        everyone = [job.rows[i] for i in self.batches.global_step(step)]
        targets = sum(label != IGNORE for row in everyone for label in row["labels"][1:])
        sampled, idle, lr = list(method.layer_set), method.idle, method.lr
        # processes are averaged: the sum over all of them, divided by all targets of the step
        share = self.comm.world / targets
        job.weights.module.train()
        total = method.train_step([functools.partial(self._loss, rows, share) for rows in self.batches.step(step)])
        norm = method.grad_norm if method.grad_norm is not None and not idle else total
        # whether a signal came travels along, so that all processes stop after the same step
        more = torch.tensor([_peak_memory(device), self.told.is_set()], dtype=total.dtype, device=device)
        mine = torch.cat([torch.stack([total, norm.to(total.dtype)]), more])
        # the step's only wait for the device
        everyones = self.comm.all_gather(mine[None], "metrics").cpu()
        self.stop = bool(everyones[:, 3].any())
        seconds = time.perf_counter() - started
        tokens = sum(len(row["input_ids"]) for row in everyone)
        return {
            "step": step + 1,
            "loss": None if idle else float(everyones[:, 0].mean()),
            "lr": lr,
            "grad_norm": None if idle or method.grad_norm is None else float(everyones[0, 1]),
            "sampled_layers": sampled,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": int(everyones[:, 2].max()),
            **({"skipped": True} if idle else {}),
        }

    def _loss(self, rows: list[int], share: float) -> Tensor:
        """The cross entropies of a micro-batch, summed, times ``share``."""
        return token_losses(self.job.weights, self.job.batch([self.job.rows[i] for i in rows])) * share

    def before_the_first(self) -> dict[str, Any]:
        """The record of step 0: nothing trained, an evaluation."""
        job, started = self.job, time.perf_counter()
        self.before = Counter(self.comm.sent)
        loss = evaluate(job)
        return {
            "step": 0,
            "loss": None,
            "lr": self.method.lr,
            "grad_norm": None,
            "sampled_layers": [],
            "tokens": 0,
            "tokens_per_second": 0.0,
            "step_seconds": time.perf_counter() - started,
            "peak_memory_bytes": _peak_memory(job.runtime.device),
            "comm_bytes": self.sent(),
            "eval_loss": loss,
        }

    def sent(self) -> dict[str, int]:
        """Bytes that process 0 has sent since the step began, its evaluation included, by operation."""
        return dict(sorted((self.comm.sent - self.before).items()))


@torch.no_grad()
def evaluate(job: _Job) -> float:
    """Mean cross entropy of the held-out tokens with the coordinates attached. Collective."""
    weights, comm = job.weights, job.runtime.comm
    training = weights.module.training
    weights.module.eval()
    shares = held_out_batches(
        len(job.held_out),
        job.recipe.train.eval_batch_size,
        comm.world,
        comm.index,
        [len(row["input_ids"]) for row in job.held_out],
    )
    sums = torch.zeros(2, dtype=torch.float64, device=job.runtime.device)
    for share in shares:
        batch = job.batch([job.held_out[i] for i in share])
        targets = (batch["labels"][:, 1:] != IGNORE).sum().double().to(sums.device)
        sums += torch.stack([token_losses(weights, batch).double(), targets])
        weights.after_step()
    weights.module.train(training)
    loss, targets = comm.all_reduce(sums, "evaluation").tolist()
    return float(loss / targets)


def mean_loss(
    recipe: Recipe, runtime: Runtime, weights: Weights, layers: ModelLayers, tokenizer: Any, path: str, key: str
) -> float:
    """Mean cross entropy of the trained tokens of the rows in ``path`` under ``weights``. Collective.

    Raises UserError naming ``key`` for rows that cannot be read or encoded.
    """
    with together(runtime.comm):
        rows = _encode(recipe, tokenizer, path, key, runtime)
    job = _Job(recipe, runtime, weights, tokenizer, [], rows, layers)
    _check_rows(job)
    return evaluate(job)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has held on the GPU, or the process's largest resident set on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _check_run_dir(run_dir: Path, recipe: Recipe, opened: checkpoint.Checkpoint | None) -> None:
    """A run never writes over another one, nor goes on with another recipe.

    Under ``train.resume: auto`` a run that was stopped before its first checkpoint begins anew.
    """
    own = opened is not None and opened.folder.resolve().parent.parent == run_dir.resolve()
    restarted = opened is None and recipe.train.resume == "auto" and not (run_dir / "model").exists()
    if not own and not (restarted and (run_dir / "config.yaml").exists()):
        used = config.used(run_dir)
        if used:
            right = f"give a folder without {used[0]}"
            if recipe.train.resume == "never":
                right += ", or --train.resume auto to go on with the run that is there"
            raise UserError("train.output_dir", str(run_dir), right)
    if own and opened is not None and (run_dir / "model").exists():
        newest = checkpoint.checkpoints(run_dir)[0]
        if opened.folder.resolve() != newest.resolve():
            right = (
                f"give auto or another train.output_dir: the run is finished, its newest checkpoint is {newest.name}"
            )
            raise UserError("train.resume", recipe.train.resume, right)
    earlier = run_dir if opened is None else opened.folder.parent.parent
    if (opened is None and not restarted) or not (earlier / "config.yaml").exists():
        return
    try:
        old = config.to_dict(config.from_dict(config.read_yaml(earlier / "config.yaml", "train.resume")))
    except UserError as error:
        right = f"give never and another train.output_dir: config.yaml of the run is none of this version ({error})"
        raise UserError("train.resume", recipe.train.resume, right) from error
    for section, values in config.to_dict(recipe).items():
        for key, value in values.items():
            if old[section][key] != value and key not in MAY_CHANGE.get(section, ()):
                right = f"give {old[section][key]!r}, as the run that is resumed"
                raise UserError(f"{section}.{key}", value, right)
