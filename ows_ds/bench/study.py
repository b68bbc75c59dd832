"""A study: variants of one recipe, trained on the same data for the same tokens. What runs there are, in which order.

The learning rate of a variant is chosen on ``data.eval``; what is reported is measured on ``test``, on which nothing
is chosen. This module starts nothing and imports no torch.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ows_ds import config, files
from ows_ds.config import Data, Recipe, Settings, Wrong, parse
from ows_ds.config.inputs import Split
from ows_ds.config.method import LEARNING_RATES
from ows_ds.config.settings import Count, Expected, Number, Seed
from ows_ds.errors import UserError, raise_all

# What all variants share, or the study itself sets.
FIXED = (
    *(key for key in config.recipe_keys() if key.startswith(("data.", "loss."))),
    "model.path", "model.revision", "train.steps", "train.epochs", "train.global_batch_size", "train.seed",
    "sampling.seed", "train.output_dir", "train.resume", "train.save_total_limit",
)  # fmt: skip
Rates = Annotated[
    list[Annotated[Number, Field(ge=0)]],
    Field(min_length=1),
    Expected("a list of different numbers of at least 0, such as [1e-4, 3e-4]"),
]


class Accuracy(Settings):
    """How answers are generated."""

    rows: Count = 64
    """The first so many rows of test."""
    max_new_tokens: Count = 256
    """Of an answer, at most."""
    batch_size: Count = 8
    """Rows per rank and forward pass."""


class Task(Settings):
    """The rows of one task."""

    train: str
    """Of data.train."""
    eval: str
    """Of data.eval."""
    test: str
    """As test."""


class StudyFile(Settings):
    """What stands in the file of a study."""

    recipe: Annotated[str | dict[str, Any], Expected("the file of a recipe, or its sections")]
    test: str
    """Rows that are reported on, given as those of data.eval are; the recipe's format."""
    tasks: Annotated[
        dict[str, dict[str, Any]] | None, Expected("names with the rows of each: train, eval and test")
    ] = Field(None, min_length=1)
    """In place of test and the recipe's data.train and data.eval: rows of several tasks, each a study of its own."""
    variants: Annotated[
        dict[str, dict[str, Any] | None], Expected("names with their settings, such as `lisa: {method.name: lisa}`")
    ] = Field(min_length=1)
    """Settings by their full names, on top of the recipe; lrs of its own."""
    lrs: Rates | None = None
    """Learning rates that a variant tries; null: the recipe's."""
    seeds: Annotated[list[Seed], Expected("a list of different integers of at least 0")] = Field([0], min_length=1)
    """Seeds of the runs; the first one chooses the learning rates."""
    baseline: str | None = None
    """Variant that the others are tested against; null: no test."""
    accuracy: Accuracy | None = None
    """How answers are generated; null: not measured."""
    keep_models: bool = False
    """Keep the models of complete runs."""
    test_subset: str | None = None
    """As data.eval_subset."""
    test_split: Split = "test"
    """As data.eval_split."""

    def contradictions(self) -> Iterator[Wrong]:
        if len(set(self.seeds)) < len(self.seeds):
            yield Wrong("seeds", "expected a list of different integers of at least 0")
        if _equal(self.lrs or []):
            yield Wrong("lrs", "expected a list of different numbers of at least 0, such as [1e-4, 3e-4]")
        if self.baseline is not None and self.baseline not in self.variants:
            yield Wrong("baseline", f"expected one of {', '.join(self.variants)}", ("variants",))


class _Rates(Settings):
    """The learning rates of a variant."""

    lrs: Rates


@dataclass(frozen=True)
class Variant:
    """overrides: settings by their full names, on top of the recipe. lrs: the learning rates that are tried."""

    overrides: dict[str, Any]
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Study:
    """What a study file says (see `StudyFile`), everything filled in; recipe: the base recipe as a tree."""

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
        accuracy = None if self.accuracy is None else self.accuracy.model_dump()
        tree: dict[str, Any] = json.loads(json.dumps({**asdict(self), "accuracy": accuracy}))
        return tree

    def test_data(self, data: Data) -> Data:
        """``data`` with ``test`` in the place of data.eval."""
        rows = {"eval": self.test, "eval_subset": self.test_subset, "eval_split": self.test_split}
        return data.model_copy(update=rows)


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


def read(path: str | Path) -> dict[str, Study]:
    """The studies in a YAML file: one a task, by its name; without tasks one, under an empty name.

    Raises UserError for unknown keys, wrong types and contradictions, naming the key.
    """
    tree = files.read_yaml(path)
    if not tree.get("tasks"):
        return {"": from_dict(tree)}
    if "test" in tree:
        raise UserError("test", tree["test"], "leave it out: each of tasks has its own")
    given = parse(StudyFile, {**tree, "test": ""}).tasks or {}
    tasks = {name: parse(Task, rows, f"tasks.{name}.") for name, rows in given.items()}
    recipe = tree["recipe"]
    recipe = files.read_yaml(recipe, "recipe") if isinstance(recipe, str) else recipe
    studies = {}
    for name, task in tasks.items():
        _check_name(f"tasks.{name}", name)
        rows = {"data.train": task.train, "data.eval": task.eval}
        own = {**tree, "test": task.test, "recipe": _merged(recipe, rows)}
        studies[name] = from_dict({key: value for key, value in own.items() if key != "tasks"})
    return studies


