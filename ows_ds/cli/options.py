"""Options of the command line, from the models of settings; mistakes become `UserError`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ows_ds.errors import UserError, raise_all

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic.fields import FieldInfo

    from ows_ds.config import Recipe, Settings

Options = dict[str, Any]
"""What was given: keys of the recipe by their full names, others by the option's name."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with our messages."""

    def __init__(self, usage: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog="ows-ds",
            usage=f"ows-ds {usage}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            exit_on_error=False,
        )
        self.fields: dict[str, FieldInfo] = {}
        self.names: list[str] = []

    def error(self, message: str) -> NoReturn:
        raise UserError("arguments", "the command line", message)

    def value(self, name: str, metavar: str, help: str) -> None:
        """An option that takes a text."""
        self.names.append(name)
        self.add_argument(f"--{name}", metavar=metavar, help=help)

    def flag(self, name: str, help: str) -> None:
        """An option without a value."""
        self.names.append(name)
        self.add_argument(f"--{name}", action="store_true", help=help)

    def json_flag(self) -> None:
        """--json."""
        self.flag("json", "print the result as JSON and nothing else")

    def add_choices(self, metavar: str, choices: Mapping[str, str], description: str) -> None:
        """List words that stand in the place of options, with their meaning."""
        group = self.add_subparsers(
            metavar=metavar, title=metavar.lower(), description=description, parser_class=argparse.ArgumentParser
        )
        for name, help in choices.items():
            group.add_parser(name, help=help)

    def read_choice(self, key: str, choices: Mapping[str, str], argv: Sequence[str]) -> NoReturn:
        """Show the help where that is asked for; otherwise refuse what is none of the words."""
        if {"-h", "--help"} & set(argv):
            self.parse_args(["--help"])
        raise UserError(key, argv[0] if argv else None, f"expected one of {', '.join(choices)}")

    def add_settings(self, kind: "type[Settings]", section: str = "", title: str = "", both: bool = False) -> None:
        """An option for each key of a model. section: of the recipe. both: also with underscores."""
        from ows_ds.config import fields_of

        summary = str(kind.__doc__)
        group = self.add_argument_group(*((section, summary) if section else (title or summary.rstrip("."),)))
        for name, field in fields_of(kind).items():
            key = f"{section}.{name}" if section else name
            self.fields[key] = field
            names = [key] if section else [key.replace("_", "-"), *([key] if both and "_" in key else [])]
            self.names.append(names[0])
            if field.annotation is bool and not section:
                more: dict[str, Any] = {"action": "store_true", "help": _help(field, ())}
            else:
                metavar, facts = _metavar(name, field)
                more = {"metavar": metavar, "help": _help(field, facts)}
            group.add_argument(*(f"--{name}" for name in names), dest=key, **more)

    def add_recipe(self) -> None:
        """An option for each key of the recipe, --config and --print_config."""
        from ows_ds.config import sections

        for section, kind in sections().items():
            self.add_settings(kind, section)

    def read(self, argv: Sequence[str]) -> Options:
        """What ``argv`` gives, converted from text. Raises UserError for all that is no option, or lacks its value."""
        try:
            given, rest = self.parse_known_args(argv)
        except argparse.ArgumentError as error:  # an option without its value
            key = (error.argument_name or "").partition("/")[0].removeprefix("--")
            field = self.fields.get(key.replace("-", "_"))
            right = "a value after it" if field is None else _words(field)
            raise UserError(key if "." in key else f"--{key}", "", f"expected {right}") from None
        options = {**vars(given), **self._strays(rest)}
        for key, field in self.fields.items():
            if isinstance(options.get(key), str):
                options[key] = from_text(field, options[key])
        return options

    def _strays(self, rest: list[str]) -> Options:
        """Options that do not exist, if they are to be refused as keys of the recipe; others are refused here."""
        words, keys, wrong = list(rest), {}, []
        while words:
            word = words.pop(0)
            name, _, value = word.lstrip("-").partition("=")
            if not word.startswith("-"):
                wrong.append(UserError("arguments", word, "settings are given as --section.key value"))
                continue
            if not value and words and not words[0].startswith("-"):
                value = words.pop(0)
            if "." in name and any("." in key for key in self.fields):
                keys[name] = value
            else:
                from ows_ds.config.settings import meant, unknown

                right = meant(name, self._meanings(), "--") or unknown(name, self.names, {}, "--")
                wrong.append(UserError(f"--{name}", value, right))
        raise_all(wrong)
        return keys

    def _meanings(self) -> Mapping[str, str]:
        """What other tools call the recipe's keys, where these are options."""
        if not any("." in key for key in self.fields):
            return {}
        from ows_ds.config import Recipe

        return Recipe.meanings


def _words(field: "FieldInfo") -> str:
    from ows_ds.config import words

    return words(field)


