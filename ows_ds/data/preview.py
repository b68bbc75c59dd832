"""Shows what a run would train on: rows as the model gets them, and which of their tokens are trained."""

from __future__ import annotations

from itertools import groupby, islice
from typing import Any

from rich.console import Console
from rich.text import Text

from ows_ds.config import Recipe, sources
from ows_ds.data import prepare
from ows_ds.data.encoded import Encoded
from ows_ds.data.rows import stream
from ows_ds.errors import one_line
from ows_ds.model.pretrained import load_tokenizer

OPEN, CLOSE = "\u27e6", "\u27e7"  # around trained text, where there are no colours


def preview(recipe: Recipe, count: int) -> None:
    """Print the first ``count`` rows of `data.train`, and how many there are. No model is loaded, nothing trained.

    Raises UserError as a run would for its data.
    """
    tokenizer, data = load_tokenizer(recipe), recipe.data
    given = sources(data, "data.train")
    if data.streaming:
        first = [list(islice(stream(source, "data.train", 0), data.buffer_size)) for source in given]
        rows, counts = prepare.block(data, tokenizer, given, first)
    else:
        rows, counts = prepare.prepare(data, tokenizer, given, "data.train")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for source, part in zip(given, rows.parts, strict=False):  # without weights all sources are one part
        for number, row in enumerate(islice(part, count), start=1):
            name = one_line(source.path) if len(rows.parts) > 1 else "data.train"
            console.print(f"{name}, row {number}: {len(row)} tokens, {row.targets} of them trained")
            console.print(marked(row, tokenizer, console.is_terminal))
    console.print(f"data.train: {counts.line(data.max_length)}" + (", in the first block" if data.streaming else ""))
    if rows.packed:
        full = counts.tokens / (len(rows) * data.max_length)
        console.print(f"packed: {len(rows):,} sequences of at most {data.max_length} tokens, {full:.0%} full")


def marked(row: Encoded, tokenizer: Any, colours: bool) -> Text:
    """The text of a row with its special tokens; trained text is green and the rest dim, or else it is in brackets."""
    text = Text()
    pairs = zip(row.input_ids.tolist(), row.trained.tolist(), strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1]):
        words = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        # a row must not steer the terminal
        words = "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in words)
        if colours:
            text.append(words, "bold green" if trained else "dim")
        else:
            text.append(f"{OPEN}{words}{CLOSE}" if trained else words)
    return text
