"""A Hugging Face checkpoint from a model in training, or from a run's checkpoint."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from ows_ds.compat.transformers import ignored_on_save
from ows_ds.distributed.communicator import Communicator, fail_together
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.errors import Failed, UserError, one_line
from ows_ds.model.fingerprint import fingerprint
from ows_ds.model.tensor_files import Writer
from ows_ds.runs import card

logger = logging.getLogger(__name__)

FILE_SIZE = "5GB"  # of a file of a model, at most, as on the hub


def save_model(
    weights: Weights,
    tokenizer: Any,
    folder: Path,
    file_size: str = FILE_SIZE,
    card_of: Callable[[str], str | None] | None = None,
    more: Iterable[Path] = (),
) -> None:
    """Write weights (safetensors), configuration and tokenizer to ``folder``, which appears when it is complete.

    Low-rank updates must be merged. Rank 0 writes; the others send it their shards in runs of entries, so that no rank
    needs more memory than for its shard and a run. Only for a model whose tensors differ from those of its family's
    files does rank 0 gather everything. file_size: of a file, at most; a larger tensor has a file of its own. card_of:
    fingerprint of the weights -> text of the model card, called on rank 0.
    more: files that are copied. Collective. ``folder`` must not exist. Raises Failed, and leaves nothing behind, where
    the disk does not take it.
    """
    comm, module = weights.comm, cast(Any, weights.module)
    partial = folder.with_name(folder.name + ".partial")
    with _written(comm, partial):
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            module.save_pretrained(partial, state_dict={})  # all but the weights
            tokenizer.save_pretrained(partial)
            for file in more:
                shutil.copy(file, partial / file.name)
            let_older_read(partial)
    save_weights(weights, partial, file_size)
    name = None if card_of is None else fingerprint(weights)
    with _written(comm, partial):
        if comm.rank == 0:
            text = None if card_of is None else card_of(str(name))
            if text is not None:
                (partial / card.FILE).write_text(text, encoding="utf-8")
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors lets nobody but the owner read
            partial.rename(folder)


@contextmanager
def _written(comm: Communicator, folder: Path) -> Iterator[None]:
    """As `fail_together`, around what rank 0 writes to ``folder``, which is removed where the disk does not take it."""
    with fail_together(comm):
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)  # at once: it frees space for others
            what = folder.with_name(folder.name.removesuffix(".partial"))
            raise Failed(one_line(f"{what} could not be written ({type(error).__name__}: {error})")) from None


@torch.no_grad()
def let_older_read(folder: Path) -> None:
    """Add to a model's config.json what transformers 4 and the servers of its time look for; they would take defaults
    for what transformers 5 has under other names, such as the base of rotary positions. And a tokenizer class that they
    know by the name that it had."""
    path = folder / "config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    for part in (described, described.get("text_config")):
        if not isinstance(part, dict):
            continue
        if "dtype" in part:
            part.setdefault("torch_dtype", part["dtype"])
        rope = part.get("rope_parameters")
        kinds = rope if isinstance(rope, dict) else {}
        local = kinds.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:  # Gemma 3
            part.setdefault("rope_local_base_freq", local["rope_theta"])
        main = kinds.get("full_attention") if isinstance(kinds.get("full_attention"), dict) else kinds
        if isinstance(main, dict) and "rope_theta" in main:
            part.setdefault("rope_theta", main["rope_theta"])
            scaled = {
                name: value for name, value in main.items() if name not in ("rope_theta", "partial_rotary_factor")
            }
            part.setdefault("rope_scaling", None if scaled.get("rope_type") == "default" else scaled)
            if "partial_rotary_factor" in main:
                part.setdefault("partial_rotary_factor", main["partial_rotary_factor"])
    path.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_weights(weights: Weights, folder: Path, file_size: str = FILE_SIZE) -> None:
    """Write the weights alone, in safetensors, to ``folder``, which exists; otherwise as `save_model`. Collective."""
    comm, module = weights.comm, cast(Any, weights.module)
    saved = set(module.state_dict()) - ignored_on_save(module)
    everything: dict[str, Tensor] = {**weights.parameters(), **dict(module.named_buffers())}
    # the order decides which file a tensor goes to: that of transformers for a model that it has loaded
    tensors = {name: everything[name] for name in sorted(everything, key=dot_natural_key) if name in saved}

    empty = {
        name: torch.empty(weights.shape(tensor) if isinstance(tensor, nn.Parameter) else tensor.shape,
                          dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }  # fmt: skip
    names: dict[str, str | None] = {}  # in the files -> here; None: made of several
    with fail_together(comm):
        ours = {id(tensor): name for name, tensor in empty.items()}
        names = {name: ours.get(id(tensor)) for name, tensor in revert_weight_conversion(module, empty).items()}
    if None not in names.values():
        stored = {name: empty[str(own)] for name, own in names.items()}
        _stream(weights, {name: tensors[str(own)] for name, own in names.items()}, stored, folder, file_size)
        return
    state = {}
    for name, tensor in tensors.items():
        full = weights.full_tensor(tensor) if isinstance(tensor, nn.Parameter) else tensor
        if comm.rank == 0:
            state[name] = full.to("cpu", copy=True)
    with _written(comm, folder):
        if comm.rank == 0:
            module.save_pretrained(folder, state_dict=state, max_shard_size=file_size)


def _stream(
    weights: Weights, tensors: dict[str, Tensor], empty: dict[str, Tensor], folder: Path, file_size: str
) -> None:
    """Write ``tensors`` (parameters, possibly sharded, and buffers) to ``folder``, run by run. Collective.

    empty: their full shapes, and dtypes. Both by the names in the files.
    """
    comm = weights.comm
    plan = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=file_size
    )
    for file, names in plan.filename_to_tensors.items():
        writer = None
        with _written(comm, folder):
            if comm.rank == 0:
                writer = Writer(folder / file, {name: empty[name] for name in names})
        for name in names:
            error = None
            for start, run in _runs(weights, tensors[name]):
                try:
                    if writer is not None and error is None:
                        writer.write(name, start, run)
                except OSError as caught:  # the other ranks have to gather the rest of this tensor
                    error = caught
                del run  # before the next is there
            with _written(comm, folder):
                if error is not None:
                    raise error
        with _written(comm, folder):
            if writer is not None:
                writer.close()
    with _written(comm, folder):
        if comm.rank == 0 and plan.is_sharded:
            entries = sum(tensor.numel() for tensor in empty.values())
            metadata = {"total_parameters": entries, **plan.metadata}
            index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _runs(weights: Weights, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    return weights.runs(tensor) if isinstance(tensor, nn.Parameter) else iter([(0, tensor.reshape(-1))])


def export(run_dir: Path, out_dir: Path, name: str | None) -> None:
    """``out_dir`` <- the model of a run's checkpoint, the newest complete one or the one called ``name`` (``step-N``).

    One process, no launcher, on the CPU. Raises UserError for a folder that is not a run, a checkpoint that is missing
    or damaged, another base model, and an ``out_dir`` that exists.
    """
    from ows_ds import checkpoint, config, files, methods
    from ows_ds.distributed.launch import suppress_warnings
    from ows_ds.importance.scoring import layer_importance
    from ows_ds.model import generation
    from ows_ds.model.layers import find_layers
    from ows_ds.model.loading import processor_files
    from ows_ds.model.pretrained import load_tokenizer, pretrained
    from ows_ds.train import resume

    if name is not None and not checkpoint.NAME.fullmatch(name):
        raise UserError("--checkpoint", name, "expected the name of one of the run's checkpoints, such as step-20")
    if os.path.lexists(out_dir) or not files.can_be_made(out_dir):
        raise UserError("out_dir", str(out_dir), "expected a folder that does not exist yet and can be made")
    suppress_warnings()
    comm = Communicator()
    if not os.path.isfile(run_dir / "config.yaml"):
        raise UserError("run_dir", str(run_dir), "expected the folder of a run, with its config.yaml")
    recipe = config.from_dict(files.read_yaml(run_dir / "config.yaml"))
    if name is not None:
        opened = checkpoint.open_checkpoint(run_dir / "checkpoints" / name, comm, key="checkpoint")
    else:
        newest, skipped = checkpoint.find(run_dir, "auto", comm)
        for line in skipped:
            logger.info(one_line(f"skipped a checkpoint: {line}"))
        if newest is None:
            raise UserError("run_dir", str(run_dir), "expected a run with a complete checkpoint")
        opened = newest

    model = pretrained(recipe, comm, torch.device("cpu"))
    layers = find_layers(model)
    weights = Replicated(methods.adapt(recipe, model), comm)
    loaded = methods.base_model(recipe, weights)
    base = resume.base_model(opened, weights, loaded, recipe.model.path, everything=True)
    method = methods.build(recipe, weights, layers, layer_importance(recipe, weights, layers, run_dir, base), 1)
    resume.restore(method, opened)
    method.close()
    tokenizer = load_tokenizer(recipe)
    generation.stop_at(weights.module, tokenizer, opened.facts.get("stops", ()))
    steps = int(opened.folder.name.removeprefix("step-"))
    card_of = functools.partial(card.of_run, run_dir, steps)
    save_model(weights, tokenizer, out_dir, card_of=card_of, more=processor_files(recipe.model))
    logger.info(one_line(f"{out_dir}: {opened.folder.name} of {run_dir}"))
