"""A Hugging Face checkpoint from a model in training, or from a run's checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ows_ds.communicate import Communicator
from ows_ds.errors import UserError
from ows_ds.weights import Replicated, Weights


@torch.no_grad()
def save_model(weights: Weights, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer to ``folder``, which appears when it is complete.

    Coordinates must be folded. Process 0 puts the weights together on its CPU, one parameter after the other.
    Collective. Raises UserError where ``folder`` exists.
    """
    comm = weights.comm
    module: Any = weights.module
    state = {}
    for name, parameter in module.named_parameters():
        whole = weights.whole(parameter)
        if comm.index == 0:
            state[name] = whole.to("cpu", copy=True)
    error: Exception | None = None
    if comm.index == 0:
        try:
            if folder.exists():
                raise UserError("folder", str(folder), "give one that does not exist yet")
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            persistent = module.state_dict().keys()
            state.update({name: buffer.cpu() for name, buffer in module.named_buffers() if name in persistent})
            module.save_pretrained(partial, state_dict=state)
            tokenizer.save_pretrained(partial)
            partial.rename(folder)
        except Exception as caught:
            error = caught
    comm.all_good(error)


def export(run_dir: Path, out_dir: Path, name: str | None) -> None:
    """``out_dir`` <- the model of a run's checkpoint, the newest complete one or the one called ``name`` (``step-N``).

    One process, no launcher, on the CPU. Raises UserError for a folder that is no run, a checkpoint that is missing
    or damaged, and an ``out_dir`` that exists.
    """
    from ows_ds import checkpoint, config
    from ows_ds.optimizer import OWS
    from ows_ds.runtime import DTYPES, load_tokenizer
    from ows_ds.score import Scores

    if out_dir.exists():
        raise UserError("out_dir", str(out_dir), "give a folder that does not exist yet")
    comm = Communicator()
    if not (run_dir / "config.yaml").is_file():
        raise UserError("run_dir", str(run_dir), "give the folder of a run, with its config.yaml")
    recipe = config.from_dict(config.read_yaml(run_dir / "config.yaml"))
    which = "auto" if name is None else str(run_dir / "checkpoints" / name)
    opened, passed = checkpoint.find(run_dir, which, comm)
    for line in passed:
        print(f"passed over a checkpoint: {line}")
    if opened is None:
        raise UserError("run_dir", str(run_dir), "give a run with a complete checkpoint")

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.path, revision=recipe.model.revision, dtype=DTYPES[recipe.model.dtype]
    )
    weights = Replicated(model, comm)
    ows = OWS(
        weights,
        scores=Scores.read(run_dir / "scores.json"),
        gamma=recipe.sampling.gamma,
        scheme=recipe.sampling.scheme,
        rank=recipe.optim.rank,
        refresh_gap=recipe.optim.refresh_gap,
        always_on=recipe.optim.always_on,
    )
    ows.restore(opened.numbers["ows"], opened.read)
    ows.close()
    save_model(weights, load_tokenizer(recipe), out_dir)
    print(f"{out_dir}: {opened.folder.name} of {run_dir}")
