"""What `ows-ds eval` writes and reads: results, model cards, answers, and a judge on the loopback device."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ows_ds.cli.main import main
from ows_ds.errors import UserError
from ows_ds.evaluate import judge, mt_bench
from ows_ds.evaluate.setting import MTBench
from ows_ds.runs import card, records, results
from ows_ds.runs.results import Result, Score
from tests.data.test_data import byte_tokenizer
from tests.runs.test_report import HOSTILE, Page, report, write_run

FINGERPRINT = "a" * 64
RESULT = Result(
    {"name": "first", "path": "runs/first/model", "checkpoint": None, "fingerprint": FINGERPRINT},
    (
        Score("both", "acc", 0.375, 0.0625, 5, 64, 0, "1"),
        Score("sums", "acc", 0.25, None, 5, 32, 1, "1.0"),
        Score("words", "exact_match (strict-match)", None, None, None, 32, 1, None, None),
    ),
    {"tasks": "both", "limit": None},
    {"lm_eval": "0.4.13"},
    "2026-01-31T12:00:00+00:00",
    1.5,
)
BEFORE = replace(RESULT, model={"name": "base"}, scores=(replace(RESULT.scores[0], value=0.5),))


# ---- results


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    both = replace(RESULT, before=BEFORE)
    paths = [results.write(tmp_path / "eval" / "both.json", results.as_text(one)) for one in (RESULT, both, RESULT)]
    assert [path.name for path in paths] == ["both.json", "both.1.json", "both.2.json"]
    assert [results.read(path) for path in paths] == [RESULT, both, RESULT]
    (tmp_path / "eval" / "none.json").write_text("{")
    assert results.of_run(tmp_path) == ([both, RESULT, RESULT], ["eval/none.json"])


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"scores": {}}, {"scores": [3]}, {"scores": [{"task": "a"}]}, {"model": {}}, {"model": 3},
        {"scores": [{"task": "a", "metric": "b", "value": "c"}]}, {"seconds": "soon"}, {"started": 3},
        {"scores": [{"task": "a", "metric": "b", "value": 1, "depth": 99}]}, {"before": 3}, {"versions": None},
        {"scores": [{"task": "a", "metric": "b", "value": True}]}, {"before": {"before": {}}},
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = results.write(tmp_path / "r.json", json.dumps(asdict(RESULT) | change))
    with pytest.raises(UserError, match="expected a result file"):
        results.read(path)


def test_the_table() -> None:
    table = results.table(RESULT)
    assert table.head == ["task", "metric", "shots", "n", "score", "±"]
    assert table.rows[0] == ["both", "acc", "5", "64", "0.3750", "0.0625"]
    assert table.rows[2] == ["  words", "exact_match (strict-match)", "", "32", "n/a", "n/a"]
    both = results.table(replace(RESULT, before=BEFORE))
    assert both.head == ["task", "metric", "shots", "n", "before", "after", "±", "change"]
    assert both.rows[0] == ["both", "acc", "5", "64", "0.5000", "0.3750", "0.0625", "-0.1250"]
    assert both.rows[1][4:] == ["n/a", "0.2500", "n/a", "n/a"]


def test_what_cannot_be_compared() -> None:
    assert results.not_comparable(RESULT, RESULT) is None
    assert results.not_comparable(RESULT, BEFORE) == "it has no acc of sums"
    other = replace(RESULT, scores=(replace(RESULT.scores[0], shots=0), *RESULT.scores[1:]))
    assert results.not_comparable(RESULT, other) == "shots of both are 0 in it, here 5"


def test_the_report_shows_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    later = replace(RESULT, started="2026-02-01", before=BEFORE, scores=RESULT.scores[:1])
    part = replace(RESULT, started="2026-02-02", settings={"limit": 4}, scores=(Score("both", "acc", 1.0, None, 5, 4),))
    hostile = replace(RESULT, scores=(Score(HOSTILE + "\ud83d", "acc", 0.5),))
    for one in (RESULT, later, part, hostile):
        results.write(run / "eval" / "both.json", results.as_text(one))
    (run / "eval" / "broken.json").write_text("[]")
    assert report(capsys, str(run))[0] == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.row("both, acc, 5 shots") == ["0.5000 to 0.3750 ± 0.0625 (n = 64)"]
    assert page.row("sums, acc, 5 shots") == ["0.2500 (n = 32)"]
    assert page.row(HOSTILE + "\\ud83d, acc") == ["0.5000"]
    assert "<script>" not in text
    assert page.row("eval/broken.json") == ["cannot be read"]
    assert page.row("faults") == ["4"]


# ---- the model card


def test_the_card_says_what_was_done_and_measured(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", path=str(tmp_path / "secret" / "llama"))
    (tmp_path / "secret" / "llama").mkdir(parents=True)
    (tmp_path / "secret" / "llama" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    text = str(card.of_run(run, None, FINGERPRINT))
    found = ModelCard(text)
    assert found.data.license == "apache-2.0"
    assert (found.data.library_name, found.data.pipeline_tag) == ("transformers", "text-generation")
    assert str(tmp_path) not in text
    assert "Base model: `llama`" in text
    assert "Optimizer steps: 4, of 16 rows each" in text
    assert "Tokens seen: 40" in text
    assert "Held-out loss: 2.0000 at first, 1.5000 at the end" in text
    assert "3.000, 1.000, 0.000, 1.000" in text
    assert "gamma: 2.0" in text
    assert "output_dir" not in text
    assert "Optimizer steps: 2," in str(card.of_run(run, 2, FINGERPRINT))
    assert "Not evaluated" in text
    hub = write_run(tmp_path / "hub", path="org/llama", data={"train": "org/rows"})
    data = ModelCard(str(card.of_run(hub, None, FINGERPRINT))).data
    assert (data.base_model, data.datasets, data.license) == ("org/llama", ["org/rows"], None)


def test_results_of_the_same_weights_come_into_the_card(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "model").mkdir()
    path = run / "model" / "README.md"
    path.write_text(str(card.of_run(run, None, FINGERPRINT)) + "\nmine\n")
    other = replace(RESULT, model={"name": "x", "fingerprint": "b" * 64}, scores=(Score("else", "acc", 1.0),))
    both = replace(RESULT, before=BEFORE)
    for _ in range(2):  # the second time changes nothing
        card.add_results(run / "model", [both, other])
        text = path.read_text()
        assert "| both | acc | 5 | 64 | 0.5000 | 0.3750 | 0.0625 | -0.1250 |" in text
        assert "else" not in text
        assert "Not evaluated" not in text
        assert text.endswith("\nmine\n")
        [one] = ModelCard(text).data.eval_results
        assert (one.dataset_name, one.metric_value, one.metric_name) == ("both", 0.375, "acc, 5 shots")
    results.write(run / "eval" / "both.json", results.as_text(both))
    assert "| both | acc | 5 |" in str(card.of_run(run, None, FINGERPRINT))
    path.write_text("mine alone")
    card.add_results(run / "model", [RESULT])
    assert path.read_text() == "mine alone"
    assert records.read(run).evaluations == ([both], [])


# ---- answers

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["Write a {line}.", "Now another."]},
    {"question_id": 111, "category": "math", "turns": ["1+1?", "And 2+2?"], "reference": ["2", "4"]},
    {"question_id": "x", "category": "stem", "turns": ["Why?"]},
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question_id": 1}, "expected it to have turns"),
        ({"question_id": 1, "turns": []}, "expected it to have turns"),
        ({"question_id": 1, "turns": ["a", "b", "c"]}, "expected it to have turns"),
        ({"question_id": 1, "turns": [3]}, "expected it to have turns"),
        ({"question_id": 1, "turns": ["a"]}, "expected it to have a category"),
        ({"question_id": True, "turns": ["a"]}, "question_id of its own"),
        ({"question_id": 81, "turns": ["a"], "category": "x"}, "question_id of its own"),
        ([], "a JSON object on each line"),
    ],
)
def test_what_is_no_question_is_refused(row: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        mt_bench.questions(str(write_lines(tmp_path / "q.jsonl", [*QUESTIONS, row])))


def test_how_a_talk_is_written() -> None:
    tokenizer = byte_tokenizer()

    def text(template: str) -> str:
        tokens = mt_bench.prompt(tokenizer, template, ["one?", "two?"], ["1"])
        return str(tokenizer.decode(tokens))

    start = "<|im_start|>"
    assert text("chat") == (
        f"{start}system\nBe kind.<|im_end|>\n{start}user\none?<|im_end|>\n{start}assistant\n1<|im_end|>\n"
        f"{start}user\ntwo?<|im_end|>\n{start}assistant\n"
    )
    assert text("plain") == "one?\n1\ntwo?\n"
    assert text("alpaca").endswith(
        "### Instruction:\none?\n\n### Response:\n1\n\n### Instruction:\ntwo?\n\n### Response:\n"
    )


# ---- the judge


class Server(http.server.ThreadingHTTPServer):
    """Answers chats with what `says` gives, after the statuses in ``troubles``; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.troubles: list[int] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def says(self, text: str) -> str:
        """A mark by what is asked: 9 for second turns, 4 with a reference, 7 otherwise."""
        if "[Second question]" in text:
            return "Good. Rating: [[9]]"
        return "Wrong. Rating: [[4.5]]" if "[Reference answer" in text else "Rating: [7]"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers["Authorization"])
        self.server.paths.append(self.path)
        if self.server.troubles:
            self.send_error(self.server.troubles.pop(0))
            return
        self.server.asked.append(body)
        said = self.server.says(body["messages"][1]["content"])
        text = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield one
        one.shutdown()
        thread.join()


