"""Who may import what: the package's parts rest on each other in one direction, and importing it does no work."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ows_ds"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}

# Bottom first. A module imports, also inside its functions, only from rows above its own in this list.
LAYOUT = [
    ["errors"],
    ["signals"],
    ["config", "data.__init__", "rendezvous", "gathering", "data.chat", "data.mix"],
    ["slurm"],
    ["layers", "sample", "project", "data.rows", "cluster", "data.encoded"],
    ["plan", "coordinates", "shapes", "data.pack", "data.batches", "data.cache"],
    ["reference", "memory", "data.stream"],
    ["roofline"],
    ["forecast"],
    ["communicate"],
    ["weights", "watch"],
    ["zero3", "fingerprint", "tensor_files", "data.attention"],
    ["calibrate", "update", "refresh"],
    ["full_rank"],
    ["score"],
    ["metrics", "plot"],
    ["optimizer", "adamw"],
    ["checkpoint", "data.encode", "log", "samples"],
    ["load", "data.prepare"],
    ["runtime", "loss"],
    [f"methods.{name}" for name in ("badam", "full", "galore", "hift", "lisa", "lora", "mezo", "ows")],
    ["methods.__init__"],
    ["scoring", "resume"],
    ["bench.__init__", "table", "evaluate.__init__", "evaluate.setting", "report.__init__"],
    ["results"],
    ["report.runs"],
    ["card", "report.charts"],
    ["export", "job", "data.preview", "report.page"],
    ["trainer", "evaluate.subject", "integrations.__init__", "integrations.transformers"],
    ["evaluate.harness", "evaluate.mt_bench"],
    ["evaluate.judge"],
    ["evaluate.run"],
    ["bench.statistics", "bench.study", "bench.setting", "bench.tracking"],
    ["bench.answers", "bench.report", "bench.trial", "bench.crew"],
    ["bench.quality", "bench.rivals", "bench.time", "bench.memory", "bench.traffic"],
    ["bench.worker", "bench.run", "planning", "manual"],
    ["cli"],
    ["__main__"],
]
# Without processes, DeepSpeed or environment all the way down.
PURE = {
    "errors": set(),
    "config": {"errors"},
    "layers": {"errors"},
    "sample": {"errors"},
    "project": {"errors"},
    "plan": {"errors", "layers", "sample"},
    "coordinates": {"errors", "project"},
    "gathering": set(),
    "data.chat": {"errors"},
    "data.mix": set(),
    "data.encoded": set(),
    "data.pack": {"data.encoded"},
    "cluster": {"errors", "config"},
    "shapes": {"errors", "layers"},
    "memory": {"errors", "layers", "project", "plan", "gathering"},
    "roofline": {"errors", "layers", "project", "plan", "memory", "cluster"},
    "forecast": {"errors", "config", "cluster", "gathering", "memory", "roofline", "sample", "shapes"},
    "reference": {"errors", "layers", "sample", "project", "plan", "coordinates"},
}
# Who may use what; all other modules may not.
ALLOWED = {
    "torch.distributed": {"communicate", "runtime"},
    "deepspeed": {"zero3"},
    "accelerate": {"runtime", "log", "load", "integrations.transformers"},
    "os.environ": {"runtime", "log", "evaluate.judge"},
    "ds_ attributes": {"zero3"},
    "data that runs": set(),
}
# Modules and calls that run what they read, or could.
RUNNING = {
    "pickle", "marshal", "shelve", "dill", "joblib", "eval", "exec", "os.system", "os.popen",
    "torch.load", "numpy.load", "np.load", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
EXTRAS = [
    "reasoning_gym", "gguf", "llama_cpp", "mpi4py", "galore_torch", "peft", "scipy", "sklearn", "lm_eval", "trl",
    "hypothesis", "pytest",
]  # fmt: skip


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of all that a module imports, anywhere in it: ``a`` and ``a.b`` of ``from a import b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner(tree: ast.Module) -> set[str]:
    """The package's modules that a module imports, itself left out."""
    found = {name.removeprefix("ows_ds.") for name in imports(tree) if name.startswith("ows_ds.")}
    found |= {f"{name}.__init__" for name in found} | {name.rpartition(".")[0] for name in found}
    return {name for name in found if name in FILES and TREES[name] is not tree}


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of such an expression, otherwise nothing."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def uses(tree: ast.Module) -> set[str]:
    """Which of the things of `ALLOWED` a module imports or touches."""
    imported = set(imports(tree))
    names = imported | {dotted(node) for node in ast.walk(tree)}
    found = set()
    for what, where in (("torch.distributed", names), ("deepspeed", imported), ("accelerate", imported)):
        if any(name == what or name.startswith(f"{what}.") for name in where):
            found.add(what)
    if any(name.startswith(("os.environ", "os.getenv", "os.putenv")) for name in names):
        found.add("os.environ")
    called = {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if (imported | called) & RUNNING or any(getattr(node, "arg", None) == "shell" for node in ast.walk(tree)):
        found.add("data that runs")
    for node in ast.walk(tree):
        # DeepSpeed's attributes of parameters, also through getattr and hasattr; ds_config is the recipe's
        if isinstance(node, ast.Attribute):
            word = node.attr
        else:
            word = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if word.startswith("ds_") and word.isidentifier() and word != "ds_config":
            found.add("ds_ attributes")
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch.distributed as dist", {"torch.distributed"}),
        ("from torch import distributed", {"torch.distributed"}),
        ("from torch.distributed.fsdp import x", {"torch.distributed"}),
        ("import torch\ndef f():\n    return torch.distributed.get_rank()", {"torch.distributed"}),
        ("def f():\n    import deepspeed", {"deepspeed"}),
        ("from deepspeed.runtime.zero import x", {"deepspeed"}),
        ("from accelerate.utils import x", {"accelerate"}),
        ("import os\nx = os.environ.get('RANK')", {"os.environ"}),
        ("def f():\n    import pickle", {"data that runs"}),
        ("import torch\nx = torch.load(y, weights_only=True)", {"data that runs"}),
        ("from os import environ", {"os.environ"}),
        ("import os\nx = os.getenv('RANK')", {"os.environ"}),
        ("def f(p):\n    return p.ds_tensor", {"ds_ attributes"}),
        ("def f(p):\n    return hasattr(p, 'ds_id')", {"ds_ attributes"}),
        ("import pickle", {"data that runs"}),
        ("import torch\nx = torch.load('x')", {"data that runs"}),
        ("def f(text):\n    return eval(text)", {"data that runs"}),
        ("import subprocess\nsubprocess.run('ls', shell=True)", {"data that runs"}),
        ("import yaml\nyaml.unsafe_load('')", {"data that runs"}),
        ("def f(model):\n    model.eval()\n    model.load()", set()),
        (
            "import os, torch\nfrom torch import nn\nimport deepspeed_like\nx.ds_config\nos.path\ny = 'ds_id is not'",
            set(),
        ),
    ],
)
def test_the_rules_can_be_broken(text: str, expected: set[str]) -> None:
    assert uses(ast.parse(text)) == expected


