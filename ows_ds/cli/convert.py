"""`ows-ds convert`."""

import sys
from pathlib import Path

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, need, new_file, sentence
from ows_ds.errors import UserError
from ows_ds.files import write_text


def parser() -> Parser:
    """The options."""
    made = Parser(
        "convert FILE.yaml [--ranks N] [--output RECIPE.yaml]",
        f"{sentence(VERBS['convert'])} What has no counterpart is listed (docs/from_other_tools.md).",
    )
    made.add_argument("file", metavar="FILE.yaml", nargs="?", help="recipe of LLaMA-Factory, axolotl, TRL or LMFlow")
    made.value("ranks", "N", "processes of the run: their batches are of one of them (default: 1)")
    made.value("output", "RECIPE.yaml", "file to write (default: print it)")
    return made


def run(options: Options, argv: list[str]) -> None:
    """Convert."""
    need(options, file="a file")
    import yaml

    from ows_ds import config
    from ows_ds.config.convert import convert, is_foreign
    from ows_ds.files import read_yaml

    ranks, output = options.get("ranks", "1"), options.get("output")
    if not (ranks.isascii() and ranks.isdecimal() and int(ranks)):
        raise UserError("--ranks", ranks, "expected an integer of at least 1, a number of processes")
    to = None if output is None else new_file(output)
    tree = read_yaml(options["file"], "FILE.yaml")
    if not is_foreign(tree):
        right = "expected a flat recipe of LLaMA-Factory, axolotl, TRL or LMFlow"
        raise UserError("FILE.yaml", options["file"], right)
    found = convert(tree, int(ranks))
    recipe = {**found.recipe, "train": {"output_dir": "runs/converted", **found.recipe.get("train", {})}}
    said = [f"left out: {key} ({why})" for key, why in found.left_out.items()] + [
        f"look at {one}" for one in found.notes
    ]
    try:
        config.from_dict(recipe)
    except UserError as error:
        said += [f"look at {one}" for one in error.errors]
    text = f"# From {Path(options['file']).name}, by ows-ds convert.\n" + "".join(f"# {line}\n" for line in said)
    text += str(yaml.safe_dump(recipe, sort_keys=False))
    if to is None:
        print(text, end="")
    else:
        write_text(to, text)
    for line in said:
        print(f"ows-ds: {line}", file=sys.stderr)
