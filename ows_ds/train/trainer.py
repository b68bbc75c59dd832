"""The main job: scores -> layer sets -> steps -> checkpoints -> a Hugging Face model."""

from __future__ import annotations

import functools
import hashlib
import math
import resource
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ows_ds import checkpoint, config, methods
from ows_ds.config import Recipe, accumulation
from ows_ds.data.batches import Batches
from ows_ds.data.encoded import IGNORE, Encoded
from ows_ds.data.stream import Stream
from ows_ds.distributed import signals, watchdog
from ows_ds.distributed.communicator import Communicator, fail_together
from ows_ds.distributed.launch import Runtime, start
from ows_ds.errors import Failed, UserError
from ows_ds.files import atomic_write
from ows_ds.importance import scoring
from ows_ds.importance.probabilities import METRIC_OF, importance_of
from ows_ds.importance.scores import Scores
from ows_ds.methods import Method
from ows_ds.runs import card
from ows_ds.train import resume
from ows_ds.train.context import Job, calibration, evaluate, load
from ows_ds.train.export import save_model
from ows_ds.train.log import RunLog, check_trackers
from ows_ds.train.loss import token_losses


def train(recipe: Recipe) -> None:
    """Fine-tune as ``recipe`` says, into ``train.output_dir``. Collective over the launcher's processes.

    Raises UserError for whatever the user can put right, before anything is written; signals.Stopped where a signal
    came, after the step that was in hand (or the first one) and a checkpoint; Failed where any process ends too early,
    or step after step is not finite.
    """
    with signals.stop_on_signal() as told:
        runtime = start(recipe)
        with watchdog.armed(runtime.comm, recipe.train.timeout_seconds):
            _train(recipe, runtime, told)


def _train(recipe: Recipe, runtime: Runtime, told: threading.Event) -> None:
    run_dir = Path(recipe.train.output_dir)
    comm, main = runtime.comm, runtime.comm.rank == 0
    with fail_together(comm):
        _check_settings(recipe, comm.world_size)
    opened, passed = checkpoint.find(run_dir, recipe.train.resume, comm)
    with fail_together(comm):
        if opened is None and passed:
            right = f"remove {run_dir / 'checkpoints'} to begin anew: none in it can be gone on from ({passed[0]})"
            raise UserError("train.resume", recipe.train.resume, right)
        resume.check(run_dir, recipe, opened)
    job = load(recipe, runtime, state=None if opened is None else opened.state.get("data"))
    everything = recipe.train.checkpoint == "full"
    if opened is not None:
        job.model = resume.base_model(opened, job.weights, job.model, recipe.model.path, everything)
    rows = job.steps
    assert rows is not None
    methods.check(recipe, job.layers)
    total = recipe.train.steps or max(1, round(recipe.train.epochs * rows.steps_per_epoch))
    if recipe.train.steps is None and recipe.optim.warmup_steps > total:  # train.steps is compared by config.check
        raise UserError(
            "optim.warmup_steps", recipe.optim.warmup_steps, f"expected at most the number of steps, {total}"
        )
    method = methods.build(
        recipe, job.weights, job.layers, _importance(job, run_dir, opened), accumulation(recipe, comm.world_size)
    )
    scheduler = _scheduler(recipe, method, total)
    begin = 0
    if opened is not None:
        resume.restore(method, opened)
        scheduler.load_state_dict(opened.state["scheduler"])
        begin = method.steps

    with fail_together(comm):
        if main:  # before there are records, without which a run that is started again has not begun
            with atomic_write(run_dir / "config.yaml") as file:
                file.write_text(config.to_yaml(recipe))
        log = RunLog(run_dir, total, len(job.layers.layers), main, recipe, runtime.accelerator, begin)
    facts = {
        "model": job.model,
        "sharding": "zero3" if job.weights.sharded else "replicated",
        "recipe": config.to_dict(recipe),
    }
    go_on = recipe.train.on_save_error == "continue"
    with (
        log,
        checkpoint.Saver(run_dir, recipe.train.save_total_limit, comm, facts, go_on, log.event) as saver,
    ):
        for line in passed:
            log.event(f"passed over a checkpoint: {line}")
        steps = _Steps(job, method, rows, told, saver)
        if opened is not None:
            log.event(f"going on after step {begin} from {opened.folder}")
        elif job.held_out:
            log.step(steps.before_the_first())
        for step in range(begin, total):
            last = step + 1 == total
            record = steps.take(step, last)
            scheduler.step()
            # asked to stop, an evaluation could take longer than there is time
            if job.held_out and (last or (not steps.stop and _due(step + 1, recipe.train.eval_steps))):
                record["eval_loss"] = evaluate(job)
            record["comm_bytes"] = steps.sent()
            if steps.saved:
                saver.complete()
            log.step(record)
            if steps.trouble is not None:
                log.event(f"step {step + 1} is skipped: {steps.trouble}")
                if steps.in_a_row == recipe.train.max_nonfinite_steps:
                    saver.complete()  # it may be the last good one
                    raise Failed(_given_up(run_dir, step + 1, steps, comm))
            if last or steps.stop or _due(step + 1, recipe.train.save_steps):
                save = saver.save if last or steps.stop else saver.start
                pieces, numbers = resume.contents(method, everything)
                save(step + 1, pieces, {**numbers, "scheduler": scheduler.state_dict(), "data": rows.state()})
            if steps.stop:
                log.event(f"stopped by a signal after step {step + 1} of {total}, saved; train.resume auto goes on")
                comm.barrier()  # not before rank 0 is done, or a launcher could end it
                raise signals.Stopped
        method.close()
        if not comm.broadcast_object((run_dir / "model").exists()):  # a run that was complete is resumed
            module: Any = job.weights.module
            module.config.use_cache = True  # off in training; who loads the model wants to generate with it
            card_of = functools.partial(card.of_run, run_dir, None)
            save_model(job.weights, job.tokenizer, run_dir / "model", card_of=card_of)
        notes = f", {method.skipped} steps skipped" if method.skipped else ""
        notes += f", {saver.failed} checkpoints not written" if saver.failed else ""
        if isinstance(rows, Stream):
            rows.close()
            log.event(f"data.train: {rows.counts.line(recipe.data.max_length)}")
        log.event(f"done: {run_dir / 'model'}{notes}")
    comm.barrier()


