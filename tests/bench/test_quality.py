"""Statistics of a study, its report, and how answers are read and marked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ows_ds import tables
from ows_ds.bench import answers, report, study
from ows_ds.bench.report import describe, t_test
from ows_ds.bench.study import Run, Study
from ows_ds.config import Data
from ows_ds.errors import UserError
from tests.data.test_data import byte_tokenizer


def samples(mean: float, std: float, n: int = 5) -> list[float]:
    """n numbers of this mean and sample standard deviation."""
    offsets = [i - (n - 1) / 2 for i in range(n)]
    unit = math.sqrt(sum(o * o for o in offsets) / (n - 1))
    return [mean + std * o / unit for o in offsets]


def test_mean_and_standard_deviation() -> None:
    assert describe([1.0, 2.0, 6.0]) == (3.0, math.sqrt(7.0))
    assert describe([2.5]) == (2.5, None)
    assert describe([]) == (None, None)
    assert describe([1.0, None]) == (None, None)


def test_t_test_by_hand() -> None:
    # means 2 and 4, variances 1 and 4, pooled 2.5: t = -2 / sqrt(2.5 * 2/3); p from the t distribution with 4 degrees
    t, p = t_test([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert t == pytest.approx(-2 / math.sqrt(2.5 * 2 / 3))
    assert p == pytest.approx(0.19625, abs=1e-4)
    # Table 12, BoolQ, LLaMa2-7B over 5 seeds: 81.9 +- 0.22 (LISA) and 85.3 +- 0.19 (OWS)
    t, _ = t_test(samples(85.3, 0.19), samples(81.9, 0.22))
    assert t == pytest.approx(3.4 / math.sqrt((0.19**2 + 0.22**2) / 2 * 2 / 5))


@pytest.mark.parametrize(("t", "p"), [(-11.36, 3.41e-6), (-13.46, 9.32e-7)])
def test_p_values_of_table_13(t: float, p: float) -> None:
    """The paper's p belongs to its t with 5 seeds a side, as far as t's digits go."""
    gap = t * math.sqrt(2 / 5)
    got, probability = t_test(samples(gap, 1.0), samples(0.0, 1.0))
    assert got == pytest.approx(t)
    assert probability == pytest.approx(p, rel=0.06)


@pytest.mark.parametrize(
    ("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([1.0, 1.0], [2.0, 2.0]), ([1.0, None], [1.0, 2.0, 3.0])]
)
def test_no_test_where_there_is_none(a: list[float | None], b: list[float | None]) -> None:
    assert t_test(a, b) == (None, None)


# ---- the report

FACTS = {"date": "d", "command": "c", "processes": 1, "hardware": "h", "versions": {"python": "3"}}
BASE = {"loss": 2.0, "right": 1, "rows": 8}


def result(loss: float | None, right: int, chosen_on: float | None = 1.0) -> dict[str, Any]:
    cost = {"steps": 2, "tokens": 9, "seconds": 1.0, "losses": [2.0, None], "planned_bytes": 2**30}
    return {"chosen_on": chosen_on, "loss": loss, "right": right, "rows": 8, **cost}


def plan(accuracy: bool = True) -> Study:
    return study.from_dict(
        {
            "recipe": {"model": {"path": "folder/m"}, "optim": {"lr": 1}},
            "test": "t",
            "seeds": [0, 1],
            "baseline": "b",
            "variants": {"a": {"lrs": [1, 2]}, "b": {}},
            "accuracy": {} if accuracy else None,
        }
    )


COMPLETE = {
    Run("a", 1, 0): result(1.0, 2, 0.9),
    Run("a", 2, 0): result(1.2, 6, 0.5),
    Run("a", 2, 1): result(1.4, 8),
    Run("b", 1, 0): result(1.7, 3),
    Run("b", 1, 1): result(1.5, 1),
}


def shown(summary: dict[str, Any]) -> str:
    return tables.terminal(report.study_tables(summary), report.study_notes(summary))


def test_summary_is_of_the_chosen_learning_rate() -> None:
    summary = report.summarize(plan(), BASE, COMPLETE, FACTS)
    a, b = summary["variants"]["a"], summary["variants"]["b"]
    assert (summary["runs"], summary["runs_complete"], summary["before"]) == (5, 5, {"loss": 2.0, "accuracy": 12.5})
    assert (a["lr"], a["lr_at_edge"], a["seeds"], a["tokens"]) == (2.0, True, [0, 1], [9, 9])
    assert a["loss"]["values"] == [1.2, 1.4]
    assert a["loss"]["mean"] == pytest.approx(1.3)
    assert a["loss"]["t"] == pytest.approx(-0.3 / 0.1 / math.sqrt(2))
    assert (a["accuracy"]["mean"], b["accuracy"]["mean"]) == (87.5, 25.0)
    assert (b["loss"]["t"], b["lr_at_edge"]) == (None, False)
    json.dumps(summary, allow_nan=False)
    text = shown(summary)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["a", "2*", "2", "of", "2", "87.5", "±", "17.7", "3.54", "0.072"] in lines
    assert ["b", "1", "2", "of", "2", "1.6000", "±", "0.1414", "baseline"] in lines
    assert "| a | 2 | 0.5000 | chosen |" in report.markdown(summary)


def test_what_is_missing_is_said() -> None:
    some = {run: COMPLETE[run] for run in (Run("a", 1, 0), Run("b", 1, 0))}
    summary = report.summarize(plan(), BASE, some, FACTS)
    json.dumps(summary, allow_nan=False)
    text = shown(summary)
    lines = [line.split() for line in text.splitlines()]
    assert ["a", "n/a", "0", "of", "2", "n/a", "±", "n/a", "n/a", "n/a"] in lines
    assert ["b", "1", "1", "of", "2", "1.7000", "±", "n/a", "baseline"] in lines
    assert "Not complete: 2 of 5 runs." in text
    diverged = report.summarize(plan(False), BASE, {**COMPLETE, Run("b", 1, 1): result(None, 0)}, FACTS)
    assert diverged["variants"]["b"]["loss"] == {"values": [1.7, None], "mean": None, "std": None, "t": None, "p": None}
    text = shown(diverged)
    assert "without a finite loss" in text
    assert "right answers" not in text


def test_loss_is_averaged_over_a_twentieth_to_both_sides() -> None:
    assert report.smooth([1.0, None, 3.0]) == [1.0, None, 3.0]
    losses: list[float | None] = [float(i) for i in range(20)]
    assert report.smooth(losses)[:2] == [0.5, 1.0]
    losses[9] = None
    assert report.smooth(losses)[9] == 9.0


def test_pictures_and_tables_are_written(tmp_path: Path) -> None:
    report.write_study(plan(), report.summarize(plan(), BASE, COMPLETE, FACTS), COMPLETE, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["front.png", "loss.png", "quality.json", "quality.md"]


def test_p_values_of_many_tests_are_corrected() -> None:
    # Holm: 0.01 * 4, 0.02 * 3, 0.03 * 2 (no less than the one before), 0.5
    assert report.holm([0.03, None, 0.01, 0.5, 0.02]) == pytest.approx([0.06, None, 0.04, 0.5, 0.06])
    assert report.holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])


# ---- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+2 = 4\n#### 4 ", "4"),
        ("#### 3\n#### 5", "5"),
        ("#### 8\nThe answer is: 8", "8"),
        (" 12\n", "12"),
        ("", ""),
        ("a ####", ""),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert answers.final_answer(text) == answer


@pytest.mark.parametrize(
    ("row", "text", "right"),
    [
        ({"answer": "36"}, "so 30 + 6\n#### 36", True),
        ({"answer": "36"}, "36 apples, or\n#### 37", False),
        ({"answer": "worked out\n#### 1,036"}, "#### 1036", True),  # as GSM8K's own rows
        ({"answer": "36"}, "", False),
        ({"answer": "-4", "task": "chain_sum", "metadata": {}}, "-4", True),
        ({"answer": "-4", "task": "chain_sum", "metadata": {}}, "4", False),
        ({"answer": "7", "task": "basic_arithmetic"}, "7", True),
        ({"answer": "7", "task": "basic_arithmetic"}, "it is 7", False),  # a part of the mark is none
    ],
)
def test_verifiers_mark(row: dict[str, Any], text: str, right: bool) -> None:
    pytest.importorskip("reasoning_gym")
    assert answers.is_right(row, text) is right


def test_rows_that_cannot_be_marked_are_refused() -> None:
    pytest.importorskip("reasoning_gym")
    answers.check_row({"answer": "1"}, "x")
    for row in ({}, {"answer": 1}, {"answer": "1", "task": "nope"}):
        with pytest.raises(UserError, match="test: 'x' is invalid"):
            answers.check_row(row, "x")


def test_the_prompt_is_what_training_shows_before_the_answer() -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    tokenizer = byte_tokenizer()
    expected = tokenizer.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(answers.prompt({"messages": talk}, tokenizer, Data(), "test")) == expected
    plain = byte_tokenizer(None)
    assert plain.decode(answers.prompt({"prompt": "Q: ", "completion": "A"}, plain, Data(), "test")) == "Q: "
    with pytest.raises(UserError, match=r"test: .* expected rows with a question"):
        answers.prompt({"text": "abc"}, plain, Data(), "test")
