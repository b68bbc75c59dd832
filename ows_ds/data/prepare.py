"""Settings and a tokenizer -> the sequences of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from ows_ds.config import Data, Source
from ows_ds.data import cache, encoded
from ows_ds.data.encode import encode_rows
from ows_ds.data.encoded import PAIRED, Counts, EncodedRows
from ows_ds.data.pack import Sequences
from ows_ds.data.rows import Found, digest, read


def prepare(
    data: Data, tokenizer: Any, sources: Sequence[Source], key: str, today: datetime | None = None
) -> tuple[Sequences, Counts]:
    """All rows of ``sources``, from the cache where they are in it, and what became of them.

    Without weights the sources become one. With weights each stays a part, whose rows are packed only with each other.
    today: see `chat.write`. Raises UserError as `rows.read` and `encode_rows` do.
    """
    found = [_rows(data, tokenizer, source, key, today) for source in sources]
    return _sequences(data, found, weights(sources) is None)


def block(
    data: Data,
    tokenizer: Any,
    sources: Sequence[Source],
    rows: Sequence[Iterable[Found]],
    today: datetime | None = None,
) -> tuple[Sequences, Counts]:
    """The same of rows that are read, by their sources; every source stays a part, and none needs to keep a row."""
    found = [
        _encoded(data, tokenizer, source, some, "data.train", True, today)
        for source, some in zip(sources, rows, strict=True)
    ]
    return _sequences(data, found, False)


def weights(sources: Sequence[Source]) -> list[float] | None:
    """Weights of the sources; None where every row counts once."""
    given = [source.weight for source in sources]
    return None if all(weight is None for weight in given) else [1.0 if w is None else w for w in given]


def _sequences(data: Data, found: Sequence[tuple[EncodedRows, Counts]], join: bool) -> tuple[Sequences, Counts]:
    parts = [rows for rows, _ in found]
    if join and len(parts) > 1:
        parts = [encoded.joined(parts)]
    rows = 2 if data.format in PAIRED else 1
    return Sequences(parts, data.max_length if data.packing else None, rows), sum((c for _, c in found), Counts())


def _encoded(
    data: Data,
    tokenizer: Any,
    source: Source,
    rows: Iterable[Found],
    key: str,
    may_be_none: bool,
    today: datetime | None,
) -> tuple[EncodedRows, Counts]:
    settings = (data.max_length, data.loss_on, source.format, key, data.template, data.on_bad_row)
    return encode_rows(rows, tokenizer, *settings, may_be_none, today)


def _rows(data: Data, tokenizer: Any, source: Source, key: str, today: datetime | None) -> tuple[EncodedRows, Counts]:
    def make() -> tuple[EncodedRows, Counts]:
        return _encoded(data, tokenizer, source, read(source, key), key, False, today)

    if not tokenizer.is_fast:  # which `encode_rows` refuses
        return make()
    return cache.entry(cache.place(data), cache.name(source, digest(source, key), tokenizer, data, key, today), make)
