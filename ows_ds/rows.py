"""Files and data sets -> rows, every one verified.

A row is a dict of columns. The columns tell its format (`COLUMNS`); `data.py` writes it as text and tokens.
"""

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ows_ds.config import DATA_FILES, Data, is_file, parse_json
from ows_ds.errors import UserError, first_line

# A row is of the first format whose columns it has: Alpaca-GPT4 also has text, commonsense_170k also answer.
COLUMNS = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "multiple_choice": ("question", "choices", "answer"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
LETTERS = string.ascii_uppercase  # of the choices of a question
Row = dict[str, Any]


def load_rows(
    source: str | Path,
    format: str = "auto",
    key: str = "data.train",
    subset: str | None = None,
    split: str = "train",
) -> list[Row]:
    """The rows of a file or data set (`config.is_file` tells which), each verified.

    A file is JSON Lines (blank lines are skipped), a JSON list, Parquet or CSV (all columns text); it has no subsets,
    and of `split` only the slice matters. A data set is a folder or a name on the hub, as `datasets.load_dataset`
    takes it.

    Raises UserError naming `key` with file and line (or the number of the row, from 1) for a row that lacks the
    columns of `format`, `key` for what cannot be read, and `key` with _subset or _split for one that does not exist.
    """
    source = str(source)
    name, slice, _ = split.partition("[")
    rows: list[Row] = []
    for where, row in _file(source, key) if is_file(source) else _data_set(source, key, subset, split):
        wrong = _mistake(row, format) if isinstance(row, dict) else "give a JSON object, a column a key"
        if wrong:
            raise UserError(key, where, wrong)
        rows.append(row)
    if is_file(source) and slice:
        rows = [rows[i] for i in _taken(split, {name: len(rows)}, key)]
    if not rows:
        raise UserError(key, source, "give a file with at least one row")
    return rows


def fetch(data: Data, evaluation: bool) -> None:
    """Bring the data sets of `data.train` and, for `evaluation`, `data.eval` into the cache of the datasets library.

    One process does so before the others load them. Raises UserError as `load_rows` does.
    """
    wanted = [("data.train", data.train, data.train_subset)]
    wanted += [("data.eval", data.eval, data.eval_subset)] if evaluation else []
    for key, source, subset in wanted:
        if source is not None and not is_file(source):
            _splits(source, key, subset)


def _file(source: str, key: str) -> Iterator[tuple[str, Any]]:
    """Where it stands and what it is, of every row of a local file."""
    path = Path(source)
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif kind == ".csv":
            import pandas

            rows = pandas.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        else:
            text = path.read_text(encoding="utf-8")
            if kind != ".json" or not text.lstrip().startswith("["):  # many a .json is JSON Lines
                yield from _lines(source, text, key)
                return
            rows = parse_json(text)
    except UserError:
        raise
    except Exception as error:  # Arrow has kinds of its own
        kinds = {".parquet": "Parquet", ".csv": "CSV", ".json": "JSON"}
        right = f"give a readable {kinds.get(kind, 'JSON Lines')} file ({first_line(error)})"
        if kind not in DATA_FILES:
            right += f"; other formats are known by their names: {', '.join(DATA_FILES)}"
        raise UserError(key, source, right) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}: row {number}", row


def _lines(source: str, text: str, key: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{source}:{number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(key, where, f"give one JSON object a line ({getattr(error, 'msg', error)})") from error
            yield where, row


def _data_set(source: str, key: str, subset: str | None, split: str) -> Iterator[tuple[str, Row]]:
    """The same of the rows that `split` takes of a data set."""
    parts = _splits(source, key, subset)
    name = split.partition("[")[0]
    if name not in parts:
        raise UserError(f"{key}_split", split, f"give one of {', '.join(parts)}, or a part such as train[:1%]")
    taken = _taken(split, {name: len(parts[name])}, key)
    for number, row in zip(taken, parts[name].select(taken).to_list(), strict=True):
        yield f"{source} {name}: row {number + 1}", row


def _splits(source: str, key: str, subset: str | None) -> dict[str, Any]:
    """Every split of a data set, downloaded where it is not in the cache, by name."""
    import datasets

    try:
        return dict(datasets.load_dataset(source, subset))
    except Exception as error:  # a README.md and the files of a folder can be wrong in many ways
        reason = f"({error.__cause__ or error})"
        if isinstance(error, ValueError) and "config" in str(error).lower():  # the library's word for a subset
            raise UserError(f"{key}_subset", subset, f"give one that the data set has {reason}") from error
        right = "give a file that exists, or a data set on the hub that can be reached or is in the cache"
        raise UserError(key, source, f"{right} {reason}") from error


def _taken(split: str, lengths: dict[str, int], key: str) -> range:
    """Numbers of the rows, from 0, that a split such as train[:1%] takes of a part whose length is given by name."""
    from datasets import ReadInstruction

    try:
        [part] = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, ValueError) as error:
        right = f"give a split or a part of one, such as train[:1%] ({error})"
        raise UserError(f"{key}_split", split, right) from error
    taken = range(part.from_, part.to)
    if not taken:
        raise UserError(f"{key}_split", split, f"give a part with at least one of the {sum(lengths.values())} rows")
    return taken


def format_of(row: Row, format: str) -> str | None:
    """`format`, or under "auto" the first one whose columns the row has."""
    if format != "auto":
        return format
    return next((name for name, columns in COLUMNS.items() if all(c in row for c in columns)), None)


def _mistake(row: Row, format: str) -> str | None:
    """What would be right where a row does not fit its format; None where it does."""
    name = format_of(row, format)
    if name is None:
        return f"give the columns {' or '.join(', '.join(columns) for columns in COLUMNS.values())}"
    if name == "messages":
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            return "give messages as a list of at least one message"
        for message in messages:
            if not isinstance(message, dict) or not all(_is_text(message.get(k)) for k in ("role", "content")):
                return "give every message a role and a content, both text"
        return None
    texts = COLUMNS[name]
    if name == "alpaca" and row.get("input") is not None:
        texts = (*texts, "input")
    elif name == "multiple_choice":
        texts = ("question",)
        choices, answer = row.get("choices"), row.get("answer")
        if not (isinstance(choices, list) and 2 <= len(choices) <= 26 and all(map(_is_text, choices))):
            return "give choices as a list of 2 to 26 texts"
        if type(answer) is not int or not 0 <= answer < len(choices):
            return f"give answer as the number of the right choice, from 0 to {len(choices) - 1}"
    for column in texts:
        if not _is_text(row.get(column)):
            return f"give {column} as text"
    return None


def _is_text(value: Any) -> bool:
    """Whether a value is text that tokenizers take: JSON can also name halves of characters (\\ud83d)."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False
