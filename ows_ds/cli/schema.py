"""`ows-ds schema`."""

from pathlib import Path

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, sentence
from ows_ds.errors import UserError
from ows_ds.files import atomic_write, can_be_made


def parser() -> Parser:
    """The options."""
    text = "A recipe that begins with `# yaml-language-server: $schema=FILE` is checked and completed by editors."
    made = Parser("schema [--output FILE]", f"{sentence(VERBS['schema'])} {text}")
    made.value("output", "FILE", "file to write (default: print it)")
    return made


def run(options: Options, argv: list[str]) -> None:
    """Write it."""
    from ows_ds.config.schema import schema_text

    if "output" not in options:
        print(schema_text(), end="")
        return
    path = Path(options["output"])
    if path.is_dir() or not can_be_made(path.parent):
        raise UserError("--output", str(path), "expected a file in a folder that can be written to, or can be made")
    with atomic_write(path) as partial:
        partial.write_text(schema_text(), encoding="utf-8")
