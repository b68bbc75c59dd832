"""Every command of README.md and `docs/` runs as it is written, in a folder that holds the files it names.

The files are small ones: `my-model` has six layers of width 128, `my.yaml` is README.md's. What else is made smaller
stands in `SMALLER`; commands that other tests take from the page, or run at their own size, in `ELSEWHERE`.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ows_ds import config, files
from ows_ds.cli.main import main
from tests.conftest import ROOT
from tests.data.test_data import byte_tokenizer
from tests.support.pages import PAGES, Command, block, code_of, commands_of
from tests.support.pool import warm_context

LIMIT = 240  # seconds for one command
SMALLER = {
    "--nproc_per_node 8": "--nproc_per_node 2",
    "--num_processes 8": "--num_processes 2",
    "step-200": "step-2",
    "step-6": "step-2",
    "--output FILE.md": "--output made.md",
    # data sets of the hub: the task of docs/evaluate.md
    "--tasks ows_commonsense,ows_mmlu,ows_gsm8k": "--tasks my_sums --include-path my_tasks",
    "--tasks ows_mmlu": "--tasks my_sums --include-path my_tasks",
    "runs/llama2_7b_gsm8k --tasks ows_commonsense": "runs/first --tasks my_sums --include-path my_tasks",
    # a data set of the hub and 7B: as docs/recipes.md says, options win over the recipe
    "llama2_7b_gsm8k.yaml": "llama2_7b_gsm8k.yaml --model.path my-model --data.train train.jsonl"
    " --data.train_subset null --data.eval held_out.jsonl --data.eval_subset null --data.eval_split train"
    " --data.format auto",
}
# how a command begins, and where it is run
ELSEWHERE = {
    "./launch/demo": "launch/demo",
    "./launch/setup": "launch/test",
    "./launch/test": ".ci/run",
    "ows-ds bench time": "tests/bench/test_costs.py",
    "ows-ds bench memory": "tests/bench/test_costs.py",
    "ows-ds bench traffic": "tests/bench/test_costs.py",
    "python benchmarks/": "tests/test_benchmarks.py",
    "python -m benchmarks.families": "tests/test_families.py",
    "python -m benchmarks.gpu": "tests/test_benchmarks.py",
    "python -m tests.faults.kills": "tests/faults/test_kills.py",
    "ows-ds bench quality": "tests/bench/test_study_runs.py",
    "ows-ds eval runs/first --mt-bench": "tests/evaluate/test_evaluate.py",
    "accelerate launch --config_file launch/accelerate/zero3_nodes.yaml": "tests/launch/test_hosts.py",
    "torchrun --nnodes 2": "tests/launch/test_hosts.py",
    "deepspeed": "tests/launch/test_hosts.py",
    "mpirun": "tests/launch/test_hosts.py",
    "ows-ds launch --slurm": "tests/launch/test_slurm.py",
    "sbatch": "tests/launch/test_slurm.py",
    "ows-ds chat": "tests/cli/test_comforts.py",
    "ows-ds push": "tests/cli/test_comforts.py",
    "ows-ds convert": "tests/config/test_convert.py",
}
PRINTS = {"plan", "recipes", "benchmarks.memory_table"}  # and write nothing, but for --output


def here() -> list[Any]:
    """Commands that run in this file, each once. Every day the first of each verb, in CI the first of each launcher."""
    found: dict[tuple[str, ...], Command] = {}
    for page in PAGES:
        for one in commands_of(page):
            if not any(" ".join(one.words).startswith(begin) for begin in ELSEWHERE):
                found.setdefault(one.words, one)
    seen: set[tuple[str, ...]] = set()
    commands = []
    for one in found.values():
        kind = one.words[: 2 if one.words[0] == "ows-ds" else 1]
        first = kind not in seen
        seen.add(kind)
        quick = kind[0] == "ows-ds" and kind[1] != "eval"  # the evaluation harness alone takes half a minute to import
        marks = () if first and quick else pytest.mark.ci if first else pytest.mark.slow
        commands.append(pytest.param(one, id=str(one), marks=marks))
    return commands


def smaller(words: tuple[str, ...]) -> list[str]:
    text = "\0".join(words)
    for old, new in SMALLER.items():
        text = text.replace(old.replace(" ", "\0"), new.replace(" ", "\0"))
    return text.split("\0")


def write_model(folder: Path) -> None:
    """A model of README.md's settings: five layers and more to choose from, and room for rank 128."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)
    )
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers, start=1):
            layer.mlp.up_proj.weight.view(-1)[: 8 * number] = 3.0  # outliers
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, count: int) -> None:
    rows = ({"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit code of a command in ``folder`` and what it printed. Python's own run in a fork that has imported it all."""
    log = folder / "printed.log"
    log.unlink(missing_ok=True)
    if words[0] in ("ows-ds", "python") and "-c" not in words:
        process = warm_context().Process(target=_run, args=(words, folder, log), daemon=True)
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            pytest.fail(f"not done after {LIMIT} s: {log.read_text()[-3000:]}")
        return int(process.exitcode or 0), log.read_text()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {
        name: value for name, value in environment.items() if not name.startswith(("ACCELERATE_", "MASTER_"))
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    return done.returncode, done.stdout + done.stderr


def _run(words: list[str], folder: Path, log: Path) -> None:
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    code: Any = 1
    try:
        if words[0] == "ows-ds":
            code = main(words[1:])
        else:
            sys.argv = words[words.index("-m") + 1 :] if "-m" in words else words[1:]
            sys.path.insert(0, os.getcwd())
            (runpy.run_module if "-m" in words else runpy.run_path)(sys.argv[0], run_name="__main__")
            code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the pages name, in which README.md's first run is done."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("launch", "ds_configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    write_model(folder / "my-model")
    write_rows(folder / "train.jsonl", 64)
    write_rows(folder / "held_out.jsonl", 4)
    recipe, count = re.subn(r"\b100\b", "2", block("README.md", "yaml", "output_dir"))
    assert count == 2
    (folder / "my.yaml").write_text(recipe)
    (folder / "my-cluster.yaml").write_text(block("docs/plan.md", "yaml", "like:"))
    (folder / "my_tasks").mkdir()
    task = block("docs/evaluate.md", "yaml", "my_sums").replace("/data/", f"{folder}/")
    (folder / "my_tasks" / "my_sums.yaml").write_text(task)
    for name, count in (("examples", 6), ("test", 8)):
        sums = ({"question": f"{i} + {i}?", "choices": [str(i), str(2 * i)], "right": 1} for i in range(1, count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sums))
    code, printed = run(["ows-ds", "train", "--config", "my.yaml"], folder)
    assert code == 0, printed
    for name in ("second", "a"):
        shutil.copytree(folder / "runs" / "first", folder / "runs" / name)
    return folder


def unfinish(run_dir: Path) -> None:
    """Let the run have stopped after its first checkpoint."""
    shutil.rmtree(run_dir / "model")
    shutil.rmtree(max((run_dir / "checkpoints").iterdir()))


@pytest.mark.parametrize("command", here())
def test_a_command_runs_as_written(command: Command, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(finished, folder, symlinks=True)
    words = smaller(command.words)
    if {"auto", "--preview"} & set(words):
        unfinish(folder / "runs" / "first")
    elif {"train", "score"} & set(words):
        shutil.rmtree(folder / "runs" / "first")
    before = set(folder.rglob("*"))
    code, printed = run(words, folder)
    assert code == 0, printed
    assert printed.strip()
    made = set(folder.rglob("*")) - before - {folder / "printed.log"}
    if "--preview" in words:
        assert "⟦" in printed
    elif "train" in words:
        assert [path.name for path in made if path.parent.name == "model"].count("model.safetensors") == 1
    elif "-c" not in words and (not PRINTS & set(words) or "--output" in words):
        assert made


def test_commands_that_run_elsewhere_do() -> None:
    """No entry is left over, and the file that is named is there."""
    texts = [" ".join(one.words) for page in PAGES for one in commands_of(page)]
    for begin, place in ELSEWHERE.items():
        assert any(text.startswith(begin) for text in texts), begin
        assert (ROOT / place).exists()
    for old in SMALLER:
        assert any(old in text for text in texts), old


def names_of_pages() -> dict[str, Any]:
    """What the pages' Python takes for granted: a model and its scores, batches, a Trainer, a recipe."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.randint(0, 256, (3, 2, 16), generator=torch.Generator().manual_seed(0))
    args = transformers.TrainingArguments("runs/trainer", max_steps=2, report_to=[], use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in ids.flatten(0, 1)]
    return {
        "model": load("my-model"),
        "args": args,
        "rows": rows,
        "batches": [{"input_ids": one, "labels": one} for one in ids],
        "probabilities": json.loads(Path("runs/first/scores.json").read_text())["layers"],
        "recipe": config.from_dict(files.read_yaml("my.yaml")),
    }


def pages_with_python() -> list[Path]:
    """Those that have no test of their own: docs/python.md has."""
    pages = [page for page in PAGES if any(one.language == "python" for one in code_of(page))]
    return [page for page in pages if page.name != "python.md"]


@pytest.mark.parametrize("page", pages_with_python(), ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    shutil.copy("runs/first/scores.json", "scores.json")
    names = names_of_pages()
    for one in code_of(page):
        if one.language == "python":
            exec(compile("\n" * (one.line - 1) + one.text, str(page), "exec"), names)