def test_every_module_is_looked_at() -> None:
    rows = [name for row in LAYOUT for name in row]
    assert len(rows) == len(set(rows))
    assert set(rows) == set(FILES) - {"__init__"}
    assert ALLOWED["torch.distributed"] == {name for name in FILES if "torch.distributed" in uses(TREES[name])}


@pytest.mark.parametrize("what", ALLOWED)
def test_only_some_modules_use(what: str) -> None:
    assert {name for name, tree in TREES.items() if what in uses(tree)} <= ALLOWED[what]


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_rest_on_pure_modules(name: str) -> None:
    assert not uses(TREES[name])
    assert inner(TREES[name]) <= PURE[name] <= set(PURE)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"__init__"}))
def test_direction(name: str) -> None:
    row = {module: index for index, modules in enumerate(LAYOUT) for module in modules}
    assert {other for other in inner(TREES[name]) if row[other] >= row[name]} == set()


# ---- in a fresh interpreter


def fresh(code: str) -> Any:
    """What ``code`` prints as JSON, run by an interpreter of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


IMPORT = """
import json, os, sys, threading, time
before, start = dict(os.environ), time.perf_counter()
import {module}
seconds = time.perf_counter() - start
heavy = [name for name in ("torch", "transformers", "numpy", "deepspeed", "accelerate") if name in sys.modules]
print(json.dumps([seconds, heavy, threading.active_count(), dict(os.environ) == before]))
"""


@pytest.mark.parametrize("module", ["ows_ds", "ows_ds.cli.main"])
def test_importing_does_no_work(module: str) -> None:
    seconds = []
    for _ in range(5):
        took, heavy, threads, same_environment = fresh(IMPORT.format(module=module))
        assert heavy == []
        assert threads == 1
        assert same_environment
        seconds.append(took)
        if took < 0.5:
            break
    assert min(seconds) < 0.5


ALL = """
import importlib, json, sys
for name in {extras}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError, looking for it finds nothing
for name in {modules}:
    importlib.import_module("ows_ds." + name if name != "__init__" else "ows_ds")
import torch
print(json.dumps([
    torch.distributed.is_initialized(), torch.cuda.is_initialized(),
    [name for name in {extras} if sys.modules[name] is not None], "deepspeed" in sys.modules,
    sys.modules["ows_ds"].OWS.__module__, hasattr(sys.modules["ows_ds"], "nothing"),
]))
"""


def test_every_module_imports_without_the_extras() -> None:
    """What only the demo, MPI or the tests need is not needed to import anything; DeepSpeed waits until it is used."""
    result = fresh(ALL.format(extras=EXTRAS, modules=sorted(FILES)))
    assert result == [False, False, [], False, "ows_ds.optim.ows", False]