def judge_all(server: Server, path: Path, **more: Any) -> list[dict[str, Any]]:
    answers = {one["question_id"]: [f"answer {{{i}}}" for i in range(len(one["turns"]))] for one in QUESTIONS}
    given = mt_bench.references(None, QUESTIONS)
    one = judge.Judge(MTBench(judge=server.address, judge_model="j", judge_retries=2, **more))
    return one.judge(one.requests(QUESTIONS, answers, given, "me"), path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("Rating: [[8]]", 8), ("[[7.5]] or [[2]]", 7.5), ("so [6]", 6), ("ten", -1), ("[[a]] [[3]]", 3), ("", -1)],
)
def test_the_mark(text: str, value: float) -> None:
    assert judge.mark(text) == value


def test_a_judge_is_asked_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    path = tmp_path / "new" / "j_single.jsonl"
    found = judge_all(server, path, judge_key="MY_KEY", judge_parallel=3)
    assert {(line["question_id"], line["turn"]): line["score"] for line in found} == {
        (81, 1): 7, (81, 2): 9, (111, 1): 4.5, (111, 2): 9, ("x", 1): 7,
    }  # fmt: skip
    assert set(server.keys) == {"Bearer sesame"}
    assert set(server.paths) == {"/v1/chat/completions"}
    assert all((body["model"], body["temperature"]) == ("j", 0) for body in server.asked)
    texts = [body["messages"][1]["content"] for body in server.asked]
    assert sum("Write a {line}." in text and "answer {0}" in text for text in texts) == 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(map(str, lines)) == sorted(map(str, found))
    assert set(lines[0]) == {
        "question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"
    }  # fmt: skip
    assert "sesame" not in path.read_text()
    assert [(s.task, s.metric, s.value, s.samples) for s in judge.scores(QUESTIONS, found)] == [
        ("mt_bench", "rating", pytest.approx((7 + 9 + 4.5 + 9 + 7) / 5), 5),
        ("mt_bench", "rating (turn 1)", pytest.approx((7 + 4.5 + 7) / 3), 3),
        ("mt_bench", "rating (turn 2)", 9, 2),
        ("mt_bench writing", "rating", 8, 2),
        ("mt_bench math", "rating", 6.75, 2),
        ("mt_bench stem", "rating", 7, 1),
    ]
    assert len(judge_all(server, path)) == 5
    assert len(server.asked) == 5


