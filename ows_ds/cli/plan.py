"""`ows-ds plan`."""

import sys
from pathlib import Path
from typing import get_args

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, recipe_tree, sentence, words_in
from ows_ds.errors import UserError
from ows_ds.model.shapes import SHAPES
from ows_ds.planner.cluster import GPUS, Cluster, read_cluster


def parser() -> Parser:
    """The options."""
    made = Parser(
        "plan --model.path MODEL [--cluster CLUSTER] [options]",
        f"{sentence(VERBS['plan'])} The model needs no weights: a folder with a config.json, or a name such as "
        f"{next(iter(SHAPES))}. Every key of the recipe is an option here, and wins over the file.",
    )
    made.value("config", "RECIPE.yaml", "recipe; its sections and keys are those below")
    made.value(
        "cluster",
        "CLUSTER",
        f"nodes x GPUs of a node, such as 4x8xH100 (of {', '.join(GPUS)}), or a YAML file of the keys below (default: "
        "8xA100-80)",
    )
    made.value("methods", "LIST", "values of method.name to compare with, with commas")
    made.value("lengths", "LIST", "lengths of rows to plan for as well, with commas, such as 4k,32k,1M")
    made.value(
        "output",
        "DIR",
        "folder of a recipe, a DeepSpeed file, plan.json and scaling.png; nothing in it is written over",
    )
    made.value("choose", "WHICH", "of what fits, the recipe that is written: cheapest (the default) or fastest")
    made.json_flag()
    made.add_settings(Cluster, title="what the options change of --cluster")
    made.add_recipe()
    return made


def run(options: Options, argv: list[str]) -> None:
    """Plan."""
    from ows_ds import config

    tree = recipe_tree(options)
    train = tree.get("train") or {}
    if isinstance(train, dict):
        tree["train"] = {"output_dir": "runs/planned", **train}  # nothing is written there
    changes = {name: options.get(name) for name in config.fields_of(Cluster)}
    cluster = read_cluster(options.get("cluster", "8xA100-80"), changes)
    recipe = config.from_dict(tree)
    batch = recipe.train.global_batch_size
    ranks = config.data_ranks(recipe, cluster.world_size)
    if batch % ranks and "global_batch_size" not in (tree.get("train") or {}):
        more = -(-batch // ranks) * ranks
        print(f"train.global_batch_size {more}: the default, {batch}, does not divide by the GPUs", file=sys.stderr)
        recipe = config.from_dict({**tree, "train": {**tree["train"], "global_batch_size": more}})
    others = words_in(options, "methods") or []
    known = get_args(config.recipe_keys()["method.name"].annotation)
    if not set(others) <= set(known):
        right = f"expected some of {', '.join(known)}, with commas between them"
        raise UserError("--methods", options["methods"], right)
    output, choose = options.get("output"), options.get("choose", "cheapest")
    if choose not in ("cheapest", "fastest"):
        raise UserError("--choose", choose, "expected cheapest or fastest")
    from ows_ds.planner.lengths import parse_lengths
    from ows_ds.planner.plan import plan

    lengths = [] if "lengths" not in options else parse_lengths(words_in(options, "lengths") or [])
    folder = None if output is None else Path(output)
    plan(recipe, cluster, others, lengths, folder, choose, bool(options.get("json")))
