"""Files and data sets -> rows, every one verified.

A row is a dict of columns, which show its format (`COLUMNS`); `encode.py` turns it into text and tokens.
"""

import csv
import hashlib
import io
import itertools
import string
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ows_ds.config import COMPRESSED, DATA_FILES, Data, Format, Source, data_suffix, is_file, sources
from ows_ds.data.encoded import PAIRED
from ows_ds.data.messages import BadChat, answers, is_text, read_chat
from ows_ds.errors import UserError, first_line
from ows_ds.files import parse_json

# A row is of the first format whose columns it has: Alpaca-GPT4 also has text, commonsense_170k also answer.
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "multiple_choice": ("question", "choices", "answer"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
}
LETTERS = string.ascii_uppercase  # of the choices of a question
DELIMITERS = {".csv": ",", ".tsv": "\t"}
AT_ONCE = 1000  # rows that are converted from Arrow at once
Row = dict[str, Any]
Found = tuple[str, Row | UserError]
"""The place of a row (file:line, or file: row number, from 1) and the row, or its mistake."""


def load_rows(
    source: str | Path,
    format: Format = "auto",
    key: str = "data.train",
    subset: str | None = None,
    split: str = "train",
    on_bad_row: str = "stop",
) -> list[Row]:
    """All rows of a file or data set, in order. Raises UserError as `read` does, and for the first bad row unless
    ``on_bad_row`` is skip."""
    rows = []
    for _, row in read(Source(path=str(source), subset=subset, split=split, format=format), key):
        if not isinstance(row, UserError):
            rows.append(row)
        elif on_bad_row == "stop":
            raise row
    return rows


def read(source: Source, key: str) -> Iterator[Found]:
    """The rows of a file or data set (`config.is_file` decides which), each verified, read lazily.

    A file is JSON Lines (blank lines are skipped), a JSON list, Parquet, CSV or TSV (all columns text), also
    compressed; it has no subsets, and of the split only the slice matters. The same holds for a folder that
    `Dataset.save_to_disk` wrote. Any other data set is a folder or a name on the hub, as `datasets.load_dataset` takes
    it.

    A row that does not fit ``source.format`` is a UserError: of ``key``, with its place and what is expected.
    Raises UserError naming ``key`` for what cannot be read or has no row, and ``key`` with _subset or _split for one
    that does not exist.
    """
    split = source.split or "train"
    if not is_file(source.path):
        found = _data_set(source, key, split)
    elif split.partition("[")[2]:
        rows = list(_file(source.path, key))
        found = (rows[i] for i in _taken(split, {_name(split): len(rows)}, key))
    else:
        found = _file(source.path, key)
    yield from _verified(found, source, key)


def stream(source: Source, key: str, start: int) -> Iterator[Found]:
    """As `read`, from row number ``start`` (from 0), without a copy of a remote data set on disk. No slices."""
    if is_file(source.path) or _saved(source.path):
        yield from itertools.islice(read(source, key), start, None)
        return
    import datasets

    split = source.split or "train"
    try:
        parts = datasets.load_dataset(source.path, source.subset, streaming=True)
    except Exception as error:
        raise _unreachable(source, key, error) from error
    if split not in parts:
        raise UserError(f"{key}_split", split, f"expected one of {', '.join(parts)}")
    rows = ((f"{source.path} {split}: row {i}", row) for i, row in enumerate(parts[split].skip(start), start + 1))
    yield from _verified(rows, source, key, start)


def fetch(data: Data, evaluation: bool) -> None:
    """Download the data sets of `data.train` and, for `evaluation`, `data.eval` into the cache of the datasets library.

    One rank does so before the others load them. Raises UserError as `read` does.
    """
    for key in ("data.train", *(("data.eval",) if evaluation else ())):
        for source in sources(data, key) if key == "data.eval" or not data.streaming else ():
            if not is_file(source.path):
                _splits(source, key)


def digest(source: Source, key: str) -> str:
    """A hash of all that `read` reads. Raises UserError as it does."""
    found = hashlib.blake2b(digest_size=20)
    if is_file(source.path):
        try:
            with open(source.path, "rb") as file:
                while part := file.read(1 << 22):
                    found.update(part)
        except OSError as error:
            raise UserError(key, source.path, f"expected a readable file ({error})") from error
        return found.hexdigest()
    rows = _splits(source, key).get(_name(source.split))
    for batch in () if rows is None else rows.data.table.to_batches():  # `read` refuses a split that is missing
        found.update(repr((batch.schema.to_string(show_schema_metadata=False), batch.num_rows)).encode())
        for column in batch.columns:
            found.update(str(column.offset).encode())
            for buffer in column.buffers():
                found.update(b"" if buffer is None else buffer)
    return found.hexdigest()


