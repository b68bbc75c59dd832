"""`ows-ds export`."""

from pathlib import Path

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, need, sentence


def parser() -> Parser:
    """The options."""
    made = Parser("export RUN_DIR OUT_DIR [--checkpoint step-N]", sentence(VERBS["export"]))
    made.add_argument("run_dir", metavar="RUN_DIR", nargs="?", help="folder of the run (its train.output_dir)")
    made.add_argument("out_dir", metavar="OUT_DIR", nargs="?", help="folder to write; made if it is missing")
    made.value("checkpoint", "step-N", "checkpoint to export (default: the newest complete one)")
    return made


def run(options: Options, argv: list[str]) -> None:
    """Export."""
    need(options, run_dir="a folder", out_dir="a folder")
    from ows_ds.train.export import export

    export(Path(options["run_dir"]), Path(options["out_dir"]), options.get("checkpoint"))
