"""A study: variants of one recipe, trained on the same data for the same tokens. What runs there are, in which order.

The learning rate of a variant is chosen on ``data.eval``; what is reported is measured on ``test``, on which nothing
is chosen. This module starts nothing and imports no torch.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ows_ds import config, files
from ows_ds.config import Data, Recipe
from ows_ds.errors import UserError

# What all variants share, or the study itself sets.
FIXED = (
    *(f"data.{name}" for name in typing.get_type_hints(config.Data)),
    "model.path", "model.revision", "train.steps", "train.epochs", "train.global_batch_size", "train.seed", "sampling.seed",
    "train.output_dir", "train.resume", "train.save_total_limit",
)  # fmt: skip


@dataclass(frozen=True)
class Accuracy:
    """How answers are generated. rows: the first so many of ``test``; max_new_tokens: of an answer; batch_size: rows
    per process and forward pass."""

    rows: int = 64
    max_new_tokens: int = 256
    batch_size: int = 8


@dataclass(frozen=True)
class Variant:
    """overrides: settings by their full names, on top of the recipe. lrs: the learning rates that are tried."""

    overrides: dict[str, Any]
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Study:
    """What a study file says, everything filled in.

    recipe: the base recipe as a tree. test, test_subset, test_split: the rows that are reported on, given as those of
    data.eval are; their format is the recipe's. seeds: the first one chooses the
    learning rates. baseline: the variant that the others are tested against, None: no test. accuracy: None: not
    measured. keep_models: of runs that are complete.
    """

    recipe: dict[str, Any]
    test: str
    variants: dict[str, Variant]
    seeds: tuple[int, ...] = (0,)
    baseline: str | None = None
    accuracy: Accuracy | None = None
    keep_models: bool = False
    test_subset: str | None = None
    test_split: str = "test"

    def tree(self) -> dict[str, Any]:
        """As plain dicts, lists and numbers."""
        tree: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return tree

    def test_data(self, data: Data) -> Data:
        """``data`` with ``test`` in the place of data.eval."""
        return replace(data, eval=self.test, eval_subset=self.test_subset, eval_split=self.test_split)


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    variant: str
    lr: float
    seed: int

    @property
    def folder(self) -> str:
        """Where it lies, relative to the study's output."""
        return f"runs/{self.variant}/lr-{self.lr:g}-seed-{self.seed}"


Losses = Mapping[Run, float | None]
"""Loss on data.eval at the end of every complete run; None: not a finite number, or no data.eval."""


def read(path: str | Path) -> Study:
    """The study in a YAML file. Raises UserError for unknown keys, wrong types and contradictions, naming the key."""
    return from_dict(files.read_yaml(path))


def from_dict(tree: Mapping[str, Any]) -> Study:
    """The study that a parsed file describes (see `read`): keys of `Study`, and ``lrs``, the variants' default."""
    wanted = typing.get_type_hints(Study)
    config.refuse_unknown(tree, [*wanted, "lrs"])
    recipe = _base(tree.get("recipe"))
    seeds = tuple(config.convert("seeds", tree.get("seeds", [0]), list[int], list[int]))
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError("seeds", list(seeds), "expected a list of different integers of at least 0")
    lrs = _lrs("lrs", tree.get("lrs", [(recipe.get("optim") or {}).get("lr", config.Optim.lr)]))
    given = tree.get("variants")
    if not isinstance(given, Mapping) or not given:
        raise UserError("variants", given, "expected names with their settings, such as `lisa: {method.name: lisa}`")
    variants = {str(name): _variant(str(name), settings or {}, lrs) for name, settings in given.items()}
    rest = {
        key: config.convert(key, tree[key], wanted[key], wanted[key])
        for key in ("baseline", "keep_models", "test_subset", "test_split")
        if key in tree
    }
    test = config.convert("test", tree.get("test"), str, str)
    study = Study(recipe, test, variants, seeds, accuracy=_accuracy(tree.get("accuracy")), **rest)
    if study.baseline is not None and study.baseline not in variants:
        raise UserError("baseline", study.baseline, f"expected one of {', '.join(variants)}")
    return study