def _verified(found: Iterable[tuple[str, Any]], source: Source, key: str, start: int = 0) -> Iterator[Found]:
    """Rows, or their mistakes. start: number of rows before them."""
    empty = not start
    for where, row in found:
        empty = False
        if isinstance(row, UserError):
            yield where, row
            continue
        expected = _mistake(row, source.format) if isinstance(row, dict) else "expected a JSON object, a column a key"
        yield where, UserError(key, where, expected) if expected else row
    if empty:
        raise UserError(key, source.path, "expected a file with at least one row")


def _file(source: str, key: str) -> Iterator[tuple[str, Any]]:
    """Every row of a local file with its place, read lazily."""
    path, kind = Path(source), data_suffix(source)
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(path).iter_batches(AT_ONCE)
            yield from _numbered(source, itertools.chain.from_iterable(batch.to_pylist() for batch in batches))
        elif kind in DELIMITERS:
            yield from _table(source, path, DELIMITERS[kind], key)
        elif kind == ".json" and _is_list(path):  # many a .json is JSON Lines
            with _text(path) as file:
                yield from _numbered(source, parse_json(file.read()))
        else:
            yield from _lines(source, path, key)
    except Exception as error:  # Arrow has kinds of its own
        kinds = {".parquet": "Parquet", ".csv": "CSV", ".tsv": "TSV", ".json": "JSON"}
        right = f"expected a readable {kinds.get(kind, 'JSON Lines')} file ({first_line(error)})"
        if kind not in DATA_FILES:
            right += f"; other formats are known by their names: {', '.join(DATA_FILES)}"
            right += f", and compressed: {', '.join(COMPRESSED)}"
        raise UserError(key, source, right) from error


@contextmanager
def _text(path: Path) -> Iterator[io.TextIOBase]:
    """A file's text, without the mark that Windows begins it with; of a compressed file what it holds."""
    if path.suffix.lower() not in COMPRESSED:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield file
        return
    import pyarrow

    kind = {".zst": "zstd", ".bz2": "bz2"}.get(path.suffix.lower(), "gzip")
    with pyarrow.input_stream(str(path), compression=kind) as stream:
        yield io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="\n")


def _is_list(path: Path) -> bool:
    """Whether a file of JSON is one list."""
    with _text(path) as file:
        while (character := file.read(1)).isspace():
            pass
    return character == "["


