"""Ask a model before and after training held-out questions. Plain transformers: nothing of ows_ds is needed.

python launch/answer.py BEFORE AFTER held_out.jsonl [--rows 16] [--tokens 160]

Prints how many answers end in the form that was taught, "#### number", and how many of them are right; and the first
question with both answers.
"""

import argparse
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORM = re.compile(r"####\s*(-?[\d,]+(?:\.\d+)?)\s*$")


def answers(folder: Path, questions: list[str], tokens: int) -> list[str]:
    """The greedy answers, at most `tokens` long each, of the model in `folder`, all at once."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(DEVICE).eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True, tokenize=False)
        for one in questions
    ]
    prompts = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(DEVICE)
    output = model.generate(**prompts, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    made = output[:, prompts["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


def number(text: str) -> float | None:
    """What an answer ends with, in the form that was taught; None where it does not."""
    found = FORM.search(text)
    return None if found is None else float(found[1].replace(",", ""))


def show(title: str, text: str) -> None:
    """Print `text` wrapped and indented under `title`."""
    print(f"\n{title}")
    for line in text.splitlines():
        print(textwrap.fill(line, 100, initial_indent="    ", subsequent_indent="    "))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="folder of the model before training")
    parser.add_argument("after", type=Path, help="folder of the model after training")
    parser.add_argument("problems", type=Path, help="JSON Lines file of held-out problems")
    parser.add_argument("--rows", type=int, default=16, help="how many of them, the first ones (default: 16)")
    parser.add_argument("--tokens", type=int, default=160, help="longest answer, in tokens (default: 160)")
    chosen = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    rows = [json.loads(line) for line in chosen.problems.read_text(encoding="utf-8").splitlines()[: chosen.rows]]
    questions = [row["messages"][0]["content"] for row in rows]
    given = {name: answers(folder, questions, chosen.tokens) for name, folder in
             (("before", chosen.before), ("after", chosen.after))}  # fmt: skip
    show("question", questions[0])
    for name, texts in given.items():
        show(name, texts[0])
    show("right answer", rows[0]["answer"])
    print()
    for name, texts in given.items():
        found = [number(text) for text in texts]
        right = sum(one == float(row["answer"].replace(",", "")) for one, row in zip(found, rows, strict=True))
        formed = sum(one is not None for one in found)
        print(f"{name:7} {formed} of {len(rows)} answers end as taught (#### and a number), {right} are right")


if __name__ == "__main__":
    main()