def score(recipe: Recipe, output: Path | None, kinds: Sequence[str] = ()) -> None:
    """Score the layers of ``model.path`` on rows of ``data.train``; write scores and a plot, print them. Collective.

    output: file of the scores; None: scores.json in ``train.output_dir``. kinds: see `ows_ds.importance.scoring.report`.
    """
    runtime = start(recipe)
    with watchdog.armed(runtime.comm, recipe.train.timeout_seconds):
        job = load(recipe, runtime, training=False)
        path = output or Path(recipe.train.output_dir) / "scores.json"
        scoring.report(recipe, job.weights, job.layers, functools.partial(calibration, job), kinds, path)


def _check_settings(recipe: Recipe, world_size: int) -> None:
    """Refuse (UserError) what shows before the model is loaded, which may take long."""
    accumulation(recipe, world_size)
    check_trackers(recipe.log)
    if recipe.sampling.scores is not None and importance_of(recipe) in METRIC_OF:
        Scores.read(Path(recipe.sampling.scores))


def _importance(job: Job, run_dir: Path, opened: checkpoint.Checkpoint | None) -> list[float]:
    """What the method samples layers by; scores are looked for, or computed, only where it needs them."""
    earlier = None if opened is None else opened.folder.parent.parent
    batches = functools.partial(calibration, job)
    return scoring.layer_importance(job.recipe, job.weights, job.layers, run_dir, job.model, earlier, batches)


def _scheduler(recipe: Recipe, method: Method, total: int) -> Any:
    from transformers import get_scheduler

    name = recipe.optim.schedule
    if name == "constant" and recipe.optim.warmup_steps:
        name = "constant_with_warmup"  # type: ignore[assignment]
    return get_scheduler(name, method, num_warmup_steps=recipe.optim.warmup_steps, num_training_steps=total)


