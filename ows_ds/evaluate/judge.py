"""A model behind an OpenAI-compatible address marks answers, one at a time, from 1 to 10 (FastChat's single mode).

    model_judgment/J_single.jsonl   {"question_id", "model", "judge": [J, prompt], "user_prompt", "judgment", "score",
                                     "turn", "tstamp"}

A judgment is written as soon as it is there, and asked for once: a line with the same prompt counts. Score -1: the
judge gave no mark; it is asked again next time and is in no mean.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import string
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ows_ds.errors import UserError, first_line
from ows_ds.evaluate.mt_bench import REFERENCED, Line, lines_of
from ows_ds.evaluate.setting import MTBench
from ows_ds.runs.results import Score

MARK = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))  # FastChat's
LONGEST = 2048  # tokens of a judgment
SECONDS = 300  # until an answer of the judge counts as lost
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that may pass
_RATE = (
    "Judge how good the assistant's {what} below is: whether it does what was asked, is right and relevant, goes deep "
    "enough, and is worded well. Length alone is no merit. {reference}First explain your judgment in a few sentences. "
    'Then give a mark from 1 (useless) to 10 (excellent) in double brackets, in exactly this form: "Rating: [[5]]".'
)
_REFERENCE = "Compare it with the reference answer first, and name each mistake. "
_ONE = "[Question]\n{question}\n\n%s[The assistant's answer]\n{answer}\n\n[End]"
_TWO = (
    "[First question]\n{question_1}\n\n%s[The assistant's first answer]\n{answer_1}\n\n"
    "[Second question]\n{question_2}\n\n%s[The assistant's second answer]\n{answer_2}\n\n[End]"
)
_GIVEN = "[Reference answer to the {}question]\n{{ref_answer_{}}}\n\n"


@dataclass(frozen=True)
class Prompt:
    """What the judge is told. text: with fields of its kind (`FIELDS`)."""

    name: str
    system: str
    text: str


# (turn, with a reference answer) -> what a prompt's text holds
FIELDS = {
    (1, False): {"question", "answer"},
    (1, True): {"question", "answer", "ref_answer_1"},
    (2, False): {"question_1", "question_2", "answer_1", "answer_2"},
    (2, True): {"question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2"},
}
Prompts = Mapping[tuple[int, bool], Prompt]


def _own(turn: int, reference: bool) -> Prompt:
    name = "ows" + ("-reference" if reference else "") + ("-multi-turn" if turn == 2 else "")
    what = "answer" if turn == 1 else "answer to the second question"
    system = "You judge the answers of AI assistants, strictly and without favour."
    given = [_GIVEN.format(word, number) if reference else "" for word, number in (("first ", 1), ("second ", 2))]
    text = _ONE % given[0].replace("first ", "") if turn == 1 else _TWO % tuple(given)
    return Prompt(name, system, f"{_RATE.format(what=what, reference=_REFERENCE if reference else '')}\n\n{text}")


OURS: Prompts = {kind: _own(*kind) for kind in FIELDS}


def prompts(path: str | None) -> Prompts:
    """Those of a file in FastChat's form, or ours. Raises UserError (``--judge-prompts``) where one is missing."""
    if path is None:
        return OURS
    found: dict[tuple[int, bool], Prompt] = {}
    for row in lines_of(path, "--judge-prompts"):
        if row.get("type") != "single" or row.get("output_format") != "[[rating]]":
            continue
        match row:
            case {"name": str() as name, "system_prompt": str() as system, "prompt_template": str() as text}:
                try:
                    fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
                except ValueError:
                    fields = set()
                kind = next((kind for kind, needed in FIELDS.items() if needed == fields), None)
                if kind is None:
                    known = " or ".join(", ".join(sorted(needed)) for needed in FIELDS.values())
                    raise UserError("--judge-prompts", name, f"expected it the fields {known}")
                found.setdefault(kind, Prompt(name, system, text))
    for turn, reference in FIELDS:
        if (turn, reference) not in found:
            what = f"turn {turn}" + (" with a reference answer" if reference else "")
            raise UserError("--judge-prompts", path, f"expected a prompt of type single for {what}")
    return found


