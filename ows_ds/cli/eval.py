"""`ows-ds eval`."""

from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, need, read_settings, sentence
from ows_ds.evaluate.setting import Evaluation, MTBench, check


def parser() -> Parser:
    """The options, also as lm-evaluation-harness spells them."""
    made = Parser("eval MODEL (--tasks LIST | --mt-bench FILE) [options]", sentence(VERBS["eval"]))
    made.add_argument("model", metavar="MODEL", nargs="?", help="folder of a run or of a model, or a name on the hub")
    made.add_settings(Evaluation, both=True)
    made.add_settings(MTBench, both=True)
    return made


def run(options: Options, argv: list[str]) -> None:
    """Evaluate."""
    need(options, model="a folder")
    evaluation, judged = read_settings(options, Evaluation, MTBench)
    check(options["model"], evaluation, judged)
    from ows_ds.evaluate.run import evaluate

    evaluate(options["model"], evaluation, judged)
