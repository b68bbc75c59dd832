"""Questions of two turns and a model's answers, in the files of FastChat's llm_judge.

    question.jsonl        {"question_id", "category", "turns": [...], "reference": [...]}
    model_answer/M.jsonl  {"question_id", "answer_id", "model_id", "choices": [{"index", "turns"}], "tstamp"}

Temperatures, seeds and lengths are FastChat's (gen_model_answer.py).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ows_ds.data.encode import ALPACA
from ows_ds.distributed.launch import Runtime
from ows_ds.errors import UserError, first_line
from ows_ds.evaluate.setting import Evaluation, MTBench
from ows_ds.evaluate.subject import Subject
from ows_ds.files import parse_json
from ows_ds.model.generation import generate

Line = dict[str, Any]
TEMPERATURE = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
    "stem": 0.1, "humanities": 0.1, "arena-hard-200": 0.0,
}  # fmt: skip
DEFAULT_TEMPERATURE = 0.7
REFERENCED = ("math", "reasoning", "coding", "arena-hard-200")  # categories judged with a reference answer
TURNS = 2
MIN_NEW_TOKENS = 256  # room for an answer; a longer conversation loses its beginning


def lines_of(path: str, key: str) -> list[Line]:
    """The objects of a JSON Lines file. Raises UserError naming ``key``, with the line."""
    rows: list[Line] = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(key, path, f"expected a readable JSON Lines file ({first_line(error)})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(key, f"{path}:{number}", f"expected a JSON object on each line ({error})") from error
        if not isinstance(row, dict):
            raise UserError(key, f"{path}:{number}", "expected a JSON object on each line")
        rows.append(row)
    if not rows:
        raise UserError(key, path, "expected a file with at least one line")
    return rows


def questions(path: str) -> list[Line]:
    """The questions of a file. Raises UserError (``--mt-bench``) for one that is not valid."""
    key, rows = "--mt-bench", lines_of(path, "--mt-bench")
    seen = set()
    for row in rows:
        name, turns = row.get("question_id"), row.get("turns")
        if type(name) not in (int, str) or name in seen:
            raise UserError(key, name, "expected each question to have a question_id of its own, an integer or text")
        seen.add(name)
        if not _texts(turns) or len(turns) > TURNS:  # type: ignore[arg-type]
            raise UserError(key, f"question {name}", f"expected it to have turns, a list of one or {TURNS} texts")
        if not isinstance(row.get("category"), str):
            raise UserError(key, f"question {name}", "expected it to have a category, such as writing")
    return rows


def by_question(path: str, key: str, asked: Sequence[Line], needed: Iterable[Any]) -> dict[Any, list[str]]:
    """Turns of the first choice of each answer in a file, by question.

    needed: questions that must be in it. Raises UserError naming ``key`` where they are not, or have too few turns.
    """
    turns = {}
    for row in lines_of(path, key):
        match row:
            case {"question_id": int() | str() as name, "choices": [{"turns": list() as texts}, *_]} if _texts(texts):
                turns[name] = texts
            case _:
                raise UserError(key, path, "expected answers as FastChat writes them, with question_id and choices")
    lengths = {question["question_id"]: len(question["turns"]) for question in asked}
    for name in needed:
        if len(turns.get(name, ())) < lengths[name]:
            raise UserError(key, path, f"expected answers to all turns of question {name}")
    return turns


def references(path: str | None, asked: Sequence[Line]) -> Mapping[Any, list[str]]:
    """Reference answers of the questions that are judged with one: those of a file, or the questions' own."""
    needed = {one["question_id"]: one for one in asked if one["category"] in REFERENCED}
    if path is not None:
        return by_question(path, "--judge-references", asked, needed)
    own: dict[Any, Any] = {name: one.get("reference") for name, one in needed.items()}
    return {name: texts for name, texts in own.items() if _texts(texts) and len(texts) >= len(needed[name]["turns"])}


def template_of(tokenizer: Any, bench: MTBench, subject: Subject) -> str:
    """How questions are written: chat, plain or alpaca. Raises UserError where there is no chat template."""
    chat = bool(tokenizer.chat_template)
    if bench.template == "chat" and not chat:
        raise UserError("--template", "chat", "expected plain or alpaca: this model's tokenizer has no chat template")
    if bench.template != "auto":
        return bench.template
    given = "auto" if subject.recipe is None else subject.recipe.data.template
    return given if given in ("alpaca", "plain") else "chat" if chat else "plain"


def prompt(
    tokenizer: Any, template: str, asked: Sequence[str], answered: Sequence[str], system: str | None = None
) -> list[int]:
    """Tokens of a conversation up to where the next answer begins. asked: one more than answered. system: of a chat."""
    turns = list(zip(answered, asked[1:], strict=True))
    if template == "chat":
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": asked[0]})
        for answer, question in turns:
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if template == "alpaca":
        text = ALPACA.format(paired="", task=asked[0], more="")
        text += "".join(f"{a}\n\n### Instruction:\n{q}\n\n### Response:\n" for a, q in turns)
    else:
        text = f"{asked[0]}\n" + "".join(f"{a}\n{q}\n" for a, q in turns)
    return list(tokenizer(text)["input_ids"])


class Speaker:
    """A model that answers."""

    def __init__(self, path: str, subject: Subject, evaluation: Evaluation, bench: MTBench, runtime: Runtime) -> None:
        """Load it from ``path`` onto this rank's device."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = {"revision": subject.revision or "main", "trust_remote_code": evaluation.trust_remote_code}
        self.tokenizer = AutoTokenizer.from_pretrained(path, **source)
        self.template = template_of(self.tokenizer, bench, subject)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=evaluation.dtype,
            device_map="auto" if evaluation.parallelize else {"": str(runtime.device)},
            use_safetensors=True,  # other files would be unpickled
            **source,
        ).eval()
        self.max_new_tokens = bench.max_new_tokens
        self.positions = evaluation.max_length or getattr(self.model.config, "max_position_embeddings", None) or 2048

    def answer(self, question: Line, name: str) -> Line:
        """The line of its answer to all turns. name: of the model."""
        torch.manual_seed(0)  # the choice's index
        turns: list[str] = []
        for count in range(1, len(question["turns"]) + 1):
            tokens = prompt(self.tokenizer, self.template, question["turns"][:count], turns)
            room = max(self.positions - len(tokens), min(MIN_NEW_TOKENS, self.positions // 2))
            length = min(self.max_new_tokens, room)
            temperature = TEMPERATURE.get(question["category"], DEFAULT_TEMPERATURE)
            kept = tokens[-(self.positions - length) :]
            turns.append(generate(self.model, self.tokenizer, [kept], length, temperature)[0].strip())
        return {
            "question_id": question["question_id"],
            "answer_id": uuid.uuid4().hex,
            "model_id": name,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
