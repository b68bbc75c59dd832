"""The main job: scores -> layer sets -> steps -> checkpoints -> a Hugging Face model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ows_ds import checkpoint, config, methods
from ows_ds.config import Recipe, accumulation
from ows_ds.config.loss import REFERENCE
from ows_ds.data.read_ahead import ReadAhead
from ows_ds.data.stream import Stream
from ows_ds.distributed import signals, watchdog
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.launch import Runtime, start
from ows_ds.errors import Failed, UserError
from ows_ds.files import write_text
from ows_ds.importance import scoring
from ows_ds.importance.probabilities import METRIC_OF, importance_of
from ows_ds.importance.scores import Scores
from ows_ds.methods import Method
from ows_ds.model.fingerprint import replica
from ows_ds.model.loading import processor_files
from ows_ds.model.pretrained import use_cache
from ows_ds.optim.ows import OWS
from ows_ds.optim.sizes import check
from ows_ds.planner.step import entries, parts_of
from ows_ds.runs import card
from ows_ds.train import layer_runs, resume, run_lock
from ows_ds.train.best import Best, restored
from ows_ds.train.context import RunContext, calibration, evaluate, load
from ows_ds.train.export import export, save_model
from ows_ds.train.layer_runs import LayerRuns
from ows_ds.train.log import RunLog
from ows_ds.train.run_lock import RunLock
from ows_ds.train.sample_answers import sample
from ows_ds.train.step import StepRunner
from ows_ds.train.trackers import check_trackers

ROWS_SECONDS = 20.0  # within which all ranks find that the next step's rows cannot be used


def train(recipe: Recipe) -> None:
    """Fine-tune as ``recipe`` says, into ``train.output_dir``. Collective over the launcher's ranks.

    Raises UserError for whatever the user can correct, before anything is written; signals.Stopped after a signal, the
    end of the current step (or the first one) and a checkpoint; Failed where any rank ends too early, or step after
    step is not finite.
    """
    with signals.stop_on_signal() as stop_requested:
        runtime = start(recipe)
        lock = RunLock(Path(recipe.train.output_dir))
        with watchdog.armed(runtime.comm, recipe.train.timeout_seconds), lock:
            _train(recipe, runtime, stop_requested, lock)


def score(recipe: Recipe, output: Path | None, kinds: Sequence[str] = ()) -> None:
    """Score the layers of ``model.path`` on rows of ``data.train``; write scores and a plot, print them. Collective.

    output: file of the scores; None: scores.json in ``train.output_dir``. kinds: see `scoring.report`.
    """
    runtime = start(recipe, training=False)
    with watchdog.armed(runtime.comm, recipe.train.timeout_seconds):
        context = load(recipe, runtime, training=False)
        path = output or Path(recipe.train.output_dir) / "scores.json"
        batches = functools.partial(calibration, context)
        scoring.report(recipe, context.weights, context.layers, batches, kinds, path)


def _train(recipe: Recipe, runtime: Runtime, stop_requested: threading.Event, lock: RunLock) -> None:
    run_dir, comm = Path(recipe.train.output_dir), runtime.comm
    with fail_together(comm):
        if comm.rank == 0 and (run_dir / run_lock.FILE).exists():  # otherwise when there is something to write
            lock.take()
    opened, skipped = _open(recipe, runtime, run_dir)
    if opened is not None:
        recipe = resume.as_chosen(recipe, opened, comm.world_size)
    context = load(recipe, runtime, opened=opened)
    recipe, runtime = context.recipe, context.runtime
    if opened is not None:
        everything = recipe.train.checkpoint == "full"
        everything &= recipe.loss.name not in REFERENCE  # which ask the model that the run began with
        context.model = resume.base_model(opened, context.weights, context.model, recipe.model.path, everything)
    assert context.steps is not None
    check(recipe, context.layers)
    total = recipe.train.steps or max(1, round(recipe.train.epochs * context.steps.steps_per_epoch))
    if recipe.train.steps is None and recipe.optim.warmup_steps > total:  # train.steps is compared by config.check
        right = f"expected at most the number of steps, {total}"
        raise UserError("optim.warmup_steps", recipe.optim.warmup_steps, right)
    importance = _importance(context, run_dir, opened)
    decided = {"sampling.period": config.period(recipe, total), "sampling.gamma": config.gamma(recipe, importance)}
    recipe = config.changed(recipe, decided)
    micro_batches = accumulation(recipe, comm.world_size)
    method = methods.build(recipe, context.weights, context.layers, importance, micro_batches)
    ways = layer_runs.ways_of(recipe, context.layers, runtime.device)
    runs = LayerRuns(context.weights, context.layers, ways, asked=recipe.train.kernels != "auto")
    scheduler = _scheduler(recipe, method, total)
    begin, best = 0, Best()
    if opened is not None:
        resume.restore(method, opened)
        best = restored(opened.state.get("best"))
        scheduler.load_state_dict(opened.state["scheduler"])
        begin = method.steps

    with fail_together(comm):
        if comm.rank == 0:  # before there are records: without the recipe a run that is started again has not begun
            lock.take()
            write_text(run_dir / "config.yaml", config.to_yaml(recipe))
        n_layers = len(context.layers.layers)
        log = RunLog(run_dir, total, n_layers, comm.rank == 0, recipe, runtime.accelerator, begin)
    facts = {
        "model": context.model,
        "sharding": "zero3" if context.weights.sharded else "replicated",
        "recipe": config.to_dict(recipe),
        "started": context.started,
        "rows": context.digests,
        "stops": context.stops,
    }
    skip_failed = recipe.train.on_save_error == "continue"
    with (
        log,
        checkpoint.Saver(run_dir, recipe.train.save_total_limit, comm, facts, skip_failed, log.warn) as saver,
        closing(ReadAhead(context.read, total, runtime.device)) as batches,
        closing(context.steps),  # first, so that a block that is being read ends
    ):
        for line in skipped:
            log.warn(f"skipped a checkpoint: {line}")
        saver.best = best.step if recipe.train.load_best else None
        steps = StepRunner(context, method, batches, stop_requested, saver, best)
        if opened is not None:
            log.event(f"resuming after step {begin} from {opened.folder}")
        elif context.held_out or recipe.log.samples:
            log.step(steps.before_the_first())
        for line in filter(None, (*_banner(context, method, micro_batches), _draws(method, recipe, total))):
            log.event(line)
        for step in range(begin, total):
            if best.stopped:
                log.event(f"stopped early after step {step}: {_lowest(best)}")
                break
            try:
                _one(steps, step, total, scheduler, log)
            except UserError:  # of rows that are read while training: every rank reads them all
                if step > begin and not steps.taken and comm.meets(f"rows of step {begin}, {step}", ROWS_SECONDS):
                    _save(steps, step, scheduler, saver.save)
                    log.warn(f"saved after step {step}: the rows of the next one cannot be used")
                raise
        runs.close()
        method.close()
        if not comm.broadcast_object((run_dir / "model").exists()):  # a run that was complete is resumed
            use_cache(context.weights.module, True)  # off in training; who loads the model wants to generate with it
            card_of = functools.partial(card.of_run, run_dir, None)
            more = processor_files(recipe.model) if comm.rank == 0 else []
            if recipe.train.load_best and best.step not in (None, method.steps):
                with fail_together(comm):
                    if comm.rank == 0:
                        export(run_dir, run_dir / "model", f"step-{best.step}")
                log.event(f"the model is that of step {best.step}: {_lowest(best)}")
            else:
                save_model(context.weights, context.tokenizer, run_dir / "model", card_of=card_of, more=more)
        if isinstance(context.steps, Stream):
            log.event(f"data.train: {context.steps.counts.line(recipe.data.max_length)}")
        log.event(log.summary())
        log.event(f"next: ows-ds chat {run_dir} --compare; ows-ds eval {run_dir} --tasks LIST; ows-ds report {run_dir}")
        notes = f", {len(method.trained_layers)} of {n_layers} layers trained"
        notes += f", {method.skipped} steps skipped" if method.skipped else ""
        notes += f", {saver.failed} checkpoints not written" if saver.failed else ""
        log.event(f"done: {run_dir / 'model'}{notes}")
    comm.barrier()


def _open(recipe: Recipe, runtime: Runtime, run_dir: Path) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint to resume from, and a line for each one that was skipped; refuses (UserError) what shows before
    the model is loaded, which may take long. Collective."""
    comm = runtime.comm
    with fail_together(comm):
        accumulation(recipe, comm.world_size)
        check_trackers(recipe.log)
        layer_runs.check(recipe, runtime.device)
        if recipe.sampling.scores is not None and importance_of(recipe) in METRIC_OF:
            Scores.read(Path(recipe.sampling.scores))
    opened, skipped = checkpoint.find(run_dir, recipe.train.resume, comm)
    with fail_together(comm):
        if opened is None and skipped:
            right = f"remove {run_dir / 'checkpoints'} to start again: none in it can be resumed ({skipped[0]})"
            raise UserError("train.resume", recipe.train.resume, right)
        resume.check(run_dir, recipe, opened)
    return opened, skipped


