"""Settings and a tokenizer -> sequences: one source or several, packed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from ows_ds import config
from ows_ds.config import Data, Source, changed, sources
from ows_ds.data import prepare
from ows_ds.data.encoded import Counts
from ows_ds.data.rows import load_rows
from ows_ds.errors import UserError
from ows_ds.model.pretrained import load_tokenizer
from tests.data.test_data import byte_tokenizer
from tests.support.tiny_run import recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in (3, 2, 1)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "no", "prompt": "b", "completion": "c"}) + "\n")
    return tmp_path


def made(folder: Path, train: Any, **more: Any) -> tuple[Any, Counts]:
    data = config.from_dict(
        {
            "model": {"path": "m"},
            "train": {"output_dir": "o"},
            "data": {"train": train, "cache": str(folder / "cache"), "max_length": 6, **more},
        }
    ).data
    return prepare.prepare(data, byte_tokenizer(None), sources(data, "data.train"), "data.train")


def texts(found: Any) -> list[str]:
    return [byte_tokenizer(None).decode(row.input_ids.tolist()[:-1]) for rows in found for row in rows]


def test_several_sources(folder: Path) -> None:
    a, b = str(folder / "a.jsonl"), str(folder / "b.jsonl")
    found, counts = made(folder, [a, {"path": b, "format": "prompt_completion"}])
    assert (texts(found), found.sizes) == (["aaa", "aa", "a", "bc"], [4])
    assert counts == Counts(rows=4, kept=4, tokens=12, trained_tokens=3 + 2 + 1 + 2, ignored={"text": None})
    found, _ = made(folder, [{"path": a, "weight": 2, "split": "train[1:]"}, b])
    assert (texts(found), found.sizes) == (["aa", "a", "bc"], [2, 1])
    assert prepare.weights([Source(path=a, weight=2.0), Source(path=b)]) == [2.0, 1.0]
    assert prepare.weights([Source(path=a), Source(path=b)]) is None


def test_sources_with_weights_are_packed_apart(folder: Path) -> None:
    a, b = str(folder / "a.jsonl"), str(folder / "b.jsonl")
    found, _ = made(folder, [a, b], packing=True)
    assert (found.sizes, [len(rows) for rows in found]) == ([2], [2, 2])
    found, _ = made(folder, [{"path": a, "weight": 1}, b], packing=True)
    assert found.sizes == [2, 1]


def test_what_sources_leave_out() -> None:
    data = Data(
        train=[Source(path="a", format="text"), Source(path="b", subset="s", split="t")],
        train_subset="x",
        format="alpaca",
    )
    assert sources(data, "data.train") == [
        Source(path="a", subset="x", split="train", format="text"),
        Source(path="b", subset="s", split="t", format="alpaca"),
    ]
    assert sources(Data(eval="e"), "data.eval") == [Source(path="e", split="test", format="auto")]
    assert sources(Data(), "data.eval") == []


def test_folders_that_were_saved(tmp_path: Path) -> None:
    rows = [{"text": "x"}, {"text": "y"}]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "dev": made.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert load_rows(tmp_path / "one") == load_rows(tmp_path / "one", split="test") == rows
    assert load_rows(tmp_path / "one", split="train[1:]") == rows[1:]
    assert load_rows(tmp_path / "two", split="dev") == rows[1:]
    with pytest.raises(UserError, match=r"data\.train_split: 'test' is invalid: expected one of train, dev"):
        load_rows(tmp_path / "two", split="test")


def test_a_template_of_ones_own(inputs: Path, tmp_path: Path) -> None:
    """It is the tokenizer's from then on, also where that is saved."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    one = recipe(inputs, tmp_path / "run")
    tokenizer = load_tokenizer(changed(one, {"data.chat_template": str(tmp_path / "t.jinja")}))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(changed(one, {"model.path": str(tmp_path / "saved")}))
    for found in (tokenizer, again):
        assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<a>"
