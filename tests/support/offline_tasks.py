"""Tasks of lm-evaluation-harness that need no hub: sums that reasoning-gym makes, in files."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from ows_ds.data import samples

SUMS = {
    "task": "ows_test_sums",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_target": "{{right}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ANSWERS = {
    "task": "ows_test_answers",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "filter_list": [
        {"name": "first-number", "filter": [{"function": "regex", "regex_pattern": "(-?[0-9]+)"},
                                            {"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip
WORDS = {
    "task": "ows_test_words",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
GROUP = {
    "group": "ows_test",
    "task": ["ows_test_sums", "ows_test_answers"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    "metadata": {"version": 1},
}
NOWHERE = {**SUMS, "task": "ows_test_nowhere", "dataset_path": "nobody/has-this"}


def write_tasks(folder: Path, test: int = 12) -> Path:
    """A folder of the tasks above, with ``test`` questions and as many examples. Needs reasoning-gym."""
    train, _, held_out = samples.word_problems(
        folder / "problems", test, 1, 0, test, "chain_sum", {"max_terms": 2, "max_digits": 1}
    )
    for path, name in ((train, "examples"), (held_out, "test")):
        rows = []
        for index, line in enumerate(path.read_text().splitlines()):
            row = json.loads(line)
            answer = int(row["answer"])
            others = [str(answer + 1 + (index + other) % 9) for other in range(3)]
            right = index % 4
            choices = [*others[:right], str(answer), *others[right:]]
            rows.append({"question": row["messages"][0]["content"], "answer": str(answer), "choices": choices,
                         "right": right})  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(folder / f"{name}.jsonl") for split, name in (("train", "examples"), ("test", "test"))}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "fewshot_split": "train",
            "training_split": "train", "test_split": "test", "metadata": {"version": 1.0}}  # fmt: skip
    for task in (SUMS, ANSWERS, WORDS, GROUP, NOWHERE):
        name = task.get("task") if isinstance(task.get("task"), str) else task["group"]
        content = task if task is GROUP else {**data, **task}
        if task is NOWHERE:
            content.pop("dataset_kwargs")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder
