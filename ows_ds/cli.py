"""The command line: verbs, help, and exit codes.

0: done. 2: a mistake of the user, told in one line on standard error. 1: anything else, with its traceback.
A verb's implementation is imported when it runs, so that `--help` and mistakes answer at once.
"""

import dataclasses
import re
import sys
import traceback
from argparse import Action, ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_origin

from ows_ds import config
from ows_ds.config import Recipe
from ows_ds.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

VERBS = {
    "train": "fine-tune a model; the main job",
    "score": "write the layers' importance (scores.json) and a plot of it",
    "export": "write a Hugging Face checkpoint from a run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb with `argv` (default: the process's own) and return the exit code.

    SystemExit, which --help raises, passes through.
    """
    try:
        _run(_without_local_rank(list(sys.argv[1:] if argv is None else argv)))
    except UserError as error:
        print(f"ows-ds: error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _run(argv: list[str]) -> None:
    parser = _parser()
    try:
        given = parser.parse_args(argv, defaults=False)
    except (ArgumentError, TypeError, KeyError, ValueError) as error:
        raise _in_one_line(str(error)) from error
    options: Namespace = given[given.verb]
    if given.verb == "export":
        _need(options, "run_dir", "out_dir")
        from ows_ds.export import export

        export(Path(options.run_dir), Path(options.out_dir), options.get("checkpoint"))
        return
    recipe = _recipe(options)
    if options.get("print_config"):
        print(config.to_yaml(recipe), end="")
        return
    config.check(recipe)
    if given.verb == "train":
        from ows_ds.trainer import train

        train(recipe)
    else:
        from ows_ds.trainer import score

        output = options.get("output")
        score(recipe, None if output is None else Path(output))


def _without_local_rank(argv: list[str]) -> list[str]:
    """Drop the `--local_rank N` that DeepSpeed's launcher adds; the rank comes from the environment."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word in ("--local_rank", "--local-rank"):
            skip = True
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept


def _recipe(options: "Namespace") -> Recipe:
    """The recipe file with the options of the command line on top."""
    tree: dict[str, Any] = config.read_yaml(options.config) if options.get("config") else {}
    for section in config.SECTIONS:
        if section in options and isinstance(tree.get(section) or {}, dict):
            tree[section] = {**(tree.get(section) or {}), **options[section].as_dict()}
    return config.from_dict(tree)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _need(options: "Namespace", *names: str) -> None:
    for name in names:
        if options.get(name) is None:
            raise UserError(name.upper(), None, "it is required: give a folder")


def _parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _get_help_string(self, action: Action) -> str:
            return action.help or ""  # _add_recipe writes types and defaults, in words

    def parser(usage: str, description: str) -> ArgumentParser:
        return ArgumentParser(
            prog="ows-ds",
            usage=usage,
            description=description,
            formatter_class=Formatter,
            exit_on_error=False,
            allow_abbrev=False,
            print_config=None,  # ours prints the recipe as config.yaml has it
        )

    top = parser("ows-ds VERB [options]", "Fine-tune language models with outlier-weighed layerwise sampling (OWS).")
    verbs = top.add_subcommands(
        dest="verb",
        metavar="VERB",
        title="verbs",
        description="`ows-ds VERB --help` lists the options of a verb.",
    )
    for verb in ("train", "score"):
        sub = parser(
            f"ows-ds {verb} --config RECIPE.yaml [--section.key value ...]",
            f"{_sentence(VERBS[verb])} Every key of the recipe is an option here, and wins over the file.",
        )
        sub.add_argument("--config", metavar="RECIPE.yaml", help="recipe; its sections and keys are those below")
        sub.add_argument("--print_config", action="store_true", help="print the resolved recipe and stop")
        if verb == "score":
            sub.add_argument(
                "--output",
                metavar="FILE.json",
                help="default: scores.json in train.output_dir",
            )
        _add_recipe(sub)
        verbs.add_subcommand(verb, sub, help=VERBS[verb])
    sub = parser("ows-ds export RUN_DIR OUT_DIR [--checkpoint step-N]", _sentence(VERBS["export"]))
    # Not required for the parser, so that the message about a missing one is ours.
    sub.add_argument("run_dir", metavar="RUN_DIR", nargs="?", help="folder of the run (its train.output_dir)")
    sub.add_argument("out_dir", metavar="OUT_DIR", nargs="?", help="folder to write; made if it is missing")
    sub.add_argument("--checkpoint", metavar="step-N", help="checkpoint to export (default: the newest complete one)")
    verbs.add_subcommand("export", sub, help=VERBS["export"])
    return top


def _add_recipe(parser: "ArgumentParser") -> None:
    """One option per key of the recipe, with the type, default and documentation of its dataclass."""
    import docstring_parser

    hints = config.hints()
    for section, kind in config.SECTIONS.items():
        doc = docstring_parser.parse(kind.__doc__ or "")
        help_of = {p.arg_name: " ".join((p.description or "").split()) for p in doc.params}
        group = parser.add_argument_group(section, doc.short_description)
        for f in dataclasses.fields(kind):
            hint = hints[f"{section}.{f.name}"]
            facts = [] if get_origin(hint) is Literal else [config.instruction(hint).removeprefix("give ")]
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            if default is not dataclasses.MISSING:
                facts.append(f"default: {_as_yaml(default)}")
            help = f"{help_of[f.name].rstrip('.')} ({'; '.join(facts)})".replace("%", "%%")
            group.add_argument(f"--{section}.{f.name}", type=hint, default=None, help=help)


def _as_yaml(value: object) -> str:
    """A default as the user would write it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _in_one_line(message: str) -> UserError:
    """What jsonargparse found wrong, as an error that names key, value and what would be right."""
    hints = config.hints()
    if found := re.match(r'Parser key "([^"]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL):
        key, value = found.groups()
        return UserError(key, value, config.instruction(hints[key]) if key in hints else message)
    if found := re.match(r"argument (?:--)?([\w.]+)\S*: expected one argument", message):
        key = found[1]
        return UserError(key, "", config.instruction(hints[key]) if key in hints else "give a value after it")
    if found := re.match(r"unrecognized arguments: (--)?([^\s=]+)(?:[\s=](.*))?", message, re.DOTALL):
        dashes, word, rest = found.groups()
        if dashes:
            return config.unknown(word, rest or "", list(hints))
        return UserError("arguments", word, "settings are given as --section.key value")
    if found := re.match(r"argument VERB: invalid choice: '([^']*)'", message):
        return UserError("VERB", found[1], f"give one of {', '.join(VERBS)}")
    if message.startswith('expected "verb"'):
        return UserError("VERB", None, f"give one of {', '.join(VERBS)}")
    return UserError("arguments", "the command line", message)