class _Steps:
    """Optimizer steps, one after the other."""

    def __init__(
        self, job: Job, method: Method, rows: Batches | Stream, told: threading.Event, saver: checkpoint.Saver
    ) -> None:
        self.job, self.method, self.rows, self.comm = job, method, rows, job.runtime.comm
        self.told, self.stop = told, False  # a signal came here; to any process before the last step's update
        self.saver, self.saved = saver, False  # all processes' parts of a checkpoint are there, or have failed
        self.trouble: str | None = None  # why the last step was skipped: what was not finite
        self.in_a_row = 0  # such steps
        self.before: Counter[str] = Counter()

    def take(self, step: int, last: bool) -> dict[str, Any]:
        """Step number ``step`` (from 0), perhaps the run's ``last``, and its record for metrics.jsonl."""
        job, method, device = self.job, self.method, self.job.runtime.device
        started = time.perf_counter()
        self.before = Counter(self.comm.sent)
        # set anew for each step, so that dropout is the same after a resume and differs between processes
        name = f"{job.recipe.train.seed}/{step}/{self.comm.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little"))
        sequences, own = self.rows.take(step)
        everyone = [row for sequence in sequences for row in sequence]
        targets = sum(label != IGNORE for row in everyone for label in row["labels"][1:])
        sampled, idle, lr = list(method.layer_set), method.nothing_to_train, method.lr
        # processes are averaged: the sum over all of them, divided by all targets of the step
        share = self.comm.world_size / targets
        job.weights.module.train()
        everyones: list[list[float]] = []
        refreshed: list[int] = []  # layers

        def accept(loss: Tensor, norm: Tensor) -> bool:
            # whether a signal came, or a file is written, travels along: all processes heed it after the same step
            more = torch.tensor([_peak_memory(device), self.told.is_set(), self.saver.done], dtype=loss.dtype)
            energies = method.projector_energy()
            refreshed.extend(energies)
            mine = torch.cat([torch.stack([loss, norm.to(loss)]), more.to(device), *energies.values()])
            # the step's only wait for the device
            everyones.extend(self.comm.all_gather(mine[None], "metrics").tolist())
            return math.isfinite(everyones[0][1])

        method.train_step([functools.partial(self._loss, rows, share) for rows in own], accept)
        losses, norms, peaks, signalled, saved, *squares = zip(*everyones, strict=True)
        self.stop, self.saved = any(signalled), all(saved)
        self.trouble = _trouble(losses, norms[0])
        self.in_a_row = 0 if self.trouble is None else self.in_a_row + 1
        seconds = time.perf_counter() - started
        tokens = sum(len(row["input_ids"]) for row in everyone)
        sums = list(map(sum, squares))
        kept = {str(n): part / whole for n, part, whole in zip(refreshed, sums[::2], sums[1::2], strict=True) if whole}
        moved = method.update_norm(last)
        # in the few steps that end with a merge, one more wait for the device
        lengths = dict(zip(map(str, moved), torch.stack(list(moved.values())).tolist(), strict=True)) if moved else {}
        return {
            "step": step + 1,
            "loss": None if idle else sum(losses) / len(losses),
            "lr": lr,
            "grad_norm": None if idle else norms[0],
            "sampled_layers": sampled,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": int(max(peaks)),
            **({"projector_energy": kept} if kept and not self.trouble else {}),
            **({"update_norm": lengths} if lengths else {}),
            **({"skipped": True} if idle or self.trouble else {}),
        }

    def _loss(self, sequences: list[list[Encoded]], share: float) -> Tensor:
        """The cross entropies of a micro-batch, summed, times ``share``."""
        loss = token_losses(self.job.weights, self.job.batch(sequences, self.job.rows.packed)) * share
        # one that is not finite has no finite gradient either: the gradients' norm tells all processes
        return loss * (loss.detach() * 0 + 1)

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
        """Bytes that rank 0 has sent since the step began, its evaluation included, by operation."""
        return dict(sorted((self.comm.sent - self.before).items()))


def _trouble(losses: Sequence[float], norm: float) -> str | None:
    """What is not finite, of the processes' losses and their gradients' norm, in words; None: nothing."""
    if math.isfinite(norm):
        return None
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            return f"the loss is {loss}" + (f" on process {index}" if len(losses) > 1 else "")
    return f"the gradient's norm is {norm}"


def _given_up(run_dir: Path, step: int, steps: _Steps, comm: Communicator) -> str:
    """Why the run ends, and what is left of it. Collective."""
    newest = comm.broadcast_object([str(folder) for folder in checkpoint.checkpoints(run_dir)][:1])
    last = f"the last good checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
    return f"step {step}: {steps.trouble}, for {steps.in_a_row} steps in a row (train.max_nonfinite_steps); {last}"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has held on the GPU, or the process's largest resident set on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
