"""`ows-ds chat`."""

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, need, read_settings, sentence
from ows_ds.evaluate.setting import Chat


def parser() -> Parser:
    """The options."""
    made = Parser(
        "chat RUN_OR_MODEL [options]",
        f"{sentence(VERBS['chat'])} A line is a message; /clear forgets the talk, /exit or the end of input leaves.",
    )
    made.add_argument("model", metavar="RUN_OR_MODEL", nargs="?", help="folder of a run or of a model, or a hub name")
    made.add_settings(Chat)
    return made


def run(options: Options, argv: list[str]) -> None:
    """Talk."""
    need(options, model="a folder")
    [settings] = read_settings(options, Chat)
    from ows_ds.evaluate.chat import chat

    chat(options["model"], settings)
