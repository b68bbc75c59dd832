"""Who may import what: packages rest on each other in one direction, and importing them does no work."""

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

# A module imports, also inside its functions, only from its own package and from those before it.
ORDER = [
    "errors", "files", "tables", "compat", "config", "distributed", "model", "data", "checkpoint", "importance",
    "optim", "methods", "planner", "runs", "train", "evaluate", "bench", "slurm", "integrations", "cli", "__main__",
]  # fmt: skip
# Packages that may import a library; all others may not.
ALLOWED = {
    "torch.distributed": {"compat", "distributed"},
    "deepspeed": {"compat", "distributed"},
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


def package(module: str) -> str:
    return module.partition(".")[0]


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of all that a module imports, anywhere in it: ``a`` and ``a.b`` of ``from a import b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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
    for what, where in (("torch.distributed", names), ("deepspeed", imported)):
        if any(name == what or name.startswith(f"{what}.") for name in where):
            found.add(what)
    called = {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if (imported | called) & RUNNING or any(getattr(node, "arg", None) == "shell" for node in ast.walk(tree)):
        found.add("data that runs")
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
        ("def f():\n    import pickle", {"data that runs"}),
        ("import torch\nx = torch.load(y, weights_only=True)", {"data that runs"}),
        ("def f(text):\n    return eval(text)", {"data that runs"}),
        ("import subprocess\nsubprocess.run('ls', shell=True)", {"data that runs"}),
        ("import yaml\nyaml.unsafe_load('')", {"data that runs"}),
        ("def f(model):\n    model.eval()\n    model.load()", set()),
        ("import os, torch\nfrom torch import nn\nimport deepspeed_like\nos.path", set()),
    ],
)
def test_the_rules_can_be_broken(text: str, expected: set[str]) -> None:
    assert uses(ast.parse(text)) == expected


def test_every_package_has_its_place() -> None:
    assert {package(name) for name in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("what", ALLOWED)
def test_only_some_packages_use(what: str) -> None:
    assert {package(name) for name, tree in TREES.items() if what in uses(tree)} <= ALLOWED[what]


@pytest.mark.parametrize("name", sorted(set(FILES) - {"__init__"}))
def test_direction(name: str) -> None:
    own = {found.split(".")[1] for found in imports(TREES[name]) if found.startswith("ows_ds.")} & set(ORDER)
    assert {other for other in own if ORDER.index(other) > ORDER.index(package(name))} == set()


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