def test_what_is_no_mark_is_asked_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "says", lambda text: "no idea")
    found = judge_all(server, tmp_path / "j.jsonl")
    assert {line["score"] for line in found} == {-1}
    assert judge.scores(QUESTIONS, found)[0] == Score("mt_bench", "rating", None, None, 0, 0)
    monkeypatch.undo()
    found = judge_all(server, tmp_path / "j.jsonl")
    assert -1 not in {line["score"] for line in found}
    assert len(server.asked) == 10


def test_troubles_that_pass_and_those_that_stay(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.troubles = [503, 429]
    assert len(judge_all(server, tmp_path / "a.jsonl")) == 5
    server.troubles = [503] * 3
    with pytest.raises(UserError, match="it says 503"):
        judge_all(server, tmp_path / "b.jsonl")
    server.troubles = [401]
    with pytest.raises(UserError, match="it says 401"):
        judge_all(server, tmp_path / "b.jsonl")
    assert server.troubles == []
    monkeypatch.setattr(server, "says", lambda text: {"no": "text"})
    assert {line["score"] for line in judge_all(server, tmp_path / "b.jsonl")} == {-1}


def test_a_judge_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with Server() as gone:
        pass
    with pytest.raises(UserError, match="it does not answer"):
        judge_all(gone, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"name": "pair-v2", "type": "pairwise"}]
    for index, fields in enumerate(judge.FIELDS.values()):
        text = "".join(f"<{{{name}}}>" for name in sorted(fields))
        rows.append({"name": f"p{index}", "type": "single", "system_prompt": "s", "prompt_template": text})
        rows[-1]["output_format"] = "[[rating]]"
    found = judge.prompts(str(write_lines(tmp_path / "p.jsonl", rows)))
    assert {kind: prompt.name for kind, prompt in found.items()} == {
        (1, False): "p0", (1, True): "p1", (2, False): "p2", (2, True): "p3"
    }  # fmt: skip
    with pytest.raises(UserError, match="for turn 2 with a reference answer"):
        judge.prompts(str(write_lines(tmp_path / "p.jsonl", rows[:-1])))
    rows[1]["prompt_template"] = "{question.__class__}"
    with pytest.raises(UserError, match="expected it to have the fields"):
        judge.prompts(str(write_lines(tmp_path / "p.jsonl", rows)))


