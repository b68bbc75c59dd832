"""Ask a model before and after training one held-out question. Plain transformers: nothing of ows_ds is needed.

python launch/answer.py BEFORE AFTER held_out.jsonl [--row 0] [--tokens 160]
"""

import argparse
import json
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def answer(folder: Path, question: str, tokens: int) -> str:
    """The greedy answer, at most `tokens` long, of the model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(DEVICE).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(DEVICE)
    output = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


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
    parser.add_argument("--row", type=int, default=0, help="which of them, from 0 (default: 0)")
    parser.add_argument("--tokens", type=int, default=160, help="longest answer, in tokens (default: 160)")
    chosen = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    row = json.loads(chosen.problems.read_text(encoding="utf-8").splitlines()[chosen.row])
    question = row["messages"][0]["content"]
    show("question", question)
    show("before", answer(chosen.before, question, chosen.tokens))
    show("after", answer(chosen.after, question, chosen.tokens))
    show("right answer", row["answer"])


if __name__ == "__main__":
    main()
