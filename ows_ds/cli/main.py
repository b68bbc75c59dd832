"""The command line: verbs, exit codes.

0: done. 2: mistakes of the user, each shown on one line on standard error. 75: stopped by a signal, with all that was
done saved: the same command resumes. 1: anything else, with its traceback, or with the first cause on the last line
where several ranks end together.

Each verb is a module of this package with ``parser()`` and ``run(options, argv)``, imported when it is called; so is
what does the work, so that ``--help`` and mistakes answer at once.
"""

import contextlib
import importlib
import os
import platform
import sys
import traceback
from collections.abc import Sequence

import ows_ds
from ows_ds.distributed.logs import show_log
from ows_ds.errors import Failed, UserError

VERBS = {
    "train": "fine-tune a model; the main job",
    "score": "write the layers' importance (scores.json) and a plot of it",
    "export": "write a Hugging Face checkpoint from a run",
    "eval": "score a run or a model on benchmarks, beside its base where asked for",
    "bench": "compare methods side by side",
    "launch": "check a job, and hand it to SLURM",
    "plan": "tell memory, traffic and time on a cluster before anything runs",
    "report": "write a page about a run, or about several side by side",
    "convert": "make a recipe of one of LLaMA-Factory, axolotl, TRL or LMFlow",
    "recipes": "list the recipes and launcher files that come along, and copy them",
    "chat": "talk to a trained model, its base beside it where asked for",
    "push": "upload a run's model, with its card, to the hub",
    "completion": "print what makes a shell complete verbs and options",
    "schema": "write the JSON schema of a recipe, for editors",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb with `argv` (default: the process's own) and return the exit code.

    SystemExit, which --help raises, passes through.
    """
    words = _without_local_rank(list(sys.argv[1:] if argv is None else argv))
    show_log(to_stderr=words[:1] in (["eval"], ["bench"], ["plan"]))
    try:
        _run(words)
    except BrokenPipeError:  # who reads it, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        _leave_group(argv)
        print(*(f"ows-ds: error: {one}" for one in error.errors), sep="\n", file=sys.stderr, flush=True)
        return 2
    except Failed as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        sys.stdout.flush()  # where both go to one file, this is the last line
        print(f"ows-ds: failed: {error}", file=sys.stderr, flush=True)
        if argv is None:
            # not the interpreter's end: process groups would wait for processes that are no more, and talk of it
            os._exit(1)
        return 1
    except Exception as error:
        from ows_ds.distributed import signals

        if isinstance(error, signals.Stopped):
            signals.ignore()
            _leave_group(argv)
            return signals.EXIT_CODE
        traceback.print_exc()
        return 1
    _leave_group(argv)
    return 0


def _leave_group(argv: Sequence[str] | None) -> None:
    """At the end of a program on which all ranks agree: what is left to the interpreter's end may warn, wait or abort.

    Not where a caller has given ``argv``, whose process group it may be.
    """
    if argv is None and "torch" in sys.modules:
        from ows_ds.distributed.communicator import leave

        leave()


def _run(argv: list[str]) -> None:
    if argv[:1] and argv[0] in VERBS:
        verb = importlib.import_module(f"ows_ds.cli.{argv[0]}")
        verb.run(verb.parser().read(argv[1:]), argv)
        return
    from ows_ds.cli.options import Parser

    top = Parser(
        "VERB [options]",
        "Fine-tune language models with outlier-weighed layerwise sampling (OWS).",
        "Exit status: 0 done; 2 mistakes in what was given, each shown on one line; 75 stopped by a signal, saved, the "
        "same command resumes; 1 anything else.",
    )
    top.add_choices("VERB", VERBS, "`ows-ds VERB --help` lists the options of a verb.")
    if argv == ["--version"]:
        print(_versions())
        return
    top.read_choice("VERB", VERBS, argv or ["--help"])


def _versions() -> str:
    """Of this program, and of what a report of a fault should name."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"ows_ds {ows_ds.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "deepspeed", "accelerate", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _without_local_rank(argv: list[str]) -> list[str]:
    """Drop the `--local_rank N` that DeepSpeed's launcher adds; the rank comes from the environment."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept
