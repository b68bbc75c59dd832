"""A talk with a model on the terminal, its base beside it where asked for."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch

from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.launch import suppress_warnings
from ows_ds.errors import UserError
from ows_ds.evaluate import mt_bench
from ows_ds.evaluate.setting import Chat, Evaluation, MTBench, check
from ows_ds.evaluate.subject import Subject, base_of, find, on_disk, refusing
from ows_ds.tables import thinking

LEAVE, CLEAR = ("/exit", "/quit"), "/clear"


def chat(given: str, settings: Chat) -> None:
    """Answer messages from standard input, word by word, until it ends. Raises UserError."""
    suppress_warnings()
    evaluation = Evaluation(tasks="any", checkpoint=settings.checkpoint)
    check(given, evaluation, MTBench())
    subject = find(given, evaluation)
    if settings.compare and subject.run is None:
        raise UserError("--compare", True, "expected the folder of a run: only a run knows its base")
    subjects = [base_of(subject), subject] if settings.compare else [subject]
    with ExitStack() as stack:
        speakers = []
        for one in subjects:
            path = stack.enter_context(on_disk(one, Communicator()))
            with thinking(f"loading {one.name}"), refusing(one):
                speakers.append(Speaker(path, one, settings))
        if settings.prompt is not None:
            _say(speakers, settings.prompt)
            return
        _talk(speakers)


def _talk(speakers: list[Speaker]) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        names = " and ".join(one.subject.name for one in speakers)
        print(f"{names}: a line is a message; {CLEAR} forgets, {LEAVE[0]} or Ctrl-D leaves, Ctrl-C ends an answer")
    while True:
        try:
            message = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            print()
            return
        if message in LEAVE:
            return
        if message == CLEAR:
            for one in speakers:
                one.forget()
        elif message:
            _say(speakers, message)


def _say(speakers: list[Speaker], message: str) -> None:
    """Print each one's answer as it comes."""
    for one in speakers:
        if len(speakers) > 1:
            print(f"--- {one.subject.name}", flush=True)
        try:
            one.answer(message)
        except KeyboardInterrupt:
            print(" ...")


class Speaker:
    """A model, and what was said to it."""

    def __init__(self, path: str, subject: Subject, settings: Chat) -> None:
        """Load it from ``path``: onto the GPU, if there is one."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = {"revision": subject.revision or "main", "trust_remote_code": settings.trust_remote_code}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(path, **source)
        # other files than safetensors would be unpickled
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=settings.dtype, use_safetensors=True, **source)
        self.model: Any = loaded.to(device).eval()
        self.subject, self.settings = subject, settings
        self.template = mt_bench.template_of(self.tokenizer, MTBench(), subject)
        if settings.system and self.template != "chat":
            right = "leave it out: this model's tokenizer has no chat template"
            raise UserError("--system", settings.system, right)
        self.forget()

    def forget(self) -> None:
        """What was said."""
        self.asked: list[str] = []
        self.answers: list[str] = []

    @torch.no_grad()
    def answer(self, message: str) -> None:
        """Print the answer to ``message`` as it is generated, and keep it."""
        from transformers import TextStreamer

        kept: list[str] = []

        class Printing(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                kept.append(text)
                shown = "".join(
                    c if c == "\n" or c.isprintable() else "" for c in text
                )  # it must not steer the terminal
                print(shown, end="\n" if stream_end else "", flush=True)

        self.asked.append(message)
        tokens = mt_bench.prompt(self.tokenizer, self.template, self.asked, self.answers, self.settings.system)
        ids = torch.tensor([tokens], device=self.model.device)
        torch.manual_seed(self.settings.seed + len(self.asked))
        warm = self.settings.temperature > 0
        more = (
            {"temperature": self.settings.temperature} if warm else {"temperature": None, "top_p": None, "top_k": None}
        )
        try:
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.settings.max_new_tokens,
                do_sample=warm,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
                streamer=Printing(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **more,
            )
        finally:
            self.answers.append("".join(kept).strip())
