"""A Hugging Face checkpoint from a model in training, or from a run's checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ows_ds.communicate import Communicator, together
from ows_ds.errors import UserError
from ows_ds.weights import Replicated, Weights


@torch.no_grad()
def save_model(weights: Weights, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer to ``folder``, which appears when it is complete.

    Coordinates must be folded. Process 0 puts the weights together on its CPU, one parameter after the other.
    Collective. ``folder`` must not exist.
    """
    comm = weights.comm
    module: Any = weights.module
    state = {}
    for name, parameter in module.named_parameters():
        whole = weights.whole(parameter)
        if comm.index == 0:
            state[name] = whole.to("cpu", copy=True)
    with together(comm):
        if comm.index == 0:
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            persistent = module.state_dict().keys()
            state.update({name: buffer.cpu() for name, buffer in module.named_buffers() if name in persistent})
            module.save_pretrained(partial, state_dict=state)
            tokenizer.save_pretrained(partial)
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors lets nobody but the owner read
            partial.rename(folder)


def export(run_dir: Path, out_dir: Path, name: str | None) -> None:
    """``out_dir`` <- the model of a run's checkpoint, the newest complete one or the one called ``name`` (``step-N``).

    One process, no launcher, on the CPU. Raises UserError for a folder that is no run, a checkpoint that is missing
    or damaged, another base model, and an ``out_dir`` that exists.
    """
    from ows_ds import checkpoint, config, methods
    from ows_ds.layers import find_layers
    from ows_ds.runtime import load_tokenizer, pretrained, quieten
    from ows_ds.scoring import importance

    if out_dir.exists():
        raise UserError("out_dir", str(out_dir), "give a folder that does not exist yet")
    quieten()
    comm = Communicator()
    if not (run_dir / "config.yaml").is_file():
        raise UserError("run_dir", str(run_dir), "give the folder of a run, with its config.yaml")
    recipe = config.from_dict(config.read_yaml(run_dir / "config.yaml"))
    if name is not None:
        opened = checkpoint.open_checkpoint(run_dir / "checkpoints" / name, comm, key="checkpoint")
    else:
        newest, passed = checkpoint.find(run_dir, "auto", comm)
        for line in passed:
            print(f"passed over a checkpoint: {line}")
        if newest is None:
            raise UserError("run_dir", str(run_dir), "give a run with a complete checkpoint")
        opened = newest

    model = pretrained(recipe)
    layers = find_layers(model)
    weights = Replicated(methods.adapt(recipe, model), comm)
    method = methods.build(recipe, weights, layers, importance(recipe, weights, layers, run_dir), 1)
    method.restore(opened.numbers["method"], opened.read)
    method.close()
    save_model(weights, load_tokenizer(recipe), out_dir)
    print(f"{out_dir}: {opened.folder.name} of {run_dir}")
