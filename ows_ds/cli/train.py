"""`ows-ds train`."""

import os

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, read_recipe, recipe_parser
from ows_ds.errors import UserError


def parser() -> Parser:
    """The options."""
    made = recipe_parser("train", VERBS["train"])
    made.add_argument(
        "--preview",
        nargs="?",
        const="1",
        metavar="ROWS",
        help="show so many rows (default: 1) as the model gets them, with what is trained, and stop; needs no weights",
    )
    made.add_recipe()
    return made


def run(options: Options, argv: list[str]) -> None:
    """Train, or show rows."""
    rows = options.get("preview")
    if rows is not None and not (rows.isascii() and rows.isdecimal() and int(rows)):
        raise UserError("--preview", rows, "expected an integer of at least 1, a number of rows")
    recipe = read_recipe(options)
    if recipe is None:
        return
    if rows is not None:
        from ows_ds.data.preview import preview

        preview(recipe, int(rows))
        return
    from ows_ds.distributed.own_ranks import command

    own = command(recipe, argv)
    if own is not None:
        os.execv(own[0], own)
    from ows_ds.train.trainer import train

    train(recipe)
