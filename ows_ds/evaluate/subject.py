"""What is evaluated: the model of a run, one of its checkpoints, a folder, or a name on the hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ows_ds import checkpoint, config, files
from ows_ds.compat.transformers import commit_hash
from ows_ds.config import Recipe
from ows_ds.distributed.communicator import Communicator, fail_together
from ows_ds.distributed.weights import Replicated
from ows_ds.errors import UserError, first_line
from ows_ds.evaluate.setting import Evaluation
from ows_ds.model.fingerprint import fingerprint
from ows_ds.runs.results import FOLDER, file_name

ELSEWHERE = Path("runs")  # where results of models without a run are written


@dataclass(frozen=True)
class Subject:
    """A model to load.

    name: for people and for names of files. path: a folder, or a name on the hub. run, recipe: of its run, where it
    has one. step: name of the run's checkpoint; None: the finished model.
    """

    name: str
    path: str
    revision: str | None = None
    run: Path | None = None
    step: str | None = None
    recipe: Recipe | None = None

    @property
    def results(self) -> Path:
        """The folder of its results."""
        return (self.run or ELSEWHERE) / FOLDER

    @property
    def about(self) -> dict[str, Any]:
        """Its part of a result."""
        where = str(self.run) if self.step else self.path
        return {"name": self.name, "path": where, "revision": self.revision, "checkpoint": self.step}


def find(given: str, evaluation: Evaluation) -> Subject:
    """The model that ``given`` names. Raises UserError for a run without the model or checkpoint."""
    folder = Path(given)
    if not (folder / "config.yaml").is_file():
        local = folder.is_dir()
        if local and not (folder / "config.json").is_file():
            raise UserError("MODEL", given, "expected the folder of a model, with its config.json, or of a run")
        return Subject(_name(folder) if local else given, given, evaluation.revision)
    recipe = config.from_dict(files.read_yaml(folder / "config.yaml", "MODEL"))
    name, step = _name(folder), evaluation.checkpoint
    if step is not None:
        return Subject(f"{name}-{step}", str(folder), None, folder, step, recipe)
    if not (folder / "model" / "config.json").is_file():
        steps = checkpoint.checkpoints(folder)
        right = f"--checkpoint {steps[0].name} with it" if steps else "a run that has a model or a checkpoint"
        raise UserError("MODEL", given, f"expected {right}: this one is not finished")
    return Subject(name, str(folder / "model"), None, folder, None, recipe)


def base_of(subject: Subject) -> Subject:
    """The model that the run of ``subject`` began with."""
    assert subject.recipe is not None
    model = subject.recipe.model
    name = _name(Path(model.path)) if os.path.isdir(model.path) else model.path
    return Subject(f"{name} (base)", model.path, model.revision, recipe=subject.recipe)


@contextmanager
def on_disk(subject: Subject, comm: Communicator) -> Iterator[str]:
    """Within it: a folder (or name) from which the model can be loaded. Collective.

    Rank 0 exports a checkpoint into a new folder of the run, which all hosts see, and removes it afterwards.
    """
    if subject.step is None:
        yield subject.path
        return
    assert subject.run is not None
    with ExitStack() as stack:
        path = None
        with fail_together(comm):
            if comm.rank == 0:
                from ows_ds.train.export import export

                subject.results.mkdir(exist_ok=True)
                folder = tempfile.TemporaryDirectory(prefix=f".{subject.step}.", dir=subject.results)
                path = f"{stack.enter_context(folder)}/model"
                export(subject.run, Path(path), subject.step)
        yield str(comm.broadcast_object(path))
        comm.barrier()  # all have read it


@contextmanager
def refusing(subject: Subject) -> Iterator[None]:
    """Errors of loading it become the user's mistake."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds
        if "trust_remote_code" in str(error):
            right = "expected it, to run the Python code that comes with this model, or a model without any"
            raise UserError("--trust-remote-code", False, right) from error
        right = f"expected a model that transformers can load from safetensors ({first_line(error)})"
        raise UserError("MODEL", subject.about["path"], right) from error


def facts_of(module: nn.Module) -> dict[str, Any]:
    """A loaded model's part of a result. The fingerprint is None where some parameters lie on no device here."""
    parameters = list(module.parameters())
    here = all(parameter.device.type != "meta" for parameter in parameters)
    return {
        "commit": commit_hash(getattr(module, "config", None)),
        "fingerprint": fingerprint(Replicated(module, Communicator())) if here else None,
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in parameters),
    }


def _name(folder: Path) -> str:
    """Of a folder; that of a run or an export, where it is called model."""
    path = folder.resolve()
    return file_name(path.parent.name if path.name == "model" else path.name)
