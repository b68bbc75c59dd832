"""`ows-ds push`."""

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, need, sentence


def parser() -> Parser:
    """The options."""
    made = Parser("push RUN REPO [--private] [--message TEXT]", sentence(VERBS["push"]))
    made.add_argument("run_dir", metavar="RUN", nargs="?", help="folder of a finished run, or of an exported model")
    made.add_argument("repo", metavar="REPO", nargs="?", help="repository, such as name/model; made if it is missing")
    made.flag("private", "make it a private one")
    made.value("message", "TEXT", "of the commit")
    return made


def run(options: Options, argv: list[str]) -> None:
    """Upload."""
    need(options, run_dir="a folder", repo="a repository, such as name/model")
    from ows_ds.runs.push import push

    print(push(options["run_dir"], options["repo"], bool(options.get("private")), options.get("message")))
