"""A model behind an OpenAI-compatible address marks answers, one at a time, from 1 to 10 (FastChat's single mode).

    model_judgment/J_single.jsonl   {"question_id", "model", "judge": [J, prompt], "user_prompt", "judgment", "score",
                                     "turn", "tstamp"}

A judgment is written as soon as it is there. A line with the same prompt is not asked for again, unless its score is
-1: then the judge gave no mark, and no mean counts it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
import string
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ows_ds.errors import UserError, first_line, one_line
from ows_ds.evaluate.mt_bench import REFERENCED, Line, lines_of
from ows_ds.evaluate.setting import MTBench
from ows_ds.runs.results import Score

logger = logging.getLogger(__name__)
MARK = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))  # FastChat's
MAX_TOKENS = 2048  # of a judgment
TIMEOUT = 300  # seconds until an answer of the judge counts as lost
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that may pass
OURS = Path(__file__).with_name("judge_prompts.jsonl")


class Prompt(NamedTuple):
    """What the judge is asked. text: with the fields of its kind (`FIELDS`)."""

    name: str
    system: str
    text: str


# (turn, with a reference answer) -> fields of the prompt's text
FIELDS = {
    (1, False): {"question", "answer"},
    (1, True): {"question", "answer", "ref_answer_1"},
    (2, False): {"question_1", "question_2", "answer_1", "answer_2"},
    (2, True): {"question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2"},
}
Prompts = Mapping[tuple[int, bool], Prompt]


def prompts(path: str) -> Prompts:
    """Those of a file in FastChat's form. Raises UserError (``--judge-prompts``) where one is missing."""
    found: dict[tuple[int, bool], Prompt] = {}
    for row in lines_of(path, "--judge-prompts"):
        match row:
            case {
                "type": "single", "output_format": "[[rating]]",
                "name": str() as name, "system_prompt": str() as system, "prompt_template": str() as text,
            }:  # fmt: skip
                try:
                    fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
                except ValueError:
                    fields = set()
                kind = next((kind for kind, needed in FIELDS.items() if needed == fields), None)
                if kind is None:
                    known = " or ".join(", ".join(sorted(needed)) for needed in FIELDS.values())
                    raise UserError("--judge-prompts", name, f"expected it to have the fields {known}")
                found.setdefault(kind, Prompt(name, system, text))
    for turn, reference in FIELDS:
        if (turn, reference) not in found:
            what = f"turn {turn}" + (" with a reference answer" if reference else "")
            raise UserError("--judge-prompts", path, f"expected a prompt of type single for {what}")
    return found


