"""What a checkpoint contains of a run, and how another run resumes from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ows_ds import config, files
from ows_ds.checkpoint import Checkpoint, checkpoints
from ows_ds.config import Recipe
from ows_ds.distributed.weights import Shard, Weights, load_weights, weight_shards
from ows_ds.errors import UserError, raise_all
from ows_ds.methods import Method


def check(run_dir: Path, recipe: Recipe, opened: Checkpoint | None) -> None:
    """Refuse (UserError) to overwrite another run, and to resume with another recipe.

    Under ``train.resume: auto`` a run that was stopped before its first checkpoint starts again.
    """
    own = opened is not None and opened.folder.resolve().parent.parent == run_dir.resolve()
    restarted = opened is None and recipe.train.resume == "auto" and not (run_dir / "model").exists()
    if not own and not (restarted and (run_dir / "config.yaml").exists()):
        used = config.used(run_dir)
        if used:
            right = f"expected a folder without {used[0]}"
            if recipe.train.resume == "never":
                right += ", or --train.resume auto to resume the run that is there"
            raise UserError("train.output_dir", str(run_dir), right)
    if own and opened is not None and (run_dir / "model").exists():
        newest = checkpoints(run_dir)[0]
        if opened.folder.resolve() != newest.resolve():
            done = f"the run is finished, its newest checkpoint is {newest.name}"
            right = f"expected auto or another train.output_dir: {done}"
            raise UserError("train.resume", recipe.train.resume, right)
    if opened is None and not (restarted and (run_dir / "config.yaml").exists()):
        return
    try:
        tree = files.read_yaml(run_dir / "config.yaml") if opened is None else opened.facts["recipe"]
        old = config.to_dict(config.from_dict(tree))
    except UserError as error:
        right = (
            f"expected never and another train.output_dir: the recipe of the run is not one of this version ({error})"
        )
        raise UserError("train.resume", recipe.train.resume, right) from error
    raise_all(
        UserError(f"{section}.{key}", value, f"expected {old[section][key]!r}, as the run that is resumed")
        for section, values in config.to_dict(recipe).items()
        for key, value in values.items()
        if old[section][key] != value and not config.may_change_on_resume(f"{section}.{key}")
        if f"{section}.{key}" not in recipe.auto  # it stays what it was
    )


def as_chosen(recipe: Recipe, opened: Checkpoint, world_size: int) -> Recipe:
    """``recipe`` with what is ``auto`` as it was chosen when the run began; micro-batches that do not divide the batch
    of as many ranks are chosen again."""
    began = config.from_dict(opened.facts["recipe"])
    chosen = {key: config.value_of(began, key) for key in recipe.auto - began.auto}
    ranks = config.data_ranks(recipe, world_size)
    if recipe.train.global_batch_size % (chosen.get("train.micro_batch_size", 1) * ranks):
        del chosen["train.micro_batch_size"]
    return config.changed(recipe, chosen)


def contents(method: Method, everything: bool) -> tuple[list[Shard], dict[str, Any]]:
    """This rank's shards of a checkpoint, and its numbers. Between two steps only.

    everything: also the weights that have never trained, which are otherwise those of the base model.
    """
    shards, rest = method.shards(), []
    if everything:
        parameters, there = method.weights.parameters(), {shard.name for shard in shards}
        rest = [name for name in parameters if f"weight/{name}" not in there]
        shards += weight_shards(method.weights, parameters, rest)
    return shards, {"method": method.state_values(), "never_trained": rest}


def base_model(opened: Checkpoint, weights: Weights, model: str, path: str, everything: bool) -> str:
    """The fingerprint of the model that ``opened`` began with.

    weights: what was loaded from ``path``, with the fingerprint ``model``. everything: whether none of its weights is
    needed where ``opened`` has them all. Raises UserError (``model.path``) where they are needed and differ.
    """
    began = str(opened.facts.get("model"))
    if model == began:
        return model
    parameters = weights.parameters().items()
    complete = all(opened.shapes.get(f"weight/{name}") == weights.shape(p) for name, p in parameters)
    if not (complete and everything):
        right = f"expected the model that {opened.folder.name} began with ({began[:12]}): this one is {model[:12]}"
        raise UserError("model.path", path, right + (", or train.checkpoint full" if complete else ""))
    return began


@torch.no_grad()
def restore(method: Method, opened: Checkpoint) -> None:
    """Set the method and its weights to what `contents` gave. Collective."""
    method.weights.after_step()
    parameters = method.weights.parameters()
    load_weights(method.weights, parameters, opened.state["never_trained"], opened.read)
    method.load_shards(opened.state["method"], opened.read)
