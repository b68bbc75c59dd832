"""What a run would train on, shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from ows_ds.cli.main import main
from ows_ds.data.encode import encode
from ows_ds.data.preview import marked
from tests.data.test_data import byte_tokenizer

TEXT = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n0+0<|im_end|>\n<|im_start|>assistant\n"


def test_one_row_is_shown_without_the_model(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        if (inputs / "model" / name).exists():
            (model / name).symlink_to(inputs / "model" / name)
    words = ["train", "--model.path", str(model), "--data.train", str(inputs / "train.jsonl")]
    words += ["--train.output_dir", str(tmp_path / "run"), "--data.cache", str(tmp_path / "cache")]
    assert main([*words, "--preview"]) == 0
    shown = capsys.readouterr().out
    n = len(byte_tokenizer()(TEXT + "0<|im_end|>\n")["input_ids"])
    assert shown == (
        f"data.train, row 1: {n} tokens, 2 of them trained\n{TEXT}⟦0<|im_end|>⟧\n\n"
        "data.train: 20 rows, 55 trained tokens\n"
    )
    assert not (tmp_path / "run").exists()
    assert main([*words, "--preview", "3", "--data.packing", "true", "--data.max_length", "160"]) == 0
    shown = capsys.readouterr().out
    assert "data.train, row 3:" in shown
    assert "packed: 7 sequences of at most 160 tokens, " in shown
    streamed = ["--data.streaming", "true", "--train.steps", "2", "--data.buffer_size", "16"]
    assert main([*words, "--preview", *streamed]) == 0
    assert "data.train: 16 rows, 43 trained tokens, in the first block" in capsys.readouterr().out
    mixed = json.dumps([{"path": str(inputs / f"{name}.jsonl"), "weight": 1} for name in ("train", "eval")])
    assert main([*words, "--data.train", mixed, "--preview"]) == 0
    assert f"{inputs / 'eval.jsonl'}, row 1:" in capsys.readouterr().out


def test_colours_are_for_terminals_and_rows_do_not_steer_them() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode({"messages": [{"role": "assistant", "content": "a\x1b[2J\nb"}]}, tokenizer, 99)
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(marked(encoded, tokenizer, True))
    shown = capture.get()
    assert "\x1b[1;32ma\\x1b[2J\x1b[0m\n\x1b[1;32mb<|im_end|>\x1b[0m" in shown
    assert "\x1b[2J" not in shown
    assert marked(encoded, tokenizer, False).plain.endswith("assistant\n⟦a\\x1b[2J\nb<|im_end|>⟧\n")