def test_mt_bench_from_the_command_line(
    server: Server, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers in FastChat's form, the same each time; marks; a result; and the judge alone for answers of before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    write_lines(tmp_path / "question.jsonl", QUESTIONS)
    common = ["eval", str(inputs / "model"), "--mt-bench", "question.jsonl", "--max-new-tokens", "6"]
    assert main(common) == 0
    folder = tmp_path / "runs" / "eval"
    name = results.file_name(inputs.name)
    first = [
        json.loads(line) for line in (folder / "mt_bench" / "model_answer" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert [set(line) for line in first] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 3
    assert [line["question_id"] for line in first] == [81, 111, "x"]
    assert [len(line["choices"][0]["turns"]) for line in first] == [2, 2, 1]
    capsys.readouterr()
    assert main([*common, "--judge", server.address, "--judge-model", "org/j", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    second = [
        json.loads(line) for line in (folder / "mt_bench" / "model_answer" / f"{name}.1.jsonl").read_text().splitlines()
    ]
    assert [line["choices"] for line in first] == [line["choices"] for line in second]
    assert result["scores"][0]["value"] == pytest.approx(36.5 / 5)
    assert json.loads((folder / f"{name}-mt_bench.json").read_text()) == result
    assert len(result["model"]["fingerprint"]) == 64
    judgments = folder / "mt_bench" / "model_judgment" / "org_j_single.jsonl"
    assert {json.loads(line)["model"] for line in judgments.read_text().splitlines()} == {f"{name}.1"}
    old = str(folder / "mt_bench" / "model_answer" / f"{name}.jsonl")
    assert main([*common, "--judge", server.address, "--judge-model", "org/j", "--answers", old]) == 0
    assert len(judgments.read_text().splitlines()) == len(server.asked) == 10
    assert "mt_bench writing" in capsys.readouterr().out
    assert not [path for path in folder.rglob("*") if path.is_file() and "sesame" in path.read_text()]
