"""`ows-ds bench WHAT`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ows_ds.bench.setting import How, Setting, check
from ows_ds.cli.main import VERBS
from ows_ds.cli.options import Options, Parser, need, read_settings, sentence, words_in
from ows_ds.errors import UserError

BENCHES = {
    "quality": "train the variants of a study and compare their losses and right answers",
    "time": "seconds of a step of each method, against a frozen model's",
    "memory": "peak memory of each method by component",
    "traffic": "bytes that each method sends in a step and for a refresh",
}


class _Benches(Parser):
    """Reads the word after bench, then that bench's options."""

    def read(self, argv: Sequence[str]) -> Options:
        if not argv or argv[0] not in BENCHES:
            self.read_choice("bench WHAT", BENCHES, argv)
        return {"what": argv[0], **_parser_of(argv[0]).read(argv[1:])}


def parser() -> Parser:
    """What there is to measure."""
    made = _Benches("bench WHAT [options]", sentence(VERBS["bench"]))
    made.add_choices("WHAT", BENCHES, "`ows-ds bench WHAT --help` lists the options of each.")
    return made


def _parser_of(what: str) -> Parser:
    if what != "quality":
        made = Parser(f"bench {what} [options]", sentence(BENCHES[what]))
        made.add_settings(Setting)
        made.add_settings(How)
        return made
    made = Parser("bench quality --config STUDY.yaml --output DIR [options]", sentence(BENCHES["quality"]))
    made.value("config", "STUDY.yaml", "study: recipe, variants, seeds (docs/bench.md)")
    made.value("output", "DIR", "folder of the runs and the report; a study in it is resumed")
    made.value("seeds", "LIST", "seeds to run now, such as 0,1; the first always (default: all)")
    made.value("resume", "FILE", "kept.json of the same study, whose runs count as complete")
    made.value("variants", "LIST", "variants to run now, with commas (default: all)")
    made.json_flag()
    return made


def run(options: Options, argv: list[str]) -> None:
    """Measure; the report names what was typed."""
    command, what = shlex.join(["ows-ds", *argv]), options.pop("what")
    if what != "quality":
        setting, how = read_settings(options, Setting, How)
        check(how)
        from ows_ds.bench.run import bench

        bench(what, setting, how, command)
        return
    need(options, config="the file of a study", output="a folder")
    seeds = words_in(options, "seeds")
    if not all(seed.isdecimal() for seed in seeds or ()):
        raise UserError("--seeds", options["seeds"], "expected integers with commas between them, such as 0,1")
    from ows_ds.bench import study

    plans = study.read(options["config"])
    from ows_ds.bench.quality import quality

    numbers = None if seeds is None else [int(seed) for seed in seeds]
    kept = Path(options["resume"]) if options.get("resume") else None
    variants, as_json = words_in(options, "variants"), bool(options.get("json"))
    quality(plans, Path(options["output"]), numbers, variants, kept, as_json, command)