def _importance(context: RunContext, run_dir: Path, opened: checkpoint.Checkpoint | None) -> list[float]:
    """What the method samples layers by; scores are looked for, or computed, only where it needs them."""
    earlier = None if opened is None else opened.folder.parent.parent
    batches, of = functools.partial(calibration, context), (context.recipe, context.weights, context.layers)
    return scoring.layer_importance(*of, run_dir, context.model, earlier, batches)


def _banner(context: RunContext, method: Method, micro_batches: int) -> list[str]:
    """What is trained, and in which batches."""
    recipe, comm, layers = context.recipe, context.runtime.comm, context.layers
    sizes = [sum(part.numel for part in parts_of(block)) for block in layers.layers]
    total = entries(layers)[0]
    outside = total - sum(sizes)
    shares = method.probabilities if isinstance(method, OWS) else [1.0] * len(sizes)
    at_once = sum(p * size for p, size in zip(shares, sizes, strict=True))
    at_once += outside * (recipe.optim.always_on != "none" if isinstance(method, OWS) else 1)
    name = recipe.method.name
    what = {"lora": "adapters train", "dora": "adapters train", "hift": "one layer trains at a time"}
    share = what.get(name, f"{at_once / total:.0%} of them train at a time")
    train = recipe.train
    return [
        f"{Path(recipe.model.path).name}, {total / 1e6:,.0f} M weights, {name}: {share}",
        f"batch {train.global_batch_size} = {train.micro_batch_size} x {micro_batches} micro-batches x "
        + (
            f"{comm.world_size // together} groups of {together} ranks"
            if (together := train.sequence_parallel) > 1
            else f"{comm.world_size} rank{'s' * (comm.world_size > 1)}"
        ),
    ]


