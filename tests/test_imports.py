"""Who may import what: packages in one direction, private names of libraries in compat/ alone, no work on import."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ows_ds"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}

# A package imports, also inside its functions, only from its own row and from those above.
ROWS = [
    ["errors", "files", "tables", "shipped"], ["compat"], ["config"], ["distributed"], ["model"], ["data"],
    ["checkpoint"], ["importance"], ["optim"], ["methods"], ["planner"], ["runs"], ["train"], ["evaluate"], ["bench"],
    ["slurm"], ["integrations"], ["cli", "__main__"],
]  # fmt: skip
ROW = {package: row for row, packages in enumerate(ROWS) for package in packages}
# Who may use what; all other modules may not.
ALLOWED = {
    "torch.distributed": {"distributed.communicator", "distributed.launch", "compat.torch"},
    "deepspeed": {"distributed.zero3", "distributed.ds_config", "compat.deepspeed"},
    "accelerate": {"distributed.launch", "model.loading", "train.log", "train.trackers"},
    "os.environ": {
        "bench.worker",
        "distributed.launch",
        "distributed.own_ranks",
        "evaluate.judge",
        "train.log",
        "train.trackers",
    },
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
# Private names of objects that libraries make, also where a module of ours calls something of its own so.
OF_LIBRARIES = {
    "_attn_implementation", "_buffers", "_cdata", "_commit_hash", "_instances", "_modules", "_name_or_path",
    "_opt_called", "_parameters", "_version",
}  # fmt: skip


def imports(tree: ast.AST) -> Iterator[str]:
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


def uses(tree: ast.AST) -> set[str]:
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
    return found


def defined(tree: ast.AST) -> set[str]:
    """Names of functions, classes, variables and own attributes that a module defines."""
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and dotted(node.value) in ("self", "cls")}  # fmt: skip
    return own


def private_names(tree: ast.AST, own: set[str]) -> set[str]:
    """Private names of libraries that a module uses. own: names that its package defines.

    Those that it imports; other attributes and keywords than its own, also through getattr and the like;
    `OF_LIBRARIES`; and DeepSpeed's marks on parameters. The standard library's ``os._exit`` is documented.
    """
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and dotted(node) != "os._exit":
            base = dotted(node.value)
            mine = node.attr in own and (base in ("self", "cls") or "." not in base)
            names = [] if mine and node.attr not in OF_LIBRARIES else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if not str(node.module).startswith("ows_ds")]
        elif isinstance(node, ast.Call):
            names = [str(keyword.arg) for keyword in node.keywords]
            if dotted(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
                names += [one.value for one in node.args[1:2] if isinstance(one, ast.Constant)]
        found |= {name for name in names if re.fullmatch(r"_[a-zA-Z]\w*|ds_(?!config)\w+", name)}
        if isinstance(node, ast.Constant) and node.value in OF_LIBRARIES:
            found.add(node.value)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from torch import distributed", {"torch.distributed"}),
        ("import torch\ndef f():\n    return torch.distributed.get_rank()", {"torch.distributed"}),
        ("def f():\n    import deepspeed", {"deepspeed"}),
        ("from accelerate.utils import x", {"accelerate"}),
        ("import os\nx = os.getenv('RANK')", {"os.environ"}),
        ("import torch\nx = torch.load(y, weights_only=True)", {"data that runs"}),
        ("import subprocess\nsubprocess.run('ls', shell=True)", {"data that runs"}),
        ("import yaml\nyaml.unsafe_load('')", {"data that runs"}),
        ("import deepspeed_like\ndef f(model):\n    model.eval()\n    model.load()", set()),
        ("import torch\ntorch._foreach_norm([])", {"_foreach_norm"}),
        ("from transformers.x import _y", {"_y"}),
        ("def f(p):\n    return p.ds_tensor, hasattr(p, 'ds_id'), p.ds_config", {"ds_tensor", "ds_id"}),
        ("class A:\n    def f(self):\n        self._parameters = {}", {"_parameters"}),
        ("vars(x)['_buffers']", {"_buffers"}),
        ("f(_raise=1)", {"_raise"}),
        ("class A:\n    def _f(self):\n        return self._f, A._f, os._exit, self.__class__", set()),
        ("def _f():\n    x.y._f", {"_f"}),
    ],
)
def test_the_rules_can_be_broken(text: str, expected: set[str]) -> None:
    tree = ast.parse(text)
    assert uses(tree) | private_names(tree, defined(tree)) == expected


@pytest.mark.parametrize("name", sorted(set(FILES) - {"__init__"}))
def test_a_module(name: str) -> None:
    """It imports from rows above, and neither what only others may use nor, outside of compat/, private names."""
    tree = TREES[name]
    package = name.partition(".")[0]
    inner = {one.split(".")[1] for one in imports(tree) if one.startswith("ows_ds.")} - {"OWS", "__version__"}
    assert {one for one in inner if ROW[one] > ROW[package]} == set()
    assert {what for what in uses(tree) if name not in ALLOWED[what]} == set()
    if package != "compat":
        own = set().union(*(defined(other) for at, other in TREES.items() if at.partition(".")[0] == package))
        assert private_names(tree, own) == set()
    else:
        assert inner <= {"compat", "errors", "files"}


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
        took, *rest = fresh(IMPORT.format(module=module))
        assert rest == [[], 1, True]
        seconds.append(took)
        if took < 0.5:
            break
    assert min(seconds) < 0.5


PLAN = """
import contextlib, io, json, sys
from ows_ds.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    code = main(["plan", "--model.path", "{name}", *"{words}".split()])
heavy = [name for name in ("torch", "transformers", "deepspeed", "accelerate", "peft", "matplotlib", "scipy", "pandas",
                           "datasets", "huggingface_hub") if name in sys.modules]
print(json.dumps([code, heavy, len(sys.modules) < 600]))
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama2-7b", "--cluster 1x4090"),  # where only 8 bits fit
        ("llama3-70b", "--cluster 8x8xH100"),
        ("qwen3-8b", "--cluster 8xA100-80 --methods lisa,full --json"),
    ],
)
def test_a_plan_of_a_model_that_is_known_by_name_loads_no_library(name: str, words: str) -> None:
    assert fresh(PLAN.format(name=name, words=words)) == [0, [], True]


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
