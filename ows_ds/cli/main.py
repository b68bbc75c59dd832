"""The command line: verbs, help, and exit codes.

0: done. 2: a mistake of the user, told in one line on standard error. 75: stopped by a signal, with all that was done
saved: the same command goes on. 1: anything else, with its traceback, or with the first cause on the last line where
several processes end together.
A verb's implementation is imported when it runs, so that `--help` and mistakes answer at once.
"""

import dataclasses
import logging
import os
import re
import shlex
import sys
import traceback
import typing
from argparse import Action, ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from ows_ds import config, files
from ows_ds.bench.setting import How, Setting, option
from ows_ds.bench.setting import check as check_how
from ows_ds.config import Recipe
from ows_ds.config.reference import Key, keys, summary
from ows_ds.distributed import signals
from ows_ds.errors import Failed, UserError
from ows_ds.evaluate.setting import Evaluation, MTBench
from ows_ds.evaluate.setting import check as check_evaluation
from ows_ds.model.shapes import SHAPES
from ows_ds.planner.cluster import GPUS, Cluster, read_cluster

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

VERBS = {
    "train": "fine-tune a model; the main job",
    "score": "write the layers' importance (scores.json) and a plot of it",
    "export": "write a Hugging Face checkpoint from a run",
    "eval": "score a run or a model on benchmarks, beside its base where asked for",
    "bench": "compare methods side by side",
    "launch": "check a job, and hand it to SLURM",
    "plan": "tell memory, traffic and time on a cluster before anything runs",
    "report": "write a page about a run, or about several side by side",
}
BENCHES = {
    "quality": "train the variants of a study and compare their losses and right answers",
    "time": "seconds of a step of each method, against a frozen model's",
    "memory": "peak memory of each method by component",
    "traffic": "bytes that each method sends in a step and for a refresh",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb with `argv` (default: the process's own) and return the exit code.

    SystemExit, which --help raises, passes through.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ows_ds").setLevel(logging.INFO)  # progress
    try:
        _run(_without_local_rank(list(sys.argv[1:] if argv is None else argv)))
    except UserError as error:
        print(f"ows-ds: error: {error}", file=sys.stderr, flush=True)
        return 2
    except signals.Stopped:
        signals.ignore()
        return signals.EXIT_CODE
    except Failed as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        sys.stdout.flush()  # where both go to one file, this is the last line
        print(f"ows-ds: failed: {error}", file=sys.stderr, flush=True)
        if argv is None:
            # not the interpreter's end: process groups would wait for processes that are no more, and talk of it
            os._exit(1)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _run(argv: list[str]) -> None:
    parser = _parser()
    try:
        given = parser.parse_args(argv, defaults=False)
    except (ArgumentError, TypeError, KeyError, ValueError) as error:
        raise _in_one_line(str(error), argv) from error
    options: Namespace = given[given.verb]
    if given.verb == "export":
        _need(options, "run_dir", "out_dir")
        from ows_ds.train.export import export

        export(Path(options.run_dir), Path(options.out_dir), options.get("checkpoint"))
        return
    if given.verb == "eval":
        _need(options, "model")
        evaluation, judged = _made(Evaluation, options), _made(MTBench, options)
        check_evaluation(options.model, evaluation, judged)
        from ows_ds.evaluate.run import evaluate

        evaluate(options.model, evaluation, judged)
        return
    if given.verb == "bench":
        _bench(options, argv)
        return
    if given.verb == "report":
        _need(options, "run_dir")
        from ows_ds.runs.page import report

        output = options.get("output")
        print(report([Path(one) for one in options.run_dir], None if output is None else Path(output)))
        return
    if given.verb == "plan":
        _plan(options)
        return
    recipe = _recipe(options)
    if options.get("print_config"):
        print(config.to_yaml(recipe), end="")
        return
    config.check(recipe)
    if given.verb == "launch":
        _launch(recipe, options)
    elif options.get("preview") is not None:
        if options.preview < 1:
            raise UserError("--preview", options.preview, "expected a number of rows, at least 1")
        from ows_ds.data.preview import preview

        preview(recipe, options.preview)
    elif given.verb == "train":
        from ows_ds.train.trainer import train

        train(recipe)
    else:
        kinds, output = _kinds(options), options.get("output")
        if output is not None and (not output.endswith(".json") or os.path.isdir(output)):
            raise UserError("--output", output, "expected a file whose name ends in .json; the plot lies beside it")
        if output is not None and not files.can_be_made(Path(output).parent):
            raise UserError("--output", output, "expected a file in a folder that can be written to, or can be made")
        from ows_ds.train.trainer import score

        score(recipe, None if output is None else Path(output), kinds)


def _launch(recipe: Recipe, options: "Namespace") -> None:
    for name in ("slurm", "config"):
        if options.get(name) is None:
            raise UserError(f"--{name}", None, "it is required: expected a file")
    from ows_ds.slurm import job as slurm

    job = slurm.read(options.slurm)
    sections = {section: options[section].as_dict() for section in config.SECTIONS if section in options}
    given = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    planned = None
    if Path(recipe.model.path).is_dir():
        from ows_ds.model.shapes import read_model
        from ows_ds.planner import forecast

        model = read_model(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
        planned = forecast.planned(recipe, model, forecast.choice_of(recipe, job.world_size))
    slurm.launch(recipe, job, str(Path(options.config).resolve()), given, bool(options.get("dry_run")), planned)


def _plan(options: "Namespace") -> None:
    tree = _tree(options)
    train = tree.get("train") or {}
    if isinstance(train, dict):
        tree["train"] = {"output_dir": "runs/planned", **train}  # nothing is written there
    recipe = config.from_dict(tree)
    config.check(recipe, files=False)
    given = {name: options.get(name) for name in typing.get_type_hints(Cluster)}
    cluster = read_cluster(options.get("cluster") or "8xA100-80", given)
    words = options.get("methods")
    others = [] if words is None else [word.strip() for word in words.split(",")]
    known = get_args(config.hints()["method.name"])
    if not set(others) <= set(known):
        raise UserError("--methods", words, f"expected some of {', '.join(known)}, with commas between them")
    output, choose = options.get("output"), options.get("choose") or "cheapest"
    if choose not in ("cheapest", "fastest"):
        raise UserError("--choose", choose, "expected cheapest or fastest")
    from ows_ds.planner.plan import plan

    plan(recipe, cluster, others, None if output is None else Path(output), choose, bool(options.get("json")))


def _bench(options: "Namespace", argv: list[str]) -> None:
    """argv: what was typed, for the report."""
    chosen = options[options.bench]
    command = shlex.join(["ows-ds", *argv])
    if options.bench != "quality":
        setting, how = _made(Setting, chosen), _made(How, chosen)
        check_how(how)
        from ows_ds.bench.run import bench

        bench(options.bench, setting, how, command)
        return
    for name, right in (("config", "expected the file of a study"), ("output", "expected a folder")):
        if chosen.get(name) is None:
            raise UserError(f"--{name}", None, f"it is required: {right}")
    seeds, variants = (
        None if chosen.get(name) is None else [word.strip() for word in chosen[name].split(",")]
        for name in ("seeds", "variants")
    )
    if not all(seed.isdecimal() for seed in seeds or ()):
        raise UserError("--seeds", chosen.seeds, "expected integers with commas between them, such as 0,1")
    from ows_ds.bench import study

    plan = study.read(chosen.config)
    from ows_ds.bench.quality import quality

    numbers = None if seeds is None else [int(seed) for seed in seeds]
    quality(plan, Path(chosen.output), numbers, variants, bool(chosen.get("json")), command)


Made = TypeVar("Made")


def _made(kind: type[Made], options: "Namespace") -> Made:
    """The dataclass ``kind`` from those options that are its fields."""
    given, names = options.as_dict(), {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in given.items() if name in names})


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
    return config.from_dict(_tree(options))


def _tree(options: "Namespace") -> dict[str, Any]:
    """The same as a mapping."""
    tree: dict[str, Any] = files.read_yaml(options.config) if options.get("config") else {}
    for section in config.SECTIONS:
        if section in options and isinstance(tree.get(section), dict | None):
            tree[section] = {**(tree.get(section) or {}), **options[section].as_dict()}
    return tree


def _kinds(options: "Namespace") -> list[str]:
    """The kinds of importance in `--metric`, which is a list with commas."""
    given = options.get("metric")
    kinds = [] if given is None else [word.strip() for word in given.split(",")]
    known = get_args(config.hints()["sampling.importance"])
    if not set(kinds) <= set(known):
        raise UserError("--metric", given, f"expected one or more of {', '.join(known)}, with commas between them")
    return kinds


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _need(options: "Namespace", *names: str) -> None:
    for name in names:
        if not options.get(name):
            raise UserError(name.upper(), None, "it is required: expected a folder")


def _parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _get_help_string(self, action: Action) -> str:
            return action.help or ""  # _add_recipe writes types and defaults, in words

    def parser(usage: str, description: str, epilog: str = "") -> ArgumentParser:
        return ArgumentParser(
            prog="ows-ds",
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=Formatter,
            exit_on_error=False,
            allow_abbrev=False,
            print_config=None,  # ours prints the recipe as config.yaml has it
        )

    top = parser(
        "ows-ds VERB [options]",
        "Fine-tune language models with outlier-weighed layerwise sampling (OWS).",
        "Exit status: 0 done; 2 a mistake in what was given, told in one line; 75 stopped by a signal, saved, the same "
        "command goes on; 1 anything else.",
    )
    verbs = top.add_subcommands(
        dest="verb",
        metavar="VERB",
        title="verbs",
        description="`ows-ds VERB --help` lists the options of a verb.",
    )
    for verb in ("train", "score", "launch"):
        cluster = " --slurm CLUSTER.yaml" if verb == "launch" else ""
        options = "[options]" if verb == "launch" else "[--section.key value ...]"
        sub = parser(
            f"ows-ds {verb}{cluster} --config RECIPE.yaml {options}",
            f"{_sentence(VERBS[verb])} Every key of the recipe is an option here, and wins over the file.",
        )
        sub.add_argument("--config", metavar="RECIPE.yaml", help="recipe; its sections and keys are those below")
        sub.add_argument("--print_config", action="store_true", help="print the resolved recipe and stop")
        if verb == "train":
            sub.add_argument(
                "--preview",
                type=int,
                nargs="?",
                const=1,
                metavar="ROWS",
                help="show so many rows (default: 1) as the model gets them, with what is trained, and stop; needs no "
                "weights",
            )
        if verb == "score":
            sub.add_argument(
                "--output",
                metavar="FILE.json",
                help="file of the scores (default: scores.json in train.output_dir); the plot is FILE.png",
            )
            sub.add_argument(
                "--metric",
                metavar="LIST",
                help="what to measure and show: values of sampling.importance, with commas between them (default: what "
                "the recipe's importance needs). FILE.json holds the metric that the recipe's importance needs, or the "
                "first one; where several are measured, each is also in FILE-METRIC.json",
            )
        if verb == "launch":
            sub.add_argument("--slurm", metavar="CLUSTER.yaml", help="the cluster, and what the job takes of it")
            sub.add_argument("--dry-run", action="store_true", help="check and print the script; submit nothing")
        _add_recipe(sub)
        verbs.add_subcommand(verb, sub, help=VERBS[verb])
    sub = parser("ows-ds export RUN_DIR OUT_DIR [--checkpoint step-N]", _sentence(VERBS["export"]))
    # Not required for the parser, so that the message about a missing one is ours.
    sub.add_argument("run_dir", metavar="RUN_DIR", nargs="?", help="folder of the run (its train.output_dir)")
    sub.add_argument("out_dir", metavar="OUT_DIR", nargs="?", help="folder to write; made if it is missing")
    sub.add_argument("--checkpoint", metavar="step-N", help="checkpoint to export (default: the newest complete one)")
    verbs.add_subcommand("export", sub, help=VERBS["export"])
    sub = parser("ows-ds eval MODEL (--tasks LIST | --mt-bench FILE) [options]", _sentence(VERBS["eval"]))
    sub.add_argument("model", metavar="MODEL", nargs="?", help="folder of a run or of a model, or a name on the hub")
    _add_fields(sub, Evaluation, MTBench)
    verbs.add_subcommand("eval", sub, help=VERBS["eval"])
    sub = parser("ows-ds report RUN_DIR [RUN_DIR ...] [--output FILE.html]", _sentence(VERBS["report"]))
    sub.add_argument("run_dir", metavar="RUN_DIR", nargs="*", help="folder of a run (its train.output_dir)")
    sub.add_argument(
        "--output", metavar="FILE.html", help="the page (default: report.html in the first folder); it needs no network"
    )
    verbs.add_subcommand("report", sub, help=VERBS["report"])
    sub = parser(
        "ows-ds plan --model.path MODEL [--cluster CLUSTER] [options]",
        f"{_sentence(VERBS['plan'])} The model needs no weights: a folder with a config.json, or a name such as "
        f"{next(iter(SHAPES))}. Every key of the recipe is an option here, and wins over the file.",
    )
    sub.add_argument("--config", metavar="RECIPE.yaml", help="recipe; its sections and keys are those below")
    sub.add_argument(
        "--cluster",
        metavar="CLUSTER",
        help=f"nodes x GPUs of a node, such as 4x8xH100 (of {', '.join(GPUS)}), or a YAML file of the keys below "
        "(default: 8xA100-80)",
    )
    sub.add_argument("--methods", metavar="LIST", help="values of method.name to compare with, with commas")
    sub.add_argument(
        "--output",
        metavar="DIR",
        help="folder of a recipe, a DeepSpeed file, plan.json and scaling.png; nothing in it is written over",
    )
    sub.add_argument(
        "--choose", metavar="WHICH", help="of what fits, the recipe that is written: cheapest (the default) or fastest"
    )
    sub.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    group = sub.add_argument_group("cluster", "What the options change of --cluster.")
    for name, more in _options(Cluster):
        group.add_argument(option(name), **{**more, "help": re.sub(r"; default: [^)]*\)$", ")", more["help"])})
    _add_recipe(sub)
    verbs.add_subcommand("plan", sub, help=VERBS["plan"])
    sub = parser("ows-ds bench WHAT [options]", _sentence(VERBS["bench"]))
    verbs.add_subcommand("bench", sub, help=VERBS["bench"])
    benches = sub.add_subcommands(
        dest="bench",
        metavar="WHAT",
        title="what",
        description="`ows-ds bench WHAT --help` lists the options of each.",
    )
    sub = parser("ows-ds bench quality --config STUDY.yaml --output DIR [options]", _sentence(BENCHES["quality"]))
    sub.add_argument("--config", metavar="STUDY.yaml", help="study: recipe, variants, seeds (docs/bench.md)")
    sub.add_argument("--output", metavar="DIR", help="folder of the runs and the report; a study in it is gone on with")
    sub.add_argument("--seeds", metavar="LIST", help="seeds to run now, such as 0,1; the first always (default: all)")
    sub.add_argument("--variants", metavar="LIST", help="variants to run now, with commas (default: all)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    benches.add_subcommand("quality", sub, help=BENCHES["quality"])
    for name in ("time", "memory", "traffic"):
        sub = parser(f"ows-ds bench {name} [options]", _sentence(BENCHES[name]))
        _add_fields(sub, Setting, How)
        benches.add_subcommand(name, sub, help=BENCHES[name])
    return top


def _add_recipe(parser: "ArgumentParser") -> None:
    """One option per key of the recipe, with the type, default and documentation of its dataclass."""
    for section, kind in config.SECTIONS.items():
        group = parser.add_argument_group(section, summary(kind))
        for name, more in _options(kind):
            group.add_argument(f"--{section}.{name}", **more)


def _add_fields(parser: "ArgumentParser", *kinds: type) -> None:
    """One option per field of the dataclasses; those of eval also as lm-evaluation-harness spells them."""
    for kind in kinds:
        group = parser.add_argument_group(summary(kind).rstrip("."))
        for name, more in _options(kind):
            if more["type"] is bool:
                more = {"action": "store_true", "help": more["help"].rpartition(" (")[0]}
            names = (option(name), f"--{name}") if kind in (Evaluation, MTBench) else (option(name),)
            group.add_argument(*dict.fromkeys(names), **more)


def _options(kind: type) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each field of a dataclass: its name, and type and help of its option."""
    for key in keys(kind):
        choices = get_origin(key.hint) is Literal
        long = len(key.type) > 60  # choices that do not fit on the option's own line are told in the text
        facts = [key.type] if long or not choices else []
        facts += [] if key.default is None else [f"default: {key.default}"]
        metavar = {} if key.hint is bool or (choices and not long) else {"metavar": _metavar(key)}
        help = f"{key.text.rstrip('.')} ({'; '.join(facts)})"
        # a list of sources is read by `config.convert`
        given: Any = str | list[Any] | None if key.hint == config.SOURCES else key.hint
        yield key.name, {"type": given, "default": None, "help": help, **metavar}


def _metavar(key: Key) -> str:
    """What stands for the value of an option: N, X, LIST, or the last word of its name."""
    first = key.type.removesuffix(" or null")
    words = {"an integer": "N", "a number": "X"}
    return words.get(first, "LIST" if first.startswith("a list") else key.name.rpartition("_")[2].upper())


def _verbs_hints(argv: Sequence[str]) -> dict[str, Any]:
    """Types of the options of a bench, or of eval, by their names."""
    if argv[:2] == ["bench", "quality"]:
        return dict.fromkeys(("config", "output", "seeds", "variants"), str)
    kinds = (Evaluation, MTBench) if argv[0] == "eval" else (Setting, How)
    return {option(name)[2:]: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}


def _in_one_line(message: str, argv: Sequence[str]) -> UserError:
    """What jsonargparse found wrong in `argv`, as an error that names key, value and what would be right."""
    hints = _verbs_hints(argv) if argv[:1] in (["bench"], ["eval"]) else config.hints() | {"preview": int}
    if argv[:1] == ["plan"]:
        hints |= {option(name)[2:]: hint for name, hint in typing.get_type_hints(Cluster).items()}
    if found := re.match(r'Parser key "([^"]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL):
        key, value = found.groups()
        key = key if key in hints else key.replace("_", "-")
        return UserError(key, value, config.instruction(hints[key]) if key in hints else message)
    if found := re.match(r"argument (?:--)?([\w.-]+)\S*: expected one argument", message):
        key = found[1]
        return UserError(key, "", config.instruction(hints[key]) if key in hints else "expected a value after it")
    if found := re.match(r"unrecognized arguments: (--)?([^\s=]+)(?:[\s=](.*))?", message, re.DOTALL):
        dashes, word, rest = found.groups()
        if dashes:
            return config.unknown(word, rest or "", list(hints))
        return UserError("arguments", word, "settings are given as --section.key value")
    if found := re.match(r"argument VERB: invalid choice: '([^']*)'", message):
        return UserError("VERB", found[1], f"expected one of {', '.join(VERBS)}")
    if found := re.match(r"""argument WHAT: invalid choice: '([^']*)'|expected "bench""", message):
        return UserError("bench WHAT", found[1], f"expected one of {', '.join(BENCHES)}")
    if message.startswith('expected "verb"'):
        return UserError("VERB", None, f"expected one of {', '.join(VERBS)}")
    return UserError("arguments", "the command line", message)
