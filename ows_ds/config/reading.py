"""Recipes as trees and YAML, and the checks of a recipe that look at files or at the number of ranks."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ows_ds.config.inputs import Data, Source
from ows_ds.config.recipe import Recipe
from ows_ds.config.settings import Wrong, parse
from ows_ds.errors import UserError
from ows_ds.files import can_be_made

DATA_FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
COMPRESSED = (".gz", ".zst", ".bz2")
HUB_NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


def from_dict(tree: Mapping[str, Any], files: bool = False) -> Recipe:
    """The recipe that a parsed YAML file describes: `{"optim": {"rank": 64}, ...}`; what is absent takes its default.

    files: also check what it names: data, scores, folders. Raises UserError naming every mistake.
    """
    return parse(Recipe, tree, also=_missing if files else None)


def check(recipe: Recipe, files: bool = True) -> None:
    """The checks of `from_dict`, for a recipe that was changed since. Raises UserError."""
    from_dict(to_dict(recipe), files)


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of keys by their full names, not checked."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    copies = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    made = recipe.model_copy(update=copies)
    made._auto = recipe.auto - changes.keys()
    return made


def exact(recipe: Recipe) -> Recipe:
    """The recipe in which no machine chooses anything: keys that are ``auto`` keep their plain values; what the number
    of steps (`period`) and of layers (`gamma`) decides stays ``auto``."""
    return changed(recipe, {key: value_of(recipe, key) for key in recipe.auto - {"sampling.period", "sampling.gamma"}})


def value_of(recipe: Recipe, key: str) -> Any:
    """Of a key by its full name."""
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def tokens_of_pass(recipe: Recipe) -> int:
    """Tokens of a rank's forward pass in training, at most."""
    rows = 2 if recipe.loss.rows == "preference" else 1
    length = math.ceil(recipe.data.max_length / recipe.train.sequence_parallel)  # of a rank's piece of a row
    return recipe.train.micro_batch_size * length * rows


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts, lists and numbers, every default written out; `from_dict` reverses it."""
    tree = recipe.model_dump(mode="json")
    for key in recipe.auto:
        section, _, name = key.partition(".")
        tree[section][name] = "auto"
    return tree


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML text, every default written out; `from_dict(yaml.safe_load(text))` gives it back."""
    import yaml

    return str(yaml.safe_dump(to_dict(recipe), sort_keys=False))


def used(run_dir: Path) -> list[str]:
    """What a run has left in its folder, of that which no other run may write over."""
    return [name for name in ("metrics.jsonl", "checkpoints", "model") if (run_dir / name).exists()]


def data_suffix(source: str) -> str:
    """What a file of rows is, by its name: its suffix, or the one before that of a compressed file."""
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    return "".join(suffixes[-2:-1] if suffixes and suffixes[-1] in COMPRESSED else suffixes[-1:])


def is_file(source: str) -> bool:
    """Whether a source of rows is meant as a local file (it ends like one, or is there), not as a data set."""
    return data_suffix(source) in DATA_FILES or os.path.isfile(source)


def _missing(recipe: Recipe) -> Iterator[Wrong]:
    """Every file and folder that is not there, or cannot be."""
    data, train, model = recipe.data, recipe.train, recipe.model.path
    if not train.output_dir or not can_be_made(train.output_dir):
        right = "expected a folder that can be written to, or a name at which one can be made"
        yield Wrong("train.output_dir", right)
    if not os.path.isdir(model) and (os.path.isfile(model) or not re.fullmatch(HUB_NAME, model)):
        yield Wrong("model.path", "expected a folder that exists, or a name on the hub")
    if data.train is None:
        yield Wrong("data.train", "it is required: expected a file or a data set")
    for key, given in {"data.train": data.train, "data.eval": data.eval}.items():
        one = not isinstance(given, list)
        for index, source in enumerate(sources(data, key)):
            if right := _not_found(source.path):
                yield Wrong(key if one else f"{key}[{index}].path", right)
    if data.cache is not None and not can_be_made(data.cache):
        yield Wrong("data.cache", "expected a folder that can be written to, or a name at which one can be made")
    files = {
        "data.chat_template": data.chat_template,
        "sampling.scores": recipe.sampling.scores,
        "train.ds_config": train.ds_config,
    }
    for key, path in files.items():
        if path is not None and not os.path.isfile(path):
            yield Wrong(key, "expected a file that exists")
    if train.resume not in ("never", "auto") and not os.path.isdir(train.resume):
        yield Wrong("train.resume", "expected never, auto, or the folder of a checkpoint")


def _not_found(path: str) -> str:
    """What to say of a source that is not there, as far as that shows without the network."""
    if not os.path.isfile(path) and is_file(path):
        return "expected a file that exists"
    if not os.path.exists(path) and not re.fullmatch(HUB_NAME, path):
        return "expected a file or folder that exists, or the name of a data set on the hub"
    return ""


def sources(data: Data, key: str) -> list[Source]:
    """What ``key``, data.train or data.eval, names: with the subset, split and format of ``data`` where one has none.

    A plain text is one source, null none.
    """
    name = key.partition(".")[2]
    given = getattr(data, name)
    listed = given if isinstance(given, list) else [] if given is None else [Source(path=given)]
    subset, split = getattr(data, f"{name}_subset"), getattr(data, f"{name}_split")
    return [
        Source(
            path=one.path,
            weight=one.weight,
            subset=one.subset or subset,
            split=one.split or split,
            format=data.format if one.format == "auto" else one.format,
        )
        for one in listed
    ]


def data_ranks(recipe: Recipe, world_size: int) -> int:
    """Ranks, of ``world_size``, or groups of ranks, that have different rows.

    Raises UserError naming train.sequence_parallel when the ranks do not divide evenly.
    """
    size = recipe.train.sequence_parallel
    if world_size % size:
        raise UserError("train.sequence_parallel", size, f"expected a divisor of the number of ranks, {world_size}")
    return world_size // size


def accumulation(recipe: Recipe, world_size: int) -> int:
    """Micro-batches per rank and optimizer step, on ``world_size`` ranks.

    Raises UserError naming train.global_batch_size when the batch does not divide evenly, and as `data_ranks`.
    """
    ranks = data_ranks(recipe, world_size)
    share = recipe.train.micro_batch_size * ranks
    if recipe.train.global_batch_size % share:
        what = "ranks" if ranks == world_size else "groups of ranks"
        right = f"expected a multiple of {share}, train.micro_batch_size x {ranks} {what}"
        raise UserError("train.global_batch_size", recipe.train.global_batch_size, right)
    return recipe.train.global_batch_size // share
