"""The command line: what reaches a verb, exit codes, one line for each mistake."""

import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ows_ds
from ows_ds import config
from ows_ds.bench.setting import How, Setting
from ows_ds.cli.bench import BENCHES
from ows_ds.cli.main import VERBS, main
from ows_ds.config import Recipe
from ows_ds.errors import UserError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the verbs by ones that note what they were called with."""
    noted: list[tuple[Any, ...]] = []
    trainer, export = types.ModuleType("ows_ds.train.trainer"), types.ModuleType("ows_ds.train.export")
    trainer.train = lambda recipe: noted.append(("train", recipe))  # type: ignore[attr-defined]
    trainer.score = lambda *a: noted.append(("score", *a))  # type: ignore[attr-defined]
    export.export = lambda *a: noted.append(("export", *a))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ows_ds.train.trainer", trainer)
    monkeypatch.setitem(sys.modules, "ows_ds.train.export", export)
    return noted


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe file that passes every check; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    Path("r.yaml").write_text(
        "model:\n  path: m\ndata:\n  train: rows.jsonl\noptim:\n  lr: 1e-4\n  rank: 64\ntrain:\n  output_dir: run\n"
    )
    return "r.yaml"


def test_train_gets_the_recipe_with_options_on_top(calls: list[tuple[Any, ...]], recipe: str) -> None:
    options = ["--optim.rank", "8", "--optim.betas", "[0.8,0.9]", "--optim.max_grad_norm=null", "--log.trackers", "[]"]
    assert main(["train", "--config", recipe, *options]) == 0
    [(verb, given)] = calls
    assert (verb, type(given)) == ("train", Recipe)
    assert (given.optim.lr, given.optim.rank, given.optim.betas) == (1e-4, 8, (0.8, 0.9))
    assert (given.optim.max_grad_norm, given.log.trackers, given.model.path) == (None, [], "m")


def test_options_alone_are_enough(calls: list[tuple[Any, ...]], recipe: str) -> None:
    # Text that looks like a number stays text.
    words = ["train", "--model.path", "7", "--train.output_dir", "o", "--data.train", "rows.jsonl"]
    assert main([*words, "--train.gradient_checkpointing", "true"]) == 0
    assert calls[0][1].model.path == "7"
    assert calls[0][1].train.gradient_checkpointing is True


@pytest.mark.parametrize("extra", [["--local_rank", "1"], ["--local_rank=1"], ["--local-rank=1"]])
def test_a_launchers_local_rank_is_ignored(calls: list[tuple[Any, ...]], recipe: str, extra: list[str]) -> None:
    assert main([*extra, "train", "--config", recipe]) == 0
    assert main(["train", "--config", recipe, *extra]) == 0
    assert calls[0] == calls[1]


def test_score_and_export(calls: list[tuple[Any, ...]], recipe: str) -> None:
    assert main(["score", "--config", recipe]) == 0
    assert main(["score", "--config", recipe, "--output", "s.json", "--metric", "rm, outlier"]) == 0
    assert main(["export", "run", "out"]) == 0
    assert main(["export", "run", "out", "--checkpoint", "step-5"]) == 0
    assert [c[0] for c in calls] == ["score", "score", "export", "export"]
    assert [c[2:] for c in calls[:2]] == [(None, []), (Path("s.json"), ["rm", "outlier"])]
    assert [c[1:] for c in calls[2:]] == [
        (Path("run"), Path("out"), None),
        (Path("run"), Path("out"), "step-5"),
    ]


def test_print_config_prints_what_would_run(
    calls: list[tuple[Any, ...]], recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", recipe, "--print_config", "--optim.rank", "9"]) == 0
    printed = config.from_dict(yaml.safe_load(capsys.readouterr().out))
    assert (printed.optim.rank, printed.optim.lr, calls) == (9, 1e-4, [])


def shown(error: str, expected: str, lines: int = 1) -> None:
    """Every mistake has its line; the expected one is among so many."""
    found = error.splitlines()
    assert len(found) == lines, error
    assert all(line.startswith("ows-ds: error: ") for line in found), error
    assert any(line.startswith(f"ows-ds: error: {expected}") for line in found), error


MISTAKES = [
    (["trian"], "VERB: 'trian' is invalid: expected one of train, score, export"),
    (["train"], "model.path: None is invalid: it is required: expected text", 3),
    (["train", "--config", "no.yaml"], "config: 'no.yaml' is invalid: expected a readable YAML file"),
    (
        ["train", "--config", "r.yaml", "--optim.rank", "0"],
        "optim.rank: 0 is invalid: expected an integer of at least 1",
    ),
    (["train", "--config", "r.yaml", "--optim.rank", "x"], "optim.rank: 'x' is invalid: expected an integer"),
    (["train", "--config", "r.yaml", "--optim.lr"], "optim.lr: '' is invalid: expected a number"),
    (["train", "--config", "r.yaml", "--optim.lr", "nan"], "optim.lr: 'nan' is invalid: expected a finite number"),
    (
        ["train", "--config", "r.yaml", "--optim.max_grad_norm", "x"],
        "optim.max_grad_norm: 'x' is invalid: expected a number",
    ),
    (
        ["train", "--config", "r.yaml", "--optim.betas", "3"],
        "optim.betas: 3 is invalid: expected a list of 2 numbers",
    ),
    (
        ["train", "--config", "r.yaml", "--optim.always_on", "no"],
        "optim.always_on: 'no' is invalid: expected one of auto, full",
    ),
    (
        ["train", "--config", "r.yaml", "--optim.rnk", "3"],
        "optim.rnk: '3' is invalid: there is no such key; is optim.rank",
    ),
    (
        ["train", "--config", "r.yaml", "--optim.rnk=3"],
        "optim.rnk: '3' is invalid: there is no such key; is optim.rank",
    ),
    (
        ["train", "--config", "r.yaml", "--optim.ran", "3"],
        "optim.ran: '3' is invalid: there is no such key; is optim.rank",
    ),
    (["train", "--config", "r.yaml", "stray"], "arguments: 'stray' is invalid: settings are given as"),
    (["train", "--config"], "--config: '' is invalid: expected a value after it"),
    (["export"], "RUN_DIR: None is invalid: it is required: expected a folder", 2),
    (["export", "run"], "OUT_DIR: None is invalid: it is required: expected a folder"),
    (
        ["score", "--config", "r.yaml", "--metric", "rm,magnitude"],
        "--metric: 'rm,magnitude' is invalid: expected one or more of outlier, reverse, uniform, decreasing, rm,",
    ),
    (["score", "--config", "r.yaml", "--metric", ""], "--metric: '' is invalid: expected one or more of outlier"),
    (["score", "--config", "r.yaml", "--metric"], "--metric: '' is invalid: expected a value after it"),
    (["score", "--config", "r.yaml", "--output", "s.png"], "--output: 's.png' is invalid: expected a file whose name"),
    (["train", "--config", "broken.yaml"], "config: 'broken.yaml:3' is invalid: expected valid YAML"),
    (["train", "--config", "typo.yaml"], "optim.rnk: 3 is invalid: there is no such key; is optim.rank meant?", 3),
    (["train", "--config", "type.yaml"], "optim.rank: 'many' is invalid: expected an integer", 2),
]


@pytest.mark.parametrize(("argv", "line", "lines"), [(*case, 1)[:3] for case in MISTAKES])
def test_every_mistake_is_one_line_and_exit_code_2(
    argv: list[str],
    line: str,
    lines: int,
    calls: list[tuple[Any, ...]],
    recipe: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("broken.yaml").write_text("optim:\n  rank: [3\n")
    Path("typo.yaml").write_text("model: {path: m}\noptim: {rnk: 3}\n")
    Path("type.yaml").write_text("model: {path: m}\noptim: {rank: many}\ntrain: {output_dir: o}\n")
    assert main(argv) == 2
    out, err = capsys.readouterr()
    shown(err, line, lines)
    assert (out, calls) == ("", [])


def test_errors_of_a_verb(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        def train(_: Recipe) -> None:
            raise error

        module = types.ModuleType("ows_ds.train.trainer")
        module.train = train  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ows_ds.train.trainer", module)

    fail(UserError("data.train", "rows.jsonl:7", "expected valid JSON"))
    assert main(["train", "--config", recipe]) == 2
    assert capsys.readouterr().err == "ows-ds: error: data.train: 'rows.jsonl:7' is invalid: expected valid JSON\n"
    fail(ZeroDivisionError("deep inside"))
    assert main(["train", "--config", recipe]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "deep inside" in err
    fail(SystemExit(7))
    with pytest.raises(SystemExit) as leave:
        main(["train", "--config", recipe])
    assert leave.value.code == 7


def test_without_a_verb_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert all(re.search(f"^    {verb}\\b", shown, re.MULTILINE) for verb in VERBS)


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"ows_ds {ows_ds.__version__}, Python ")
    assert f"torch {torch.__version__}" in shown


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS), *(["bench", what] for what in BENCHES)])
def test_help_reads_at_80_columns(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as leave:
        main([*verb, "--help"])
    out = capsys.readouterr().out
    assert leave.value.code == 0
    assert max(map(len, out.splitlines())) <= 80
    if verb in (["train"], ["score"]):
        assert all(f"--{key} " in out or f"--{key}, " in out for key in config.recipe_keys())
        flat = " ".join(out.split())
        assert "(an integer of at least 1; default: 128)" in flat
        assert "(a list of 2 numbers, each at least 0 and below 1, such as [0.9, 0.999]; default: [0.9, 0.999])" in flat
    if verb == ["bench", "time"]:
        assert all(
            f"--{name.replace('_', '-')} " in out for name in ("kv_heads", "update_proj_gap", "warm_up", "sweep")
        )


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom ows_ds.cli.main import main\n"
        "try:\n    main(['train', '--help'])\n"
        "finally:\n    assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 5  # half a second on an idle machine


def test_bench_quality_gets_the_study(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[Any, ...]] = []
    module = types.ModuleType("ows_ds.bench.quality")
    module.quality = lambda *given: noted.append(given)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ows_ds.bench.quality", module)
    Path("s.yaml").write_text("recipe: r.yaml\ntest: test.jsonl\nvariants: {ows: }\n")
    words = ["bench", "quality", "--config", "s.yaml", "--output", "o"]
    assert main(words) == 0
    assert main([*words, "--seeds", "0,2", "--variants", "a, b", "--resume", "kept.json", "--json"]) == 0
    assert [list(given[0][""].variants) for given in noted] == [["ows"], ["ows"]]
    assert [given[1:6] for given in noted] == [
        (Path("o"), None, None, None, False),
        (Path("o"), [0, 2], ["a", "b"], Path("kept.json"), True),
    ]
    assert noted[0][6] == "ows-ds bench quality --config s.yaml --output o"


def test_the_other_benches_get_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[Any, ...]] = []
    module = types.ModuleType("ows_ds.bench.run")
    module.bench = lambda *given: noted.append(given)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ows_ds.bench.run", module)
    assert main(["bench", "memory"]) == 0
    words = ["bench", "time", "--hidden", "64", "--kv-heads=2", "--layers", "all", "--one-at-a-time", "--warm-up", "0"]
    assert main([*words, "--json", "--sweep", "gamma=1,2", "--dtype", "float32"]) == 0
    assert noted[0] == ("memory", Setting(), How(), "ows-ds bench memory")
    what, setting, how, command = noted[1]
    assert (what, setting) == ("time", Setting(hidden=64, kv_heads=2, layers="all", dtype="float32"))
    assert how == How(one_at_a_time=True, warm_up=0, as_json=True, sweep="gamma=1,2")
    assert command.startswith("ows-ds bench time --hidden 64 --kv-heads=2")


@pytest.mark.parametrize(
    ("words", "expected", "lines"),
    [
        (*case, 1)[:3]
        for case in [
            (["time", "--rounds", "x"], "--rounds: 'x' is invalid: expected an integer"),
            (["time", "--rounds", "0"], "--rounds: 0 is invalid: expected an integer of at least 1"),
            (["memory", "--kv-heads", "x"], "--kv-heads: 'x' is invalid: expected an integer"),
            (["memory", "--kv-heads"], "--kv-heads: '' is invalid: expected an integer"),
            (["traffic", "--wrld", "3"], "--wrld: '3' is invalid: there is no such key"),
            (["time", "--dtype", "int8"], "--dtype: 'int8' is invalid: expected one of auto, float32, bfloat16"),
            ([], "bench WHAT: None is invalid: expected one of quality"),
            (["speed"], "bench WHAT: 'speed' is invalid: expected one of quality"),
            (["quality"], "--config: None is invalid: it is required: expected the file of a study", 2),
            (["quality", "--config", "none.yaml"], "--output: None is invalid: it is required: expected a folder"),
            (
                ["quality", "--config", "none.yaml", "--output", "o"],
                "config: 'none.yaml' is invalid: expected a readable",
            ),
            (
                ["quality", "--cnfig", "s.yaml"],
                "--cnfig: 's.yaml' is invalid: there is no such key; is --config meant?",
            ),
            (
                ["quality", "--config", "s", "--output", "o", "--seeds", "0-2"],
                "--seeds: '0-2' is invalid: expected integers",
            ),
        ]
    ],
)
def test_mistakes_in_bench_are_one_line_each(
    words: list[str], expected: str, lines: int, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    shown(capsys.readouterr().err, expected, lines)
