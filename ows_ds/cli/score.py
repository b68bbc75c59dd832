"""`ows-ds score`."""

import os
from pathlib import Path
from typing import get_args

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, read_recipe, recipe_parser, words_in
from ows_ds.errors import UserError
from ows_ds.files import can_be_made


def parser() -> Parser:
    """The options."""
    made = recipe_parser("score", VERBS["score"])
    made.value(
        "output", "FILE.json", "file of the scores (default: scores.json in train.output_dir); the plot is FILE.png"
    )
    made.value(
        "metric",
        "LIST",
        "what to measure and show: values of sampling.importance, with commas between them (default: what the recipe's "
        "importance needs). FILE.json holds the metric that the recipe's importance needs, or the first one; where "
        "several are measured, each is also in FILE-METRIC.json",
    )
    made.add_recipe()
    return made


def run(options: Options, argv: list[str]) -> None:
    """Measure."""
    from ows_ds.config import recipe_keys

    kinds, output = words_in(options, "metric") or [], options.get("output")
    known = [kind for kind in get_args(recipe_keys()["sampling.importance"].annotation) if kind != "gradient"]
    if not set(kinds) <= set(known):
        right = f"expected one or more of {', '.join(known)}, with commas between them"
        raise UserError("--metric", options["metric"], right)
    if output is not None and (not output.endswith(".json") or os.path.isdir(output)):
        raise UserError("--output", output, "expected a file whose name ends in .json; the plot lies beside it")
    if output is not None and not can_be_made(Path(output).parent):
        raise UserError("--output", output, "expected a file in a folder that can be written to, or can be made")
    recipe = read_recipe(options)
    if recipe is None:
        return
    from ows_ds.train.trainer import score

    score(recipe, None if output is None else Path(output), kinds)
