"""`ows-ds report`."""

from pathlib import Path

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, need, sentence


def parser() -> Parser:
    """The options."""
    made = Parser("report RUN_DIR [RUN_DIR ...] [--output FILE.html]", sentence(VERBS["report"]))
    made.add_argument("run_dir", metavar="RUN_DIR", nargs="*", help="folder of a run (its train.output_dir)")
    made.value("output", "FILE.html", "the page (default: report.html in the first folder); it needs no network")
    return made


def run(options: Options, argv: list[str]) -> None:
    """Write the page."""
    need(options, run_dir="a folder")
    from ows_ds.runs.page import report

    output = options.get("output")
    print(report([Path(one) for one in options["run_dir"]], None if output is None else Path(output)))