def _base(given: Any) -> dict[str, Any]:
    """The base recipe as a tree: of a file, or as it stands in the study."""
    tree = files.read_yaml(given, "recipe") if isinstance(given, str) else given
    if not isinstance(tree, Mapping):
        raise UserError("recipe", given, "expected the file of a recipe, or its sections")
    tree = _plain("recipe", tree)
    config.from_dict(_merged(tree, {"train.output_dir": "."}))  # unknown keys show here, before those of variants
    if (tree.get("sampling") or {}).get("seed") is not None:
        raise UserError("recipe: sampling.seed", tree["sampling"]["seed"], "leave it out: the study's seeds set it")
    return dict(tree)


def _merged(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with settings by their full names on top."""
    merged = {name: dict(section) if isinstance(section, Mapping) else section for name, section in tree.items()}
    for key, value in settings.items():
        section, name = key.split(".")
        before = merged.get(section)
        if isinstance(before, Mapping | None):  # what is no section is refused where the recipe is read
            merged[section] = {**(before or {}), name: value}
    return merged


def _plain(key: str, value: Any) -> Any:
    """A value from YAML as JSON has it, as which a study is kept."""
    try:
        return json.loads(json.dumps(value, default=str))
    except (TypeError, ValueError) as error:
        raise UserError(key, value, f"expected texts and numbers ({error})") from error


def _lrs(key: str, given: Any) -> tuple[float, ...]:
    lrs = tuple(config.convert(key, given, list[float], list[float]))
    if not lrs or len({f"{lr:g}" for lr in lrs}) < len(lrs) or not all(math.isfinite(lr) and lr >= 0 for lr in lrs):
        raise UserError(key, given, "expected a list of different numbers of at least 0, such as [1e-4, 3e-4]")
    return tuple(sorted(lrs))


def _variant(name: str, given: Any, lrs: tuple[float, ...]) -> Variant:
    key = f"variants.{name}"
    if not name or not all(letter.isalnum() or letter in "-_.=" for letter in name) or name.startswith("."):
        raise UserError(key, name, "expected a name of letters, digits, - _ = and . (it names a folder)")
    if not isinstance(given, Mapping):
        raise UserError(key, given, "expected settings, such as {method.name: lisa}")
    overrides: dict[str, Any] = {}
    for setting, value in given.items():
        if setting == "lrs":
            lrs = _lrs(f"{key}.lrs", value)
        elif setting in config.SECTIONS and isinstance(value, Mapping):
            overrides |= {f"{setting}.{inner}": v for inner, v in value.items()}
        else:
            overrides[str(setting)] = value
    config.refuse_unknown(overrides, list(config.hints()), f"{key}.")
    for setting in overrides:
        if setting in FIXED:
            right = "leave it out: it is the same for all variants, or the study sets it"
            raise UserError(f"{key}.{setting}", overrides[setting], right)
    if "optim.lr" in overrides:
        if "lrs" in given:
            raise UserError(f"{key}.lrs", given["lrs"], "expected lrs or optim.lr, not both")
        lrs = _lrs(f"{key}.optim.lr", [overrides.pop("optim.lr")])
    return Variant(_plain(key, overrides), lrs)


def _accuracy(given: Any) -> Accuracy | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError("accuracy", given, "expected rows, max_new_tokens and batch_size, or null")
    wanted = typing.get_type_hints(Accuracy)
    config.refuse_unknown(given, list(wanted), "accuracy.")
    values = {key: config.convert(f"accuracy.{key}", value, int, int) for key, value in given.items()}
    for key, value in values.items():
        if value < 1:
            raise UserError(f"accuracy.{key}", value, "expected an integer of at least 1")
    return Accuracy(**values)


def grid(study: Study) -> list[Run]:
    """The runs that choose the learning rates: all of them at the first seed."""
    return [Run(name, lr, study.seeds[0]) for name, variant in study.variants.items() for lr in variant.lrs]


def all_runs(study: Study) -> list[Run]:
    """Every run that there may be, whatever learning rates are chosen."""
    return [Run(run.variant, run.lr, seed) for run in grid(study) for seed in study.seeds]


def size(study: Study) -> int:
    """Number of runs of the whole study."""
    return len(grid(study)) + len(study.variants) * (len(study.seeds) - 1)


def recipe_of(study: Study, run: Run, output: Path) -> Recipe:
    """The recipe of a run, not checked. Raises UserError naming the variant for what does not convert."""
    own = {
        **study.variants[run.variant].overrides,
        "optim.lr": run.lr,
        "train.seed": run.seed,
        "train.output_dir": str(output / run.folder),
        "train.resume": "auto",
        "train.save_total_limit": 1,
    }
    try:
        return config.from_dict(_merged(study.recipe, own))
    except UserError as error:
        raise UserError(f"variants.{run.variant}: {error.key}", error.value, error.right) from error


def check(study: Study, output: Path) -> None:
    """Refuse what shows without a model in the recipes of all runs. Raises UserError naming variant and key."""
    for run in all_runs(study):
        recipe = recipe_of(study, run, output)
        try:
            config.check(recipe)
            config.check(replace(recipe, data=study.test_data(recipe.data)))
        except UserError as error:
            key = "test" if error.value == study.test else f"variants.{run.variant}: {error.key}"
            raise UserError(key, error.value, error.right) from error
        if len(study.variants[run.variant].lrs) > 1 and recipe.data.eval is None:
            raise UserError("recipe: data.eval", None, "expected held-out rows to choose the learning rate on")


def choose(study: Study, variant: str, losses: Losses) -> float | None:
    """The learning rate of a variant: of the least loss on data.eval at the first seed, the smaller one of equals.

    None while runs of its grid are not complete. A run without a finite loss is never chosen where another has one.
    """
    runs = [Run(variant, lr, study.seeds[0]) for lr in study.variants[variant].lrs]
    if len(runs) == 1:
        return runs[0].lr
    if not all(run in losses for run in runs):
        return None
    found = [math.inf if losses[run] is None else float(losses[run] or 0.0) for run in runs]
    return runs[found.index(min(found))].lr


def next_run(
    study: Study, losses: Losses, variants: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> Run | None:
    """The first run that is not complete: the grids at the first seed, then seed by seed at the chosen rates.

    variants, seeds: only these; the first seed always comes along, as it chooses the rates. None: nothing is left.
    """
    names = [name for name in study.variants if variants is None or name in variants]
    for run in grid(study):
        if run.variant in names and run not in losses:
            return run
    for seed in study.seeds[1:]:
        for name in names if seeds is None or seed in seeds else ():
            lr = choose(study, name, losses)
            assert lr is not None  # the grid is complete
            if Run(name, lr, seed) not in losses:
                return Run(name, lr, seed)
    return None


def conflict(old: Mapping[str, Any], new: Mapping[str, Any], begun: Sequence[str]) -> str | None:
    """What in the tree of a study contradicts the one that an output holds; None where it may go on.

    begun: variants with runs; they must stay as they were. Further seeds and other variants may come. Both trees have
    ``rows`` beside what `Study.tree` gives: a hash of the rows by key.
    """
    for key in ("recipe", "test", "test_subset", "test_split", "accuracy"):
        if old.get(key) != new[key]:
            return key
    for key, value in new["rows"].items():
        if old.get("rows", {}).get(key) != value:
            return f"the rows of {key}"
    if old.get("seeds", [])[:1] != new["seeds"][:1]:
        return "the first of seeds"
    before, now = old.get("variants", {}), new["variants"]
    return next((f"variants.{name}" for name in begun if before.get(name) != now.get(name)), None)
