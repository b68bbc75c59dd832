"""Encoded rows on disk: made once, never stale, never half."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from ows_ds.config import Data, Source, sources
from ows_ds.data import cache, prepare
from ows_ds.data.encoded import Builder, Counts, EncodedRows
from ows_ds.data.rows import digest
from ows_ds.errors import UserError
from tests.data.test_data import lists
from tests.support.tokenizer import CHATML, byte_tokenizer


def made(text: str = "ab") -> tuple[EncodedRows, Counts]:
    builder = Builder()
    for word in text.split():
        builder.add(list(word.encode()), [False] + [True] * (len(word) - 1))
    return builder.build(), Counts(rows=len(text.split()), first_bad="é")


def lists_of(rows: EncodedRows) -> list[tuple[list[int], list[int]]]:
    return [lists(row) for row in rows]


def test_what_was_made_is_read(tmp_path: Path) -> None:
    rows, counts = cache.entry(tmp_path / "new", "x", lambda: made("abc de"))
    again, same = cache.entry(tmp_path / "new", "x", lambda: pytest.fail("it is there"))
    assert lists_of(again) == lists_of(rows) == [([97, 98, 99], [-100, 98, 99]), ([100, 101], [-100, 101])]
    assert again.targets.tolist() == rows.targets.tolist() == [2, 1]
    assert counts == same == Counts(rows=2, first_bad="é")
    assert (again.lengths.tolist(), again.largest) == ([3, 2], 101)
    empty, _ = cache.entry(tmp_path, "y", lambda: made(""))
    assert list(empty) == list(cache.entry(tmp_path, "y", lambda: pytest.fail("it is there"))[0]) == []


def test_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    calls, found = [], []

    def slow() -> tuple[EncodedRows, Counts]:
        calls.append(1)
        time.sleep(0.3)
        return made()

    threads = [threading.Thread(target=lambda: found.append(cache.entry(tmp_path, "x", slow)[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), len(found)) == (1, 4)


def test_mistakes_are_kept_too(tmp_path: Path) -> None:
    def fail() -> Any:
        raise UserError("data.train", "r.jsonl:3", "expected text as text")

    for make in (fail, lambda: pytest.fail("it is known")):
        with pytest.raises(UserError, match=r"data\.train: 'r\.jsonl:3' is invalid: expected text as text"):
            cache.entry(tmp_path, "x", make)

    def broken() -> Any:
        raise OSError("the network is down")

    with pytest.raises(OSError, match="network"):
        cache.entry(tmp_path, "y", broken)
    assert cache.entry(tmp_path, "y", made)[1] == made()[1]


@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: b"x" * 99, lambda old: old[:-1],
                                    lambda old: old[:-1] + bytes([old[-1] ^ 1])])  # fmt: skip
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache.entry(tmp_path, "x", made)
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert lists_of(cache.entry(tmp_path, "x", lambda: made("cd"))[0]) == lists_of(made("cd")[0])
    assert lists_of(cache.entry(tmp_path, "x", lambda: pytest.fail("it is there"))[0]) == lists_of(made("cd")[0])


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert lists_of(cache.entry(tmp_path / "file" / "in", "x", made)[0]) == lists_of(made()[0])


def test_names_differ_with_all_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n')
    source, data = Source(path=str(tmp_path / "r.jsonl"), split="train"), Data()

    def name(source: Source = source, data: Data = data, tokenizer: Any = None, key: str = "data.train") -> str:
        return cache.name(source, digest(source, key), tokenizer or byte_tokenizer(), data, key)

    names = [name()]
    assert name() == names[0] == name(source.model_copy(update={"weight": 2.0}))
    assert name(data=data.model_copy(update={"packing": True, "cache": "x"})) == names[0]
    names += [name(data=data.model_copy(update={key: value})) for key, value in {
        "max_length": 3, "loss_on": "all", "template": "plain", "on_bad_row": "skip"}.items()]  # fmt: skip
    names += [name(source.model_copy(update={key: value})) for key, value in {
        "subset": "a", "split": "train[:1]", "format": "text"}.items()]  # fmt: skip
    names += [name(key="data.eval"), name(tokenizer=byte_tokenizer(None))]
    for change in ({"eos_token": "a"}, {"bos_token": "b"}):
        tokenizer = byte_tokenizer()
        for mark, text in change.items():
            setattr(tokenizer, mark, text)
        names.append(name(tokenizer=tokenizer))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["abc"])
    names.append(name(tokenizer=tokenizer))
    dated = byte_tokenizer(CHATML + "{{ strftime_now('%d') if false }}")
    names.append(name(tokenizer=dated))

    class Tomorrow(cache.datetime.date):
        @classmethod
        def today(cls) -> Any:
            return cls(2999, 1, 1)

    monkeypatch.setattr(cache.datetime, "date", Tomorrow)
    assert name() == names[0]
    names.append(name(tokenizer=dated))
    monkeypatch.setattr(cache, "FORMAT", -1)
    names.append(name())
    about = os.stat(source.path)
    Path(source.path).write_text('{"text": "b"}\n')
    os.utime(source.path, ns=(about.st_atime_ns, about.st_mtime_ns))  # content counts, not time
    names.append(name())
    assert len(set(names)) == len(names)


def test_data_sets_have_a_digest_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    digests = []
    for name, text in (("one", "a"), ("two", "a"), ("three", "b")):
        datasets.Dataset.from_dict({"text": ["x", text]}).save_to_disk(str(tmp_path / name))
        digests.append(digest(Source(path=str(tmp_path / name)), "data.train"))
    assert digests[0] == digests[1] != digests[2]


def test_a_second_run_tokenizes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(4)))
    data = Data(train=[Source(path=str(tmp_path / "r.jsonl"))], cache=str(tmp_path / "cache"))
    given = sources(data, "data.train")
    first, counts = prepare.prepare(data, byte_tokenizer(), given, "data.train")
    monkeypatch.setattr(prepare, "encode_rows", lambda *_, **__: pytest.fail("it is there"))
    again, same = prepare.prepare(data, byte_tokenizer(), given, "data.train")
    assert [lists(row) for [row] in again] == [lists(row) for [row] in first]
    assert same == counts
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) in (
        [".lock", ".safetensors"],
        [".safetensors"],
    )