class Judge:
    """A judge's address, name and prompts."""

    def __init__(self, bench: MTBench) -> None:
        """Raises UserError for prompts that are missing, and where requests is not installed."""
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
        self.prompts, self.parallel = prompts(bench.judge_prompts or str(OURS)), bench.judge_parallel
        retry = Retry(
            total=bench.judge_retries, status_forcelist=RETRIED, allowed_methods=None, backoff_factor=1.0,
            backoff_max=60.0, raise_on_status=False, respect_retry_after_header=True,
        )  # fmt: skip
        self.failures = requests.RequestException
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=self.parallel))
        if key := os.environ.get(bench.judge_key):
            self.session.headers["Authorization"] = f"Bearer {key}"

    def requests(
        self,
        asked: Sequence[Line],
        answers: Mapping[Any, Sequence[str]],
        references: Mapping[Any, Sequence[str]],
        model: str,
    ) -> Iterator[tuple[str, Line]]:
        """(system prompt, the judgment's line as far as it is known) of all turns.

        answers, references: turns by question; answers are those of ``model``. References are used only where the
        category asks for them.
        """
        for turn in (1, 2):
            for question in (one for one in asked if len(one["turns"]) >= turn):
                name = question["question_id"]
                reference = references.get(name) if question["category"] in REFERENCED else None
                prompt = self.prompts[turn, reference is not None]
                given = {"question": question["turns"], "answer": answers[name], "ref_answer": reference or ()}
                fields = {f"{field}_{i}": text for field, texts in given.items() for i, text in enumerate(texts, 1)}
                text = prompt.text.format(question=fields["question_1"], answer=fields["answer_1"], **fields)
                who = {"question_id": name, "model": model, "judge": [self.name, prompt.name]}
                yield prompt.system, {**who, "turn": turn, "user_prompt": text}

    def judge(self, requests: Iterable[tuple[str, Line]], path: Path) -> list[Line]:
        """The judgments: those in the file ``path``, and new ones, which are added to it.

        Raises UserError (``--judge``) where the judge does not answer; what it has answered until then is kept.
        """
        known = {_key(line): line for line in (lines_of(str(path), "--output") if path.exists() else ())}
        found: list[Line] = []
        new: list[tuple[str, Line]] = []
        for system, line in requests:
            before = known.get(_key(line))
            if before is None or before.get("score") == -1:
                new.append((system, line))
            else:
                found.append(before)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock, failed = threading.Lock(), threading.Event()

        def complete(request: tuple[str, Line]) -> Line | None:
            system, line = request
            if failed.is_set():
                return None
            try:
                judgment = self._ask(system, line["user_prompt"])
            except BaseException:
                failed.set()
                raise
            line |= {"judgment": judgment, "score": mark(judgment), "tstamp": time.time()}
            with lock, path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            return line

        if new:
            there = f", {len(found)} are there" if found else ""
            logger.info(one_line(f"{self.name}: {len(new)} judgments to ask for{there}"))
        with ThreadPoolExecutor(self.parallel) as pool:
            return found + [line for line in pool.map(complete, new) if line is not None]

    def _ask(self, system: str, text: str) -> str:
        """What it answers. Raises UserError (``--judge``) where all tries fail."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        payload: Any = {"model": self.name, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "n": 1}
        try:
            reply = self.session.post(self.address, json=payload, timeout=TIMEOUT)
        except self.failures as error:
            raise self._refuse(f"it does not answer: {first_line(error)}") from error
        if reply.status_code != 200:
            raise self._refuse(f"it says {reply.status_code}: {' '.join(reply.text.split())[:300]}")
        try:
            answer = reply.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise self._refuse("its answer has no choices[0].message.content") from error
        return answer if isinstance(answer, str) else ""

    def _refuse(self, why: str) -> UserError:
        return UserError("--judge", self.given, f"expected the address of a judge that answers ({why})")


def mark(judgment: str) -> float:
    """The mark in a judgment; -1 where there is none."""
    found = next(filter(None, (pattern.search(judgment) for pattern in MARK)), None)
    return -1 if found is None else float(found[1])


def _key(line: Line) -> tuple[Any, ...]:
    return line.get("question_id"), line.get("model"), str(line.get("judge")), line.get("turn"), line.get("user_prompt")


def scores(asked: Sequence[Line], judgments: Sequence[Line]) -> list[Score]:
    """Means of the marks: of all turns, of each turn, and of each category."""
    categories = {one["question_id"]: one["category"] for one in asked}
    marks = [(line["turn"], categories[line["question_id"]], float(line["score"])) for line in judgments]

    def mean(task: str, metric: str, depth: int, turn: int | None = None, category: str | None = None) -> Score:
        some = [value for t, c, value in marks if value != -1 and turn in (None, t) and category in (None, c)]
        error = statistics.stdev(some) / len(some) ** 0.5 if len(some) > 1 else None
        return Score(task, metric, statistics.fmean(some) if some else None, error, 0, len(some), depth)

    return [
        mean("mt_bench", "rating", 0),
        *(mean("mt_bench", f"rating (turn {turn})", 0, turn=turn) for turn in sorted({turn for turn, _, _ in marks})),
        *(mean(f"mt_bench {name}", "rating", 1, category=name) for name in dict.fromkeys(categories.values())),
    ]
