"""`ows-ds bench quality`: train the variants of a study, measure them, report. Resumes where it was stopped.

OUTPUT/
    study.yaml                          the study, everything filled in, and a hash of its rows
    base.json                           loss and accuracy of the model before training
    runs/VARIANT/lr-L-seed-S/           an ordinary run directory, and
        result.json                     there when the run is complete and measured; see `_Work._measure_run`
    quality.json, quality.md            the result so far (see `ows_ds.bench.report`)
    loss.png, front.png, scores.png     training loss of the variants; their test loss over memory; the layers' scores
    kept.json                           the numbers alone, from which `--resume` proves or continues the study elsewhere

A study of several tasks has such a folder for each, and tasks.md beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml

from ows_ds import config, files, methods, tables
from ows_ds.bench import answers, report, study
from ows_ds.bench.study import Run, Study
from ows_ds.config import Data, Recipe, accumulation, changed, sources
from ows_ds.config.loss import REFERENCE
from ows_ds.data.rows import load_rows
from ows_ds.distributed.communicator import fail_together
from ows_ds.distributed.launch import Runtime, start
from ows_ds.errors import UserError
from ows_ds.files import write_text
from ows_ds.importance.probabilities import METRIC_OF, importance_of
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.pretrained import free_memory, load_model, load_tokenizer
from ows_ds.model.shapes import read_model
from ows_ds.planner.forecast import Planner
from ows_ds.train import preference, trainer
from ows_ds.train.context import RunContext, evaluate, to_measure

logger = logging.getLogger(__name__)


def quality(
    plans: Mapping[str, Study],
    output: Path,
    seeds: Sequence[int] | None,
    variants: Sequence[str] | None,
    kept: Path | None,
    as_json: bool,
    command: str,
) -> None:
    """Run what is left of ``plans``, by task, into ``output`` and report. Collective over the launcher's ranks.

    seeds, variants: only these now (the first seed is always included); None: all. kept: a kept.json whose runs count
    as complete. as_json: standard output gets the result as JSON and nothing else. command: as typed, for the report.
    Raises UserError for whatever the user can put right, before anything is written where no model is needed to see it.
    """
    summaries: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        before = {} if kept is None else _read_kept(kept)
        for name, plan in plans.items():
            _check(plan, output / name, seeds, variants)
        for name, plan in plans.items():
            runtime = start(study.recipe_of(plan, study.grid(plan)[0], output / name))
            work = _Work(plan, output / name, runtime, command)
            work.begin(before.get(name))
            while True:
                summaries[name] = work.report()
                if work.main and name:
                    _keep_together(output, plans)
                run = work.next(variants, seeds)
                if run is None:
                    break
                work.run(run)
        if work.main and len(plans) > 1:
            report.write_tasks(summaries, output)
    if not work.main:
        return
    if as_json:
        print(json.dumps(summaries.get("", summaries), indent=2, allow_nan=False))
        return
    for name, summary in summaries.items():
        print(tables.terminal(report.study_tables(summary, name), report.study_notes(summary)))
    if len(plans) > 1:
        print(tables.terminal([report.tasks_table(summaries)], []))


def _read_kept(path: Path) -> dict[str, Any]:
    """The studies in a kept.json, by task. Raises UserError (``--resume``) for another file."""
    try:
        tasks: dict[str, Any] = files.parse_json(files.read_text(path))["tasks"]
        for task in tasks.values():
            runs = [Run(name, one["lr"], one["seed"]) for name, some in task["runs"].items() for one in some]
            assert {"study", "base"} <= task.keys()
            assert len(set(runs)) == len(runs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        right = f"expected the kept.json of a study ({type(error).__name__})"
        raise UserError("--resume", str(path), right) from error
    return tasks


def _keep_together(output: Path, tasks: Iterable[str]) -> None:
    """kept.json of all tasks from those of each."""
    found = {name: output / name / "kept.json" for name in tasks}
    kept = {name: json.loads(file.read_text())["tasks"][""] for name, file in found.items() if file.exists()}
    write_text(output / "kept.json", json.dumps({"format": 1, "tasks": kept}, allow_nan=False) + "\n")


def _check(plan: Study, output: Path, seeds: Sequence[int] | None, variants: Sequence[str] | None) -> None:
    for key, given, known in (("seeds", seeds, plan.seeds), ("variants", variants, plan.variants)):
        for one in given or ():
            if one not in known:
                raise UserError(key, one, f"expected some of the study's: {', '.join(map(str, known))}")
    if output.exists() and not output.is_dir():
        raise UserError("output", str(output), "expected a folder, or a name at which one can be made")
    recipes = [study.recipe_of(plan, run, output) for run in study.grid(plan)]
    needed = {
        "reasoning_gym": plan.accuracy is not None,
        "scipy": plan.baseline is not None,
        "peft": any(recipe.method.name in methods.ADAPTERS for recipe in recipes),
    }
    for name, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(name) is None:
            raise UserError("bench quality", f"{name} is not installed", "pip install 'ows_ds[bench]'")
    study.check(plan, output)


def _rows(plan: Study, data: Data) -> dict[str, str]:
    """A hash of the rows of data.train, data.eval and test.

    Raises UserError for rows of test that are in one of the others, or that cannot be marked.
    """
    given = {key: sources(data, key) for key in ("data.train", "data.eval")}
    given["test"] = sources(plan.test_data(data), "data.eval")
    lines: dict[str, list[str]] = {}
    for key, some in given.items():
        rows = [
            row
            for one in some
            for row in load_rows(one.path, one.format, key, one.subset, one.split or "train", data.on_bad_row)
        ]
        if some:
            lines[key] = [json.dumps(row, sort_keys=True, default=str) for row in rows]
    for key in ("data.train", "data.eval"):
        if set(lines["test"]) & set(lines.get(key, ())):
            raise UserError("test", plan.test, f"expected rows that are not in {key}: some are in both")
    if plan.accuracy is not None:  # rows are those of test, the last key
        for number, row in enumerate(rows[: plan.accuracy.rows], start=1):
            answers.check_row(row, f"{plan.test}: row {number}")
    return {key: hashlib.sha256("\n".join(some).encode()).hexdigest() for key, some in lines.items()}


class _Work:
    """A study under way. Files record what is complete; rank 0 reads them and tells the others. All is collective."""

    def __init__(self, plan: Study, output: Path, runtime: Runtime, command: str) -> None:
        self.plan, self.output, self.runtime, self.command = plan, output, runtime, command
        self.comm, self.main = runtime.comm, runtime.comm.rank == 0
        self._known: numpy.ndarray | None = None

    def _results(self) -> dict[Run, dict[str, Any]]:
        """What `_measure_run` has recorded of every complete run."""
        files = {run: self.output / run.folder / "result.json" for run in study.all_runs(self.plan)}
        return {run: json.loads(file.read_text()) for run, file in files.items() if file.exists()}

    def _recipes(self) -> list[Recipe]:
        """Of the runs that choose the learning rates."""
        return [study.recipe_of(self.plan, run, self.output) for run in study.grid(self.plan)]

    def begin(self, kept: Mapping[str, Any] | None = None) -> None:
        """Take ``output`` for this study, with the numbers ``kept`` of one; measure the model before training."""
        recipes = self._recipes()
        for recipe in recipes:
            accumulation(recipe, self.comm.world_size)
        with fail_together(self.comm):
            if self.main:
                self._take_output(recipes[0].data, kept)
        for lr, names in study.unsearched(self.plan):
            said = f"{', '.join(names)} share a learning rate, {lr:g}, that none of them has searched: give them lrs"
            self._log(f"quality: {said}")
        if not self.comm.broadcast_object((self.output / "base.json").exists()):
            self._log("quality: the model before training")
            self._write(self.output / "base.json", self._measure(recipes[0]))

    def _take_output(self, data: Data, kept: Mapping[str, Any] | None) -> None:
        tree, file = self.plan.tree() | {"rows": _rows(self.plan, data)}, self.output / "study.yaml"
        if kept is not None and (wrong := study.conflict(kept["study"], tree, kept["runs"])):
            raise UserError("--resume", "another study", f"expected the kept.json of this one: it differs in {wrong}")
        if file.exists():
            begun = sorted(folder.name for folder in self.output.glob("runs/*"))
            if wrong := study.conflict(files.read_yaml(file, "output"), tree, begun):
                right = f"expected another folder: it holds a study that differs in {wrong}"
                raise UserError("output", str(self.output), right)
        # a hidden file is another job's that has just begun with the same study
        elif self.output.exists() and any(not file.name.startswith(".") for file in self.output.iterdir()):
            raise UserError("output", str(self.output), "expected an empty folder, or that of a study to resume")
        write_text(file, yaml.safe_dump(tree, sort_keys=False))
        if kept is None:
            return
        known = {"base.json": kept["base"]}
        for variant, some in kept["runs"].items():
            known |= {f"{Run(variant, one['lr'], one['seed']).folder}/result.json": one["result"] for one in some}
        for name, content in known.items():
            if not (self.output / name).exists():
                write_text(self.output / name, json.dumps(content, allow_nan=False) + "\n")

    def _keep(self, results: Mapping[Run, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """What kept.json says of this study."""
        runs: dict[str, list[Any]] = {}
        for run, result in results.items():
            runs.setdefault(run.variant, []).append({"lr": run.lr, "seed": run.seed, "result": result})
        return {"study": files.read_yaml(self.output / "study.yaml"), "base": base, "runs": runs}

    def next(self, variants: Sequence[str] | None, seeds: Sequence[int] | None) -> Run | None:
        """The first run that is not complete."""
        run = None
        if self.main:
            losses = {run: result["chosen_on"] for run, result in self._results().items()}
            run = study.next_run(self.plan, losses, variants, seeds)
        shared = self.comm.broadcast_object(None if run is None else list(astuple(run)))
        return None if shared is None else Run(*shared)

    def run(self, run: Run) -> None:
        """Train, measure, record the result, and delete what is no longer needed."""
        done = len(self._results()) if self.main else 0
        self._log("quality: run %d of %d: %s", done + 1, study.size(self.plan), run.folder.removeprefix("runs/"))
        folder = self.output / run.folder
        recipe = study.recipe_of(self.plan, run, self.output)
        known = self.comm.broadcast_object(self._scores_of_another(recipe, folder) if self.main else None)
        if known is not None:
            recipe = changed(recipe, {"sampling.scores": known})
        if not self.comm.broadcast_object((folder / "model").exists()):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # metrics.jsonl is about this run, not those before it
            try:
                trainer.train(recipe)
            except UserError as error:
                raise UserError(f"variants.{run.variant}: {error.key}", error.value, error.right) from error
            free_memory()
        self._write(folder / "result.json", self._measure_run(recipe, folder))
        if self.main and not self.plan.keep_models:
            for name in ("model", "checkpoints"):
                shutil.rmtree(folder / name, ignore_errors=True)

    def _scores_of_another(self, recipe: Recipe, own: Path) -> str | None:
        """Scores that a run of this study has computed on the same model and rows for the same metric and threshold."""
        wanted = _scored_by(recipe)
        for file in sorted(self.output.glob("runs/*/*/scores.json")) if wanted else ():
            other = file.parent / "config.yaml"
            if file.parent != own and other.exists():  # noqa: SIM102
                if _scored_by(config.from_dict(files.read_yaml(other))) == wanted:
                    return str(file)
        return None

    def _measure_run(self, recipe: Recipe, folder: Path) -> dict[str, Any]:
        """A run's result.

        chosen_on: loss on data.eval after the last step, which chooses the learning rate. loss, right, rows: on test.
        tokens, seconds: over all steps, without evaluations. losses: of training, by step. planned_bytes: the most
        that a rank needs for a step. null: not measured, or not a finite number.
        """
        at_end = changed(recipe, {"model.path": str(folder / "model"), "model.revision": None})
        steps = [record for record in (report.records(folder) if self.main else ()) if record["step"] > 0]
        return {
            "chosen_on": steps[-1].get("eval_loss") if steps else None,
            **self._measure(at_end),
            "steps": len(steps),
            "tokens": sum(record["tokens"] for record in steps),
            "seconds": sum(record["step_seconds"] for record in steps),
            "losses": [None if record["loss"] is None else round(record["loss"], 5) for record in steps],
            "planned_bytes": self._planned(recipe),
        }

    def _planned(self, recipe: Recipe) -> int:
        planner = Planner(recipe, read_model(recipe.model.path, recipe.model.revision, recipe.model.trust_remote_code))
        return planner.peak(planner.choice(self.comm.world_size))

    def _context(self, recipe: Recipe) -> RunContext:
        """``model.path``, with its real weights, and the rows of test."""
        data = self.plan.test_data(recipe.data)
        real = {"train.gradient_checkpointing": False, "model.frozen": "same"}
        recipe = changed(recipe.model_copy(update={"data": data}), real)
        model, tokenizer = load_model(recipe, self.runtime), load_tokenizer(recipe)
        return to_measure(recipe, self.runtime, *model, tokenizer, self.plan.test, "test")

    def _reference(self) -> numpy.ndarray | None:
        """What the model before training says of the rows of test, for a loss that compares with it."""
        if self._known is None and (recipe := self._recipes()[0]).loss.name in REFERENCE:
            before = self._context(recipe)
            self._known = preference.reference(before, before.held_out, fingerprint(before.weights))
            del before
            free_memory()
        return self._known

    def _measure(self, recipe: Recipe) -> dict[str, Any]:
        """Loss and answers of ``model.path`` on test."""
        accuracy, reference = self.plan.accuracy, self._reference()
        context = self._context(recipe)
        context.held_out.reference = reference
        data, weights, tokenizer = context.recipe.data, context.weights, context.tokenizer
        loss = evaluate(context)["eval_loss"]
        found: dict[str, Any] = {"loss": loss if math.isfinite(loss) else None, "right": None, "rows": None}
        if accuracy is not None:
            rows = load_rows(self.plan.test, data.format, "test", data.eval_subset, data.eval_split, data.on_bad_row)
            rows = rows[: accuracy.rows]
            found |= {"rows": len(rows), "right": answers.count_right(weights, tokenizer, rows, data, accuracy)}
        del weights, context
        free_memory()
        return found

    def report(self) -> dict[str, Any]:
        """Write the tables and pictures of what is complete; returns the result, on rank 0."""
        summary: dict[str, Any] = {}
        with fail_together(self.comm):
            if self.main:
                base = json.loads((self.output / "base.json").read_text())
                facts = report.facts(self.command, self.comm.world_size)
                results = self._results()
                summary = report.summarize(self.plan, base, results, facts)
                report.write_study(self.plan, summary, results, self.output)
                kept = {"format": 1, "tasks": {"": self._keep(results, base)}}
                write_text(self.output / "kept.json", json.dumps(kept, allow_nan=False) + "\n")
        return summary

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        with fail_together(self.comm):
            if self.main:
                write_text(path, json.dumps(content, allow_nan=False) + "\n")

    def _log(self, text: str, *values: Any) -> None:
        if self.main:
            logger.info(text, *values)


def _scored_by(recipe: Recipe) -> tuple[Any, ...] | None:
    """What a run's scores depend on, where all runs have the same model and rows; None: it needs none."""
    metric, sampling = METRIC_OF.get(importance_of(recipe)), recipe.sampling
    if metric is None:
        return None
    rows = sampling.calibration_samples, sampling.calibration_length
    return metric, sampling.tau if metric == "outlier" else None, rows, recipe.model.dtype