def _help(field: "FieldInfo", facts: Sequence[str]) -> str:
    from ows_ds.config.reference import as_yaml
    from ows_ds.config.settings import default_of

    facts = [*facts]
    if facts and not field.is_required():
        facts.append(f"default: {as_yaml(default_of(field))}")
    text = str(field.description).rstrip(".") + (f" ({'; '.join(fact for fact in facts if fact)})" if facts else "")
    return text.replace("%", "%%")


def _metavar(name: str, field: "FieldInfo") -> tuple[str, list[str]]:
    """What stands for the value of an option, and what its help says of the type."""
    words = _words(field)
    if words.startswith("one of ") and len(words) <= 60:  # the choices themselves
        return "{" + words.removeprefix("one of ").replace(", ", ",") + "}", [""]
    for start, metavar in (("an integer", "N"), ("a number", "X"), ("a list", "LIST")):
        if words.startswith(start):
            return metavar, [words]
    return name.rpartition("_")[2].upper(), [words]


def from_text(field: "FieldInfo", text: str) -> Any:
    """A value as typed -> as YAML has it, by the type of its key: text stays text."""
    from ows_ds.config.settings import kinds_of

    kinds, optional = kinds_of(field.annotation)
    if optional and text == "null":
        return None
    if kinds <= {str} or (str in kinds and not text.startswith(("[", "{"))) or not text.strip():
        return text
    import yaml

    try:
        return yaml.safe_load(text)
    except Exception:  # the reader meets some values that are none with KeyErrors and the like
        return text


# ------------------------------------------------------------------ what was given -> settings


def read_settings(options: Options, *kinds: "type[Settings]") -> list[Any]:
    """Models from those options that are their keys. Raises UserError naming every mistake."""
    from ows_ds.config import fields_of, parse

    made, wrong = [], []
    for kind in kinds:
        try:
            made.append(parse(kind, {key: options[key] for key in fields_of(kind) if key in options}, "--"))
        except UserError as error:
            wrong.append(error)
    raise_all(wrong)
    return made


def recipe_tree(options: Options) -> dict[str, Any]:
    """The recipe file with the options of the command line on top."""
    from ows_ds.files import read_yaml

    tree: dict[str, Any] = {}
    if "config" in options:
        tree = read_yaml(options["config"])
        from ows_ds.config.convert import is_foreign

        if is_foreign(tree):
            right = f"expected sections; this is a recipe of another tool: ows-ds convert {options['config']} makes one"
            raise UserError("--config", options["config"], f"{right} of it")
    for key, value in recipe_options(options).items():
        section, _, name = key.partition(".")
        if isinstance(tree.get(section), dict | None):  # what is no section is refused where the recipe is read
            tree[section] = {**(tree.get(section) or {}), name: value}
    return tree


def recipe_options(options: Options) -> Options:
    """Those that are keys of the recipe."""
    return {key: value for key, value in options.items() if "." in key}


def read_recipe(options: Options) -> "Recipe | None":
    """The recipe, its files checked; None where --print_config has printed it."""
    from ows_ds import config

    tree = recipe_tree(options)
    if not options.get("print_config"):
        return config.from_dict(tree, files=True)
    print(config.to_yaml(config.from_dict(tree)), end="")
    return None


def recipe_parser(verb: str, help: str, usage: str = "--config RECIPE.yaml [--section.key value ...]") -> Parser:
    """The parser of a verb that takes a recipe; its keys come last, by `Parser.add_recipe`."""
    text = f"{sentence(help)} Every key of the recipe is an option here, and wins over the file."
    parser = Parser(f"{verb} {usage}", text)
    parser.value("config", "RECIPE.yaml", "recipe; its sections and keys are those below")
    parser.flag("print_config", "print the resolved recipe and stop")
    return parser


def new_file(path: "str | Path") -> "Path":
    """An ``--output`` that is to be made. Raises UserError where it is there, or cannot be."""
    from pathlib import Path

    from ows_ds.files import can_be_made

    if Path(path).exists() or not can_be_made(Path(path).parent):
        right = "expected a new file in a folder that can be written to, or can be made"
        raise UserError("--output", str(path), right)
    return Path(path)


def words_in(options: Options, name: str) -> list[str] | None:
    """A list with commas; None where it is not given."""
    return None if name not in options else [word.strip() for word in options[name].split(",")]


def sentence(text: str) -> str:
    """A help text of `VERBS` as a sentence."""
    return f"{text[0].upper()}{text[1:]}."


def need(options: Options, **wanted: str) -> None:
    """Refuse (UserError) what is missing: option or positional -> what is expected."""
    missing = [(name, right) for name, right in wanted.items() if not options.get(name)]
    places = {"run_dir": "RUN_DIR", "out_dir": "OUT_DIR", "model": "MODEL", "file": "FILE.yaml", "repo": "REPO"}
    shown = {name: places.get(name, f"--{name}") for name, _ in missing}
    raise_all(UserError(shown[name], None, f"it is required: expected {right}") for name, right in missing)