def from_dict(tree: Mapping[str, Any]) -> Study:
    """The study of one task that a parsed file describes (see `read`)."""
    file = parse(StudyFile, tree)
    tree, recipe = _base(file.recipe)
    given = (tree.get("optim") or {}).get("lr", "auto")
    lrs = tuple(sorted(file.lrs)) if file.lrs else () if given == "auto" else (float(recipe.optim.lr),)
    if recipe.loss.rows and file.accuracy is not None:
        right = f"leave it out under loss.name {recipe.loss.name}: its rows compare answers, and have no right one"
        raise UserError("accuracy", file.accuracy.model_dump(), right)
    variants, wrong = {}, []
    for name, settings in file.variants.items():
        try:
            variants[name] = _variant(name, settings or {}, lrs, recipe.method.name)
        except UserError as error:
            wrong.append(error)
    raise_all(wrong)
    rest = file.model_dump(include={"baseline", "keep_models", "test_subset", "test_split"})
    return Study(tree, file.test, variants, tuple(file.seeds), accuracy=file.accuracy, **rest)


def _base(given: str | dict[str, Any]) -> tuple[dict[str, Any], Recipe]:
    """The base recipe: of a file, or as it stands in the study; as a tree, and read."""
    tree = _plain("recipe", files.read_yaml(given, "recipe") if isinstance(given, str) else given)
    recipe = config.from_dict(_merged(tree, {"train.output_dir": "."}))
    if recipe.sampling.seed is not None:
        raise UserError("recipe: sampling.seed", recipe.sampling.seed, "leave it out: the study's seeds set it")
    return tree, recipe


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


def _equal(lrs: Sequence[float]) -> bool:
    """Whether two learning rates would have the same folder."""
    return len({f"{lr:g}" for lr in lrs}) < len(lrs)


def _lrs(key: str, given: Any) -> tuple[float, ...]:
    lrs = parse(_Rates, {"lrs": given}, key.removesuffix("lrs")).lrs
    if _equal(lrs):
        raise UserError(key, given, "expected a list of different numbers of at least 0, such as [1e-4, 3e-4]")
    return tuple(sorted(lrs))


def _check_name(key: str, name: str) -> None:
    if not name or not all(letter.isalnum() or letter in "-_.=" for letter in name) or name.startswith("."):
        raise UserError(key, name, "expected a name of letters, digits, - _ = and . (it names a folder)")


def _variant(name: str, given: Mapping[str, Any], lrs: tuple[float, ...], base: str) -> Variant:
    """lrs: of the study, or of its recipe; none: the method's own. base: the recipe's method."""
    key = f"variants.{name}"
    _check_name(key, name)
    overrides: dict[str, Any] = {}
    for setting, value in given.items():
        if setting in config.sections() and isinstance(value, Mapping):
            overrides |= {f"{setting}.{inner}": v for inner, v in value.items()}
        elif setting != "lrs":
            overrides[str(setting)] = value
    wrong = []
    for setting, value in overrides.items():
        if setting in FIXED:
            right = "leave it out: it is the same for all variants, or the study sets it"
            wrong.append(UserError(f"{key}.{setting}", value, right))
        elif setting not in config.recipe_keys():
            wrong.append(UserError(f"{key}.{setting}", value, config.unknown_key(setting, f"{key}.")))
    if "optim.lr" in overrides and "lrs" in given:
        wrong.append(UserError(f"{key}.lrs", given["lrs"], "expected lrs or optim.lr, not both"))
    raise_all(wrong)
    if "lrs" in given:
        lrs = _lrs(f"{key}.lrs", given["lrs"])
    elif "optim.lr" in overrides:
        lrs = _lrs(f"{key}.lrs", [overrides.pop("optim.lr")])
    if not lrs:  # the method's own
        lrs = (LEARNING_RATES.get(overrides.get("method.name", base), LEARNING_RATES["ows"]),)
    return Variant(_plain(key, overrides), lrs)


def unsearched(study: Study) -> list[tuple[float, list[str]]]:
    """Learning rates that variants of several methods share though none of them has searched it, with these variants.

    A learning rate does not carry over from one method to another.
    """
    base = (study.recipe.get("method") or {}).get("name", "ows")
    found: dict[float, dict[str, str]] = {}
    for name, variant in study.variants.items():
        if len(variant.lrs) == 1:
            found.setdefault(variant.lrs[0], {})[name] = str(variant.overrides.get("method.name", base))
    return [(lr, list(some)) for lr, some in found.items() if len(set(some.values())) > 1]


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
        return config.exact(config.from_dict(_merged(study.recipe, own)))  # the same for all, on any machine
    except UserError as error:
        raise error.within(f"variants.{run.variant}: ") from error


def check(study: Study, output: Path) -> None:
    """Refuse what shows without a model in the recipes of all runs. Raises UserError naming variant and key."""
    found: dict[str, UserError] = {}
    for run in all_runs(study):
        try:
            recipe = recipe_of(study, run, output)
            config.check(recipe)
            if len(study.variants[run.variant].lrs) > 1 and recipe.data.eval is None:
                right = "expected held-out rows to choose the learning rate on"
                raise UserError("recipe: data.eval", None, right)
            config.check(recipe.model_copy(update={"data": study.test_data(recipe.data)}))
        except UserError as error:
            for one in error.errors:
                own = one.key.startswith(("variants.", "recipe: "))
                key = "test" if one.value == study.test else one.key if own else f"variants.{run.variant}: {one.key}"
                found.setdefault(key, UserError(key, one.value, one.right))
    raise_all(found.values())


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
    """What in the tree of a study contradicts the one that an output holds; None where the study may resume.

    begun: variants with runs; they must stay as they were, but for more learning rates. Further seeds and other
    variants may come. Both trees have ``rows`` beside what `Study.tree` gives: a hash of the rows by key.
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

    def grown(name: str) -> bool:
        one, other = before.get(name, {"lrs": [None]}), now.get(name, {"lrs": []})
        return set(one["lrs"]) <= set(other["lrs"]) and one.get("overrides") == other.get("overrides")

    return next((f"variants.{name}" for name in begun if not grown(name)), None)
