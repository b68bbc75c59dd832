"""`ows-ds recipes`."""

from pathlib import Path

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, new_file, sentence
from ows_ds.errors import UserError
from ows_ds.files import write_text


def parser() -> Parser:
    """The options."""
    made = Parser("recipes [NAME] [--output FILE]", sentence(VERBS["recipes"]))
    made.add_argument("name", metavar="NAME", nargs="?", help="one of the list; it is printed, or copied")
    made.value("output", "FILE", "new file to copy it to, or a folder")
    return made


def run(options: Options, argv: list[str]) -> None:
    """List, print or copy."""
    from ows_ds import shipped

    known, name, output = shipped.files(), options.get("name"), options.get("output")
    if name is None:
        width = max(map(len, known))
        for one, path in known.items():
            print(f"{one:{width}}  {shipped.about(path)}".rstrip())
        return
    found = [one for one in known if name in (one, one.partition("/")[2], Path(one).stem)]
    if not found:
        import difflib

        near = difflib.get_close_matches(name, [*known, *(Path(one).stem for one in known)], n=1)
        right = f"is {near[0]} meant?" if near else "`ows-ds recipes` lists them"
        raise UserError("NAME", name, f"expected one of those that come along; {right}")
    text = known[found[0]].read_text(encoding="utf-8")
    if output is None:
        print(text, end="")
        return
    to = new_file(Path(output) / known[found[0]].name if Path(output).is_dir() else output)
    write_text(to, text)
    print(to)
