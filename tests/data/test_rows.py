"""Rows from files of every kind, from a folder and from the hub, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from ows_ds.config import Data
from ows_ds.data.rows import fetch, format_of, load_rows
from ows_ds.errors import UserError

ROWS = [{"question": f"{i}+0?", "answer": str(i)} for i in range(10)]
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
- config_name: socratic
  data_files:
  - {split: train, path: train.jsonl}
---
"""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asks the network, nor leaves its cache behind."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A data set as the hub keeps it: two subsets, of which one has a test split."""
    path = tmp_path / "set"
    path.mkdir()
    (path / "README.md").write_text(CARD)
    for name, rows in (("train", ROWS), ("test", ROWS[:3])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files(tmp_path: Path) -> list[Path]:
    """`ROWS` in files of every kind."""
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "lines.json").write_text(text)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    return [tmp_path / n for n in ("rows.jsonl", "lines.json", "list.json", "rows.parquet", "rows.csv")]


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    for path in files(tmp_path):
        assert load_rows(path) == ROWS, path
        # a file has no subsets and no names of splits, but parts
        assert load_rows(path, subset="main", split="test") == ROWS
        assert load_rows(path, split="test[:20%]") == ROWS[:2]
        assert load_rows(path, split="train[-3:]") == ROWS[-3:]
        with pytest.raises(UserError, match=r"data\.train_split: .* at least one of the 10 rows"):
            load_rows(path, split="train[10:]")


BOTH = '{"question": "a", "answer": "b"}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.jsonl", f"\ufeff{BOTH}\n"),
        ("r.json", f"\ufeff[{BOTH}]"),
        ("r.csv", "\ufeffquestion,answer\na,b\n"),
        ("r.tsv", "question\tanswer\na\tb\n"),
        ("r.jsonl.gz", BOTH),
        ("r.json.zst", f"[{BOTH}]"),
        ("r.tsv.bz2", "question\tanswer\n\na\tb\n"),
    ],
)
def test_files_as_windows_and_compressors_write_them(tmp_path: Path, name: str, text: str) -> None:
    import pyarrow

    path, content = tmp_path / name, text.encode()
    kind = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get(path.suffix)
    if kind is None:
        path.write_bytes(content)
    else:
        with pyarrow.CompressedOutputStream(str(path), kind) as stream:
            stream.write(content)
    assert load_rows(path) == [{"question": "a", "answer": "b"}]


def test_csv_is_text_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text('question,answer\n"a, b",NA\nc,1.50\nd,\n')
    assert [row["answer"] for row in load_rows(tmp_path / "r.csv")] == ["NA", "1.50", ""]


@pytest.mark.parametrize(
    ("name", "content", "value", "right"),
    [
        ("r.json", "[{", "r.json", "expected a readable JSON file"),
        ("r.json", "[1]", "r.json: row 1", "expected a JSON object"),
        ("r.json", '[{"text": "a"}, {"text": 3}]', "r.json: row 2", "expected text as text"),
        ("r.json", '{"text": "a"}\n{"text": 3}', "r.json:2", "expected text as text"),
        ("r.parquet", "x", "r.parquet", "expected a readable Parquet file"),
        ("r.csv", "", "r.csv", "expected a file with at least one row"),
        ("r.csv", "question,question\na,b\n", "r.csv", "expected a readable CSV file (a column stands twice"),
        ("r.csv", "question,answer\na,b,\n", "r.csv: row 1", "expected 2 fields, as the first line has: 3 found"),
        ("r.csv", "question,answer\na,b\nc\n", "r.csv: row 2", "expected 2 fields, as the first line has: 1 found"),
        ("r.csv", 'question,answer\na,"b\n', "r.csv", "expected a readable CSV file (unexpected end of data)"),
        ("r.csv", "question,anwser\na,b\n", "r.csv: row 1", "expected the columns messages or"),
    ],
)
def test_files_that_cannot_serve_are_named(tmp_path: Path, name: str, content: str, value: str, right: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_rows(tmp_path / name, key="data.eval")
    assert (error.value.key, error.value.value) == ("data.eval", str(tmp_path / value))
    assert error.value.right.startswith(right)


def test_a_folder_is_a_data_set(folder: str) -> None:
    assert load_rows(folder, subset="main") == ROWS
    assert load_rows(folder, subset="main", split="test") == ROWS[:3]
    assert load_rows(folder, subset="socratic", split="train[50%:]") == ROWS[5:]


@pytest.mark.parametrize(
    ("subset", "split", "key", "value", "right"),
    [
        (
            None,
            "test",
            "data.eval_subset",
            None,
            "expected one that the data set has (Config name is missing. Please pick",
        ),
        (
            "man",
            "test",
            "data.eval_subset",
            "man",
            "expected one that the data set has (BuilderConfig 'man' not found.",
        ),
        ("main", "dev", "data.eval_split", "dev", "expected one of train, test, or a part such as train[:1%]"),
        ("main", "test[:300%]", "data.eval_split", "test[:300%]", "expected a split or a part of one"),
        ("main", "test[5:]", "data.eval_split", "test[5:]", "expected a part with at least one of the 3 rows"),
    ],
)
def test_subsets_and_splits_that_do_not_exist(
    folder: str, subset: str | None, split: str, key: str, value: str | None, right: str
) -> None:
    with pytest.raises(UserError) as error:
        load_rows(folder, key="data.eval", subset=subset, split=split)
    assert (error.value.key, error.value.value) == (key, value)
    assert error.value.right.startswith(right)


def test_wrong_columns_of_a_data_set_are_named(folder: str) -> None:
    with pytest.raises(UserError) as error:
        load_rows(folder, "alpaca", subset="main", split="test[1:]")
    assert (error.value.value, error.value.right) == (f"{folder} test: row 2", "expected instruction as text")


def test_the_hub_is_asked_for_name_and_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any) -> dict[str, Any]:
        asked.append(names)
        return {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("openai/gsm8k", subset="main", split="test") == ROWS[:3]
    assert asked == [("openai/gsm8k", "main")]
    asked.clear()
    data = Data(train="openai/gsm8k", train_subset="main", eval="gsm8k", eval_subset="socratic")
    fetch(data, evaluation=True)
    fetch(data, evaluation=False)
    fetch(Data(train="no/file.jsonl"), evaluation=True)
    assert asked == [("openai/gsm8k", "main"), ("gsm8k", "socratic"), ("openai/gsm8k", "main")]


def test_the_hub_out_of_reach_is_one_line() -> None:
    with pytest.raises(UserError) as error:
        load_rows("openai/gsm8k", subset="main")
    assert str(error.value).startswith(
        "data.train: 'openai/gsm8k' is invalid: expected a file that exists, or a data set on the hub that can be "
        "reached or is in the cache (Couldn't reach 'openai/gsm8k' on the Hub"
    )


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("instruction input output answer", "alpaca"),  # zwhe99/commonsense_170k
        ("instruction input output text", "alpaca"),  # vicgalle/alpaca-gpt4
        ("question subject choices answer", "multiple_choice"),  # cais/mmlu
        ("question answer", "question_answer"),  # openai/gsm8k
        ("id", None),
    ],
)
def test_formats_are_known_by_their_columns(columns: str, format: str | None) -> None:
    row = dict.fromkeys(columns.split(), "")
    assert format_of(row, "auto") == format
    assert format_of(row, "text") == "text"
