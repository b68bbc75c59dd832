"""Rows that are read while training."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from ows_ds.config import Data, Source
from ows_ds.data import prepare
from ows_ds.data.read_ahead import ReadAhead
from ows_ds.data.rows import stream
from ows_ds.data.stream import Stream
from ows_ds.errors import UserError
from tests.data.test_data import byte_tokenizer

DATA = Data(train="unused", max_length=16, streaming=True)


def write(folder: Path, name: str, count: int) -> Source:
    """Rows that say their numbers, as letters from A on."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": f"{name}{chr(65 + i)}"}) + "\n" for i in range(count)))
    return Source(path=str(path))


def opened(
    sources: list[Source],
    buffer: int,
    data: Data = DATA,
    batch: int = 2,
    world_size: int = 1,
    rank: int = 0,
    **more: Any,
) -> Stream:
    tokenizer = byte_tokenizer(None)
    return Stream(
        sources,
        buffer,
        lambda rows: prepare.block(data, tokenizer, sources, rows),
        batch,
        1,
        world_size,
        rank,
        0,
        **more,
    )


def texts(sequences: list[Any]) -> list[str]:
    """What each row of each sequence says."""
    tokenizer = byte_tokenizer(None)
    return [tokenizer.decode(row.input_ids.tolist()[:-1]) for rows in sequences for row in rows]


def everyones(steps: Stream, k: int) -> list[str]:
    """What all ranks' rows of a step say."""
    return texts([steps.sequences[i] for i in steps.global_step(k)])


def test_blocks_follow_each_other_without_end(tmp_path: Path) -> None:
    source = write(tmp_path, "a", 5)
    steps = opened([source], 4)
    seen = [everyones(steps, k) for k in range(4)]
    steps.close()
    # two steps a block; the second block has the last row, and begins again
    assert [sorted(seen[0] + seen[1]), sorted(seen[2] + seen[3])] == [
        ["aA", "aB", "aC", "aD"],
        ["aA", "aB", "aC", "aE"],
    ]
    assert steps.state() == {"block": 1, "step": 2, "rows": [4]}
    assert (steps.counts.rows, steps.counts.kept) == (8, 8)


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_resumes_with_the_same_rows_at_any_world_size(tmp_path: Path, packing: bool) -> None:
    sources = [write(tmp_path, "a", 7), Source(path=write(tmp_path, "b", 9).path, weight=3.0)]
    data = Data(train="unused", max_length=9, streaming=True, packing=packing)
    first = opened(sources, 12, data)
    all_of_it = [everyones(first, k) for k in range(12)]
    states = {}
    again = opened(sources, 12, data)
    for k in range(12):
        states[k + 1] = again.take(k).state
    for done in (3, 6, 7):
        parts = [opened(sources, 12, data, world_size=2, rank=rank, state=states[done]) for rank in (0, 1)]
        for k in range(done, 12):
            assert [everyones(part, k) for part in parts] == [all_of_it[k]] * 2
            taken = [part.take(k).micro_batches for part in parts]
            own = [texts([rows]) for mine in zip(*taken, strict=True) for [rows] in mine]
            assert [text for some in own for text in some] == all_of_it[k]
        for part in parts:
            part.close()
    for steps in (first, again):
        steps.close()
    spoken = [text for step in all_of_it for text in step]
    if not packing:  # three of every twelve rows
        assert sum(text.startswith("a") for text in spoken) == len(spoken) // 4


def test_what_is_skipped_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\n{"text": "c"}\n{"text": ""}\n')
    data = Data(train="unused", streaming=True, on_bad_row="skip", max_length=4)
    steps = opened([Source(path=str(path))], 4, data)
    assert sorted(everyones(steps, 0)) == ["a", "c"]
    steps.close()
    assert (steps.counts.bad, steps.counts.dropped) == (1, 1)
    assert steps.counts.first_bad.startswith(f"{path}:2: expected the columns")
    with pytest.raises(UserError, match=r"data\.train: .*r\.jsonl:2"):
        opened([Source(path=str(path))], 4)
    with pytest.raises(
        UserError, match=r"train\.global_batch_size: 9 is invalid: expected at most 6, as many as all rows make"
    ):
        opened([Source(path=str(path))], 4, data, batch=9)


def test_a_block_with_too_few_rows_for_a_step_is_joined_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines = [*"abcd", "", "", "", *"efghi"]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    steps = opened([Source(path=str(path))], 4, batch=2)
    first = [sorted(everyones(steps, k)) for k in range(4)]
    assert sorted(first[0] + first[1]) == list("abcd")
    assert len(set(first[2] + first[3]) & set("efghi")) == 4
    again = opened([Source(path=str(path))], 4, batch=2, state=steps.state())
    assert [sorted(everyones(again, k)) for k in (2, 3)] == first[2:]
    steps.close()
    again.close()


def test_a_mistake_in_a_later_block_is_raised_when_it_is_due(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": 3}\n')
    steps = opened([Source(path=str(path))], 2)
    steps.take(0)
    with pytest.raises(UserError, match=r"r\.jsonl:3"):
        steps.take(1)
    steps.close()


def test_closing_ends_the_block_that_is_being_read(tmp_path: Path) -> None:
    source = write(tmp_path, "a", 5)
    steps = opened([source], 4)
    encode, reading, closed = steps._encode, threading.Event(), threading.Event()

    def waiting(rows: Any) -> Any:
        reading.set()
        assert closed.wait(10)
        return encode(rows)

    steps._encode = waiting
    with contextlib.closing(ReadAhead(steps.take, 9, torch.device("cpu"))) as ahead:
        for k in (0, 1):  # of the first block; the second one is due in the thread that reads ahead
            ahead.take(k)
        assert reading.wait(10)
        steps.close()
        closed.set()
        with pytest.raises(CancelledError):
            ahead.take(2)
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


def test_all_kinds_of_sources_are_read_from_any_row_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"text": str(i)} for i in range(5)]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "r.parquet")
    made.to_csv(tmp_path / "r.csv")
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "set").mkdir()
    made.to_json(tmp_path / "set" / "train.jsonl")
    for name in ("r.parquet", "r.csv", "saved", "set"):
        source = Source(path=str(tmp_path / name), split="train")
        found = list(stream(source, "data.train", 3))
        assert [row for _, row in found] == rows[3:], name
        assert found[0][0].endswith("row 4")
        assert list(stream(source, "data.train", 5)) == []
    with pytest.raises(UserError, match=r"data\.train_split: 'dev'"):
        list(stream(Source(path=str(tmp_path / "set"), split="dev"), "data.train", 0))