class Judge:
    """Where it can be asked."""

    def __init__(self, bench: MTBench) -> None:
        try:
            import requests
            from requests.adapters import HTTPAdapter
            from urllib3.util import Retry
        except ImportError as error:
            right = f"install them: pip install 'ows_ds[eval]' ({error})"
            raise UserError("--judge", "without its packages", right) from error
        address = str(bench.judge).rstrip("/")
        if not address.endswith("/chat/completions"):
            address += "/chat/completions" if re.search(r"/v\d+$", address) else "/v1/chat/completions"
        self.given, self.address, self.name = bench.judge, address, str(bench.judge_model)
        retry = Retry(
            total=bench.judge_retries, status_forcelist=AGAIN, allowed_methods=None, backoff_factor=1.0,
            backoff_max=60.0, raise_on_status=False, respect_retry_after_header=True,
        )  # fmt: skip
        self.failures = requests.RequestException
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=bench.judge_parallel))
        key = os.environ.get(bench.judge_key)
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"

    def ask(self, system: str, text: str) -> str:
        """What it says. Raises UserError (``--judge``) where it does not, for good."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        payload: Any = {"model": self.name, "messages": messages, "temperature": 0, "max_tokens": LONGEST, "n": 1}
        try:
            reply = self.session.post(self.address, json=payload, timeout=SECONDS)
        except self.failures as error:
            raise self._refuse(f"it does not answer: {first_line(error)}") from error
        if reply.status_code != 200:
            raise self._refuse(f"it says {reply.status_code}: {' '.join(reply.text.split())[:300]}")
        try:
            said = reply.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise self._refuse("its answer has no choices[0].message.content") from error
        return said if isinstance(said, str) else ""

    def _refuse(self, why: str) -> UserError:
        return UserError("--judge", self.given, f"expected the address of a judge that answers ({why})")


def mark(judgment: str) -> float:
    """The mark in a judgment; -1 where there is none."""
    for pattern in MARK:
        if found := pattern.search(judgment):
            return float(found[1])
    return -1


def _questions_to_judge(
    asked: Sequence[Line], answers: Mapping[Any, Sequence[str]], given: Mapping[Any, Sequence[str]], using: Prompts
) -> Iterator[tuple[Line, int, Prompt, str]]:
    """(question, turn, prompt, its text) of all turns; references only where the category asks for them."""
    for turn in (1, 2):
        for one in asked:
            if len(one["turns"]) < turn:
                continue
            said = answers[one["question_id"]]
            reference = given.get(one["question_id"]) if one["category"] in REFERENCED else None
            prompt = using[turn, reference is not None]
            numbered = {f"question_{i}": text for i, text in enumerate(one["turns"], 1)}
            numbered |= {f"answer_{i}": text for i, text in enumerate(said, 1)}
            numbered |= {f"ref_answer_{i}": text for i, text in enumerate(reference or (), 1)}
            yield one, turn, prompt, prompt.text.format(question=one["turns"][0], answer=said[0], **numbered)


def judge(
    asked: Sequence[Line],
    answers: Mapping[Any, Sequence[str]],
    given: Mapping[Any, Sequence[str]],
    using: Prompts,
    bench: MTBench,
    name: str,
    path: Path,
    tell: Callable[[str], None],
) -> list[Line]:
    """The judgments of all turns, those that stand in ``path`` already included; new ones are added to it.

    answers, given: turns by question: those of the model called ``name``, and of a reference. tell: of the progress.
    Raises UserError (``--judge``) where the judge does not answer; what it has said until then is kept.
    """
    one = Judge(bench)
    known: dict[tuple[Any, ...], Line] = {}
    if path.exists():
        for line in lines_of(str(path), "--output"):
            known[_key(line)] = line
    found: list[Line] = []
    new: list[tuple[Line, int, Prompt, str]] = []
    for item in _questions_to_judge(asked, answers, given, using):
        question, turn, prompt, text = item
        before = known.get((question["question_id"], name, one.name, prompt.name, turn, text))
        if before is not None and before.get("score") != -1:
            found.append(before)
        else:
            new.append(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, end = threading.Lock(), threading.Event()

    def ask(item: tuple[Line, int, Prompt, str]) -> Line | None:
        question, turn, prompt, text = item
        if end.is_set():
            return None
        try:
            said = one.ask(prompt.system, text)
        except BaseException:
            end.set()
            raise
        line = {
            "question_id": question["question_id"], "model": name, "judge": [one.name, prompt.name],
            "user_prompt": text, "judgment": said, "score": mark(said), "turn": turn, "tstamp": time.time(),
        }  # fmt: skip
        with lock, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    if new:
        tell(f"{one.name}: {len(new)} judgments to ask for" + (f", {len(found)} are there" if found else ""))
    with ThreadPoolExecutor(bench.judge_parallel) as pool:
        found += [line for line in pool.map(ask, new) if line is not None]
    return found


def _key(line: Line) -> tuple[Any, ...]:
    who = line.get("judge")
    names = who if isinstance(who, list) and len(who) == 2 else [None, None]
    return line.get("question_id"), line.get("model"), *map(str, names), line.get("turn"), line.get("user_prompt")


def scores(asked: Sequence[Line], judgments: Sequence[Line]) -> list[Score]:
    """Means of the marks: of all turns, of each turn, and of each category."""
    category = {one["question_id"]: one["category"] for one in asked}
    marks = [(line["turn"], category[line["question_id"]], float(line["score"])) for line in judgments]
    found = [_mean("mt_bench", "rating", [value for _, _, value in marks], 0)]
    for turn in sorted({turn for turn, _, _ in marks}):
        found.append(_mean("mt_bench", f"rating (turn {turn})", [v for t, _, v in marks if t == turn], 0))
    for name in dict.fromkeys(category.values()):
        found.append(_mean(f"mt_bench {name}", "rating", [v for _, c, v in marks if c == name], 1))
    return found


def _mean(task: str, metric: str, marks: Sequence[float], depth: int) -> Score:
    """Marks of -1 are none."""
    given = [value for value in marks if value != -1]
    error = statistics.stdev(given) / len(given) ** 0.5 if len(given) > 1 else None
    return Score(task, metric, statistics.fmean(given) if given else None, error, 0, len(given), depth)