def _table(source: str, path: Path, delimiter: str, key: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table, all columns text; one with another number of fields than the first line is a mistake."""
    csv.field_size_limit(sys.maxsize)  # of the process: a text may be as long as it likes
    with _text(path) as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise ValueError("a column stands twice in the first line")
        for where, fields in _numbered(source, (fields for fields in lines if fields)):
            if len(fields) == len(names):
                yield where, dict(zip(names, fields, strict=True))
            else:
                right = f"expected {len(names)} fields, as the first line has: {len(fields)} found; "
                yield where, UserError(key, where, right + 'a field with a delimiter in it stands in "')


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{source}: row {number}", row) for number, row in enumerate(rows, start=1))


def _lines(source: str, path: Path, key: str) -> Iterator[tuple[str, Any]]:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.strip().strip("\ufeff")  # also of files that were put together
            if line:
                where = f"{source}:{number}"
                try:
                    yield where, parse_json(line)
                except ValueError as error:
                    right = f"expected one JSON object a line ({getattr(error, 'msg', error)})"
                    yield where, UserError(key, where, right)


def _data_set(source: Source, key: str, split: str) -> Iterator[tuple[str, Row]]:
    """The same of the rows that ``split`` takes of a data set."""
    parts, name = _splits(source, key), _name(split)
    if name not in parts:
        raise UserError(f"{key}_split", split, f"expected one of {', '.join(parts)}, or a part such as train[:1%]")
    taken = _taken(split, {name: len(parts[name])}, key)
    for start in range(0, len(taken), AT_ONCE):
        some = taken[start : start + AT_ONCE]
        for number, row in zip(some, parts[name].select(some).to_list(), strict=True):
            yield f"{source.path} {name}: row {number + 1}", row


def _saved(path: str) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file()


def _splits(source: Source, key: str) -> dict[str, Any]:
    """Every split of a data set by name, downloaded where it is not in the cache. One that was saved without splits
    has the one that ``source`` names."""
    import datasets

    try:
        if _saved(source.path):
            found = datasets.load_from_disk(source.path)
            return dict(found) if isinstance(found, datasets.DatasetDict) else {_name(source.split): found}
        return dict(datasets.load_dataset(source.path, source.subset))
    except Exception as error:  # a README.md and the files of a folder can be wrong in many ways
        raise _unreachable(source, key, error) from error


def _name(split: str | None) -> str:
    """A split without its slice."""
    return (split or "train").partition("[")[0]


def _unreachable(source: Source, key: str, error: Exception) -> UserError:
    reason = f"({error.__cause__ or error})"
    if isinstance(error, ValueError) and "config" in str(error).lower():  # the library's word for a subset
        return UserError(f"{key}_subset", source.subset, f"expected one that the data set has {reason}")
    right = "expected a file that exists, or a data set on the hub that can be reached or is in the cache"
    return UserError(key, source.path, f"{right} {reason}")


def _taken(split: str, lengths: dict[str, int], key: str) -> range:
    """Numbers of the rows, from 0, that a split such as train[:1%] takes. lengths: of the splits, by name."""
    from datasets import ReadInstruction

    try:
        [part] = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, ValueError) as error:
        right = f"expected a split or a part of one, such as train[:1%] ({error})"
        raise UserError(f"{key}_split", split, right) from error
    taken = range(part.from_, part.to)
    if not taken:
        raise UserError(f"{key}_split", split, f"expected a part with at least one of the {sum(lengths.values())} rows")
    return taken


def format_of(row: Row, format: str) -> str | None:
    """`format`, or under "auto" the first one whose columns the row has."""
    if format != "auto":
        return format
    return next((name for name, columns in COLUMNS.items() if all(c in row for c in columns)), None)


def unused_columns(row: Row, name: str | None, is_chat: bool) -> list[str]:
    """Columns of a row, of the format ``name``, that have a value and mean nothing to training."""
    used = {*COLUMNS.get(str(name), ()), *(("input", "history") if name == "alpaca" else ())}
    used |= {"system", "tools", "chat_template_kwargs"} if is_chat else set()
    return [column for column in row if column not in used and row[column] is not None]


def system_of(row: Row) -> list[dict[str, Any]]:
    """The message that a row's system column is; none without one."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def conversation(row: Row, name: str | None) -> list[Any] | None:
    """The messages of a row that is a chat (`messages.read_chat` reads them); None for any other.

    A system column comes first. Alpaca rows are one where they have it or a history, [question, answer] a turn, as
    LLaMA-Factory has them; prompts and completions are one where both are lists of messages, as TRL has them, with the
    prompt untrained.
    """
    found: list[Any] = system_of(row)
    if name in ("messages", "sharegpt"):
        messages = row.get(COLUMNS[name][0])
        return [*found, *messages] if isinstance(messages, list) and messages else []
    if name == "prompt_completion" and isinstance(row.get("prompt"), list):
        prompt, completion = row["prompt"], row.get("completion")
        asked = [turn | {"train": False} if isinstance(turn, dict) else turn for turn in prompt]
        return [*found, *asked, *completion] if isinstance(completion, list) and completion else []
    if name == "alpaca" and (row.get("history") or found):
        history = row.get("history") or []
        if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
            return []
        for question, answer in history:
            found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        more = row.get("input")
        task = f"{row.get('instruction')}\n\n{more}" if more else row.get("instruction")
        return [*found, {"role": "user", "content": task}, {"role": "assistant", "content": row.get("output")}]
    return None


def _mistake(row: Row, format: str) -> str | None:
    """What is expected where a row does not fit its format; None where it does."""
    name = format_of(row, format)
    if name is None:
        return f"expected the columns {' or '.join(', '.join(c) for n, c in COLUMNS.items() if n not in PAIRED)}"
    if name in PAIRED and format == "auto":
        return "expected rows of examples: those of chosen and rejected are for loss.name dpo, orpo or simpo"
    if name in PAIRED:
        if name == "labelled" and type(row.get("label")) is not bool:
            return "expected label as true or false"
        try:
            return next(filter(None, (_mistake(one, "prompt_completion") for one in answers(row, name))), None)
        except BadChat as error:
            return str(error)
    messages = conversation(row, name)
    if messages is not None and name != "alpaca":
        try:
            roles = [turn.role for turn in read_chat(messages, " and ".join(COLUMNS[name]), row).turns]
        except BadChat as error:
            return str(error)
        twice = roles[:2] == ["system", "system"]
        return "expected one system text: the column has one, and the messages another" if twice else None
    texts = COLUMNS[name]
    if name == "alpaca" and row.get("input") is not None:
        texts = (*texts, "input")
    elif name == "multiple_choice":
        texts = ("question",)
        choices, answer = row.get("choices"), row.get("answer")
        if not (isinstance(choices, list) and 2 <= len(choices) <= 26 and all(map(is_text, choices))):
            return "expected choices as a list of 2 to 26 texts"
        if type(answer) is not int or not 0 <= answer < len(choices):
            return f"expected answer as the number of the right choice, from 0 to {len(choices) - 1}"
    for column in texts:
        if not is_text(row.get(column)):
            return f"expected {column} as text"
    if messages is not None:
        try:
            read_chat(messages, "history", row)
        except BadChat:
            return "expected system as text and history as a list of [question, answer], all of them text"
    return None