def _draws(method: Method, recipe: Recipe, total: int) -> str | None:
    """How many layers a run's draws reach, on average; None where they are not drawn."""
    if not isinstance(method, OWS) or recipe.method.name not in ("ows", "lisa", "lisa-d"):
        return None
    count = -(-total // recipe.sampling.period)  # type: ignore[operator]
    drawn = method.draws.probabilities
    reached, what = sum(1 - (1 - p) ** count for p in drawn), f"{recipe.sampling.block}s"
    draws = f"{count} draws of {what}" if count > 1 else f"1 draw of {what}"
    return f"{total} steps, {draws}: about {reached:.0f} of {len(drawn)} {what} will train"


def _scheduler(recipe: Recipe, method: Method, total: int) -> Any:
    from transformers import get_scheduler

    name = recipe.optim.schedule
    if name == "constant" and recipe.optim.warmup_steps:
        name = "constant_with_warmup"  # type: ignore[assignment]
    return get_scheduler(name, method, num_warmup_steps=recipe.optim.warmup_steps, num_training_steps=total)


def _lowest(best: Best) -> str:
    return f"the lowest held-out loss was {best.loss:.4f}, after step {best.step}"


def _one(steps: StepRunner, step: int, total: int, scheduler: Any, log: RunLog) -> None:
    """A step of the loop, with the evaluation, the record and the checkpoint that are due after it."""
    context, saver, comm = steps.context, steps.saver, steps.comm
    settings, last = context.recipe.train, step + 1 == total
    record, improved = steps.take(step, last), False
    scheduler.step()
    # where a stop is requested, an evaluation could take longer than there is time
    if context.held_out and (last or (not steps.stop and _due(step + 1, settings.eval_steps))):
        record |= evaluate(context)
        improved = steps.best.add(record["eval_loss"], step + 1, settings)
        if settings.load_best and improved:
            saver.best = step + 1
        if samples := sample(context, context.recipe.log.samples):
            record["samples"] = samples
    record["comm_bytes"] = steps.sent()
    if steps.saved:
        saver.complete()
    log.step(record)
    if steps.nonfinite is not None:
        log.warn(f"step {step + 1} is skipped: {steps.nonfinite}")
        if steps.in_a_row == settings.max_nonfinite_steps:
            saver.complete()  # it may be the last good one
            raise Failed(_given_up(step + 1, steps))
    ends = last or steps.stop or steps.best.stopped
    if ends or _due(step + 1, settings.save_steps) or (settings.load_best and improved):
        _save(steps, step + 1, scheduler, saver.save if ends else saver.start)
    if steps.stop:
        log.warn(f"stopped by a signal after step {step + 1} of {total}, saved; train.resume auto resumes")
        comm.barrier()  # not before rank 0 is done, or a launcher could end it
        raise signals.Stopped


def _save(steps: StepRunner, step: int, scheduler: Any, save: Callable[..., None]) -> None:
    """A checkpoint after so many steps. Collective."""
    weights = steps.context.weights
    if not weights.sharded and steps.comm.world_size > 1:
        # each rank merges into its own copy: on unlike GPUs products may differ in their last bits
        steps.comm.assert_consistent(f"the weights after step {step}", replica(weights))
    shards, numbers = resume.contents(steps.method, steps.context.recipe.train.checkpoint == "full")
    save(step, shards, {**numbers, "scheduler": scheduler.state_dict(), "data": steps.data_state,
                         "best": steps.best.state()})  # fmt: skip


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _given_up(step: int, steps: StepRunner) -> str:
    """Why the run ends, and what is left of it. Collective."""
    newest = steps.comm.broadcast_object([str(folder) for folder in checkpoint.checkpoints(steps.saver.run_dir)][:1])
    last = f"the last good checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
    return f"step {step}: {steps.nonfinite}, for {steps.in_a_row} steps in a row (train.max_nonfinite_steps); {last}"
