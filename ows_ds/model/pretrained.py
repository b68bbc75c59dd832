"""A pre-trained model and its tokenizer: in full on every rank, or straight into ZeRO-3 shards."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ows_ds.compat.deepspeed import full_shape
from ows_ds.compat.transformers import attn_implementation, auto_class
from ows_ds.config import Recipe, tokens_of_pass
from ows_ds.distributed.communicator import Communicator, fail_together
from ows_ds.distributed.formats import Format, has_fp8_products, require_bitsandbytes
from ows_ds.distributed.frozen import frozen_of, named_weights
from ows_ds.distributed.launch import Runtime
from ows_ds.distributed.weights import Replicated, Weights
from ows_ds.distributed.zero3 import InShards, Zero3, Zero3AdamW
from ows_ds.errors import UserError, first_line, one_line
from ows_ds.files import read_text
from ows_ds.model.blocks import ModelLayers
from ows_ds.model.layers import find_layers
from ows_ds.model.loading import Make, Source, Unsharded
from ows_ds.model.parts import gathered_at_once, tile_length
from ows_ds.model.shapes import check_shared
from ows_ds.model.tiled import names_within

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def load_model(
    recipe: Recipe, runtime: Runtime, adapt: Callable[[Any], Any] | None = None, deepspeed_trains: bool = False
) -> tuple[Weights, ModelLayers]:
    """The pre-trained model on the run's devices, in full or straight into shards, and its layers. Collective.

    adapt: what is done to the model before it is sharded, such as adding adapters; the layers are those before.
    deepspeed_trains: under ZeRO-3 DeepSpeed's own optimizer trains what requires gradients.
    Raises UserError (``model.path``) for what transformers cannot load and for models that have no layers.
    """
    from transformers.integrations import HfDeepSpeedConfig

    config = runtime.ds_config
    device = runtime.device
    _check_offload(recipe, config)
    model = pretrained(recipe, runtime.comm, device, config, frozen=True)
    _check_shared(recipe, model.config)
    layers = find_layers(model, None if config is None else full_shape)
    real = let_freeze(model, _formats(recipe, layers, device), _maker(device, runtime.comm, config))
    use_cache(model, False)
    if recipe.optim.router == "freeze":  # what DeepSpeed trains is what requires gradients
        for name in layers.router_names:
            model.get_parameter(name).requires_grad_(False)
    plain = model
    if adapt is not None:
        keep = None if config is None else HfDeepSpeedConfig(config)  # while this object lives, peft knows of shards
        model = adapt(model)
        del keep
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embedding's output require gradients, which would drag every backward pass to the input
        model.disable_input_require_grads()
    weights: Weights
    if config is None:
        weights = Replicated(model, runtime.comm)
    else:
        tile = tile_length(recipe.train.tiled_mlp, tokens_of_pass(recipe), layers.embeddings[-1].shape[1])
        at_once = gathered_at_once(layers, recipe.train.kernels == "compile", tile)
        at_once = names_within(model, plain, at_once)
        if deepspeed_trains:
            weights = Zero3AdamW(model, config, runtime.comm, recipe.optim.max_grad_norm, at_once)
        else:
            weights = Zero3(model, config, runtime.comm, at_once)
    weights.freeze(real)
    return weights, layers


def _check_offload(recipe: Recipe, ds_config: dict[str, Any] | None) -> None:
    zero = {} if ds_config is None else ds_config["zero_optimization"]
    if recipe.model.frozen != "same" and (zero.get("offload_param") or {}).get("device", "none") != "none":
        right = "expected same: under DeepSpeed's offload_param weights lie in the host's memory already"
        raise UserError("model.frozen", recipe.model.frozen, right)


def _check_shared(recipe: Recipe, config: Any) -> None:
    """Refuse (UserError) a model whose rows ranks cannot share, where they are to."""
    check_shared(config, recipe.train.sequence_parallel)
    kernel = attn_implementation(config)
    if recipe.train.sequence_parallel > 1 and kernel != "sdpa" and "flash" not in kernel:
        right = "expected sdpa or FlashAttention under train.sequence_parallel, if the model has one of them"
        raise UserError("model.attn_implementation", kernel, right)


def _maker(device: torch.device, comm: Communicator, ds_config: dict[str, Any] | None) -> Make:
    return Unsharded(device, comm.rank == 0) if ds_config is None else InShards(ds_config)


def formats(layers: ModelLayers, name: str, dtype: torch.dtype, products: bool = False) -> dict[str, Format]:
    """Of the matrices that are in few bits while frozen (``model.frozen``), by name. products: see `Format`."""
    if name == "nf4":
        require_bitsandbytes("model.frozen", name)
    matrices = (matrix for block in layers.layers for matrix in block.matrices) if name != "same" else ()
    return {m.name: Format(name, m.shape, m.inputs_first, m.experts, dtype=dtype, products=products) for m in matrices}


def _formats(recipe: Recipe, layers: ModelLayers, device: torch.device) -> dict[str, Format]:
    model = recipe.model
    products = {"always": True, "never": False, "auto": has_fp8_products(device)}[model.fp8_matmul]
    return formats(layers, model.frozen, DTYPES[model.dtype], products and model.frozen == "fp8")


def let_freeze(model: nn.Module, formats: Mapping[str, Format], make: Make) -> list[nn.Parameter]:
    """The matrices of ``formats`` that ``model`` has as they are, now with a place for their codes.

    Before ``model`` becomes `Weights`, whose `freeze` takes them.
    """
    parameters, found = dict(named_weights(model)), {}
    for name, format in formats.items():
        if frozen_of(parameters[name]) is None:
            found[id(parameters[name])] = make.later(parameters[name], format)
    for module in model.modules():
        for key, parameter in named_weights(module, recurse=False):
            if id(parameter) in found:
                found[id(parameter)].use_in(module, key)
    return [one.real for one in found.values()]


def pretrained(
    recipe: Recipe,
    comm: Communicator,
    device: torch.device,
    ds_config: dict[str, Any] | None = None,
    frozen: bool = False,
) -> Any:
    """The model of ``model.path``: in full, with entries on rank 0 alone, or in shards (ds_config). Collective.

    frozen: as ``model.frozen`` says, matrices are in few bits as they are read; where transformers loads them they are
    real.
    Each rank reads its own part. Where transformers has to load the checkpoint, rank 0 logs why.
    Raises UserError (``model.path``) for what cannot be loaded.
    """
    source: Source
    with fail_together(comm), _refusing(recipe, Exception), suppress_output():
        source = Source(recipe.model, DTYPES[recipe.model.dtype], recipe.loss.name == "reward")
    comm.assert_consistent("how the model is loaded", source.why_not)
    if source.why_not is None:
        with fail_together(comm), _refusing(recipe, OSError, ValueError, SafetensorError):
            make = _maker(device, comm, ds_config)
            few_bits = frozen and recipe.model.frozen != "same"
            model = source.fill(make, device, _formats(recipe, find_layers(source.model), device) if few_bits else {})
    elif recipe.loss.name == "reward":
        right = f"expected a model whose files need no change for a new head: {source.why_not}"
        raise UserError("model.path", recipe.model.path, right)
    else:
        if comm.rank == 0:
            says = f"model.path: {source.why_not}: transformers loads it, which needs memory for all of it on rank 0"
            logger.info(one_line(says))
        model, lost = _by_transformers(recipe, device, ds_config)
        with fail_together(comm):
            if lost:  # transformers would continue with random numbers
                missing = f"{len(lost)} of its weights are missing: {lost[0]}"
                right = f"expected a checkpoint that fits its config.json ({missing})"
                raise UserError("model.path", recipe.model.path, right)
    with fail_together(comm), _refusing(recipe, ValueError, TypeError, KeyError, AttributeError):
        if comm.rank == 0:  # what transformers would refuse to write after training, such as a generation_config.json
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder, state_dict={})
    return model


def _by_transformers(recipe: Recipe, device: torch.device, ds_config: dict[str, Any] | None) -> tuple[Any, list[str]]:
    """The model, and which of its weights are not in its files, as far as this rank has seen."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    # while this object lives, transformers builds models in shards; not in float64
    sharded = ds_config is not None and recipe.model.dtype != "float64"
    keep = HfDeepSpeedConfig(ds_config) if sharded else None
    with _refusing(recipe, OSError, ValueError, SafetensorError):
        trusted = {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}
        described = AutoConfig.from_pretrained(recipe.model.path, **trusted)
        own_code = "AutoModelForCausalLM" in (getattr(described, "auto_map", None) or {})
        auto = AutoModelForCausalLM if own_code else auto_class(described)
        model, found = auto.from_pretrained(
            recipe.model.path,
            dtype=DTYPES[recipe.model.dtype],
            attn_implementation=recipe.model.attn_implementation,
            **trusted,
            use_safetensors=True,  # other files would be unpickled
            output_loading_info=True,
        )
    del keep
    lost = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    return model if ds_config is not None else model.to(device), lost


def use_cache(model: Any, use: bool) -> None:
    """Whether the model keeps keys and values of earlier tokens; in training it must not."""
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "use_cache"):
            config.use_cache = use


def load_tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer, with the chat template of the recipe where it gives one.

    Raises UserError (``model.path``) where there is none, ``data.chat_template`` for what is no template.
    """
    from transformers import AutoTokenizer

    # tokenizers raises no kind but Exception
    with _refusing(recipe, Exception, right="expected a model with a tokenizer"), suppress_output():
        tokenizer = AutoTokenizer.from_pretrained(
            recipe.model.path, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
        )
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = _chat_template(recipe.data.chat_template, tokenizer)
    return tokenizer


def _chat_template(path: str, tokenizer: Any) -> str:
    """The text of a file, which is a template."""
    import jinja2

    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError("data.chat_template", path, f"expected a readable Jinja file ({error})") from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=text, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        where = f"{path}:{error.lineno}"
        raise UserError("data.chat_template", where, f"expected a Jinja template ({error})") from error
    except Exception:  # a template may refuse this chat with any error, and yet suit the chats of the data
        logger.debug("%s does not take a chat of one user message", path)
    return text


@contextmanager
def _refusing(
    recipe: Recipe, *kinds: type[Exception], right: str = "expected a model that transformers can load"
) -> Iterator[None]:
    """What the files of ``model.path`` may raise, as a UserError: all of ``kinds`` but a lack of memory."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        raise _refuse(recipe, right, error) from error


def _refuse(recipe: Recipe, right: str, error: Exception) -> UserError:
    said, attention = first_line(error), recipe.model.attn_implementation
    if "trust_remote_code" in str(error):
        right = "expected true to run the Python code that comes with this model, or a model without any"
        return UserError("model.trust_remote_code", recipe.model.trust_remote_code, right)
    if (Path(recipe.model.path) / "adapter_config.json").is_file():
        right = (
            "expected a model: this folder holds an adapter, which peft's merge_and_unload merges into its base model"
        )
    if attention is not None and ("FlashAttention" in said or attention in said or "attn_implementation" in said):
        return UserError(
            "model.attn_implementation", attention, f"expected a kernel that transformers has here, or null ({said})"
        )
    return UserError("model.path", recipe.model.path, f"{right} ({said})")


@contextmanager
def suppress_output() -> Iterator[None]:
    """Within it transformers does not warn: what is wrong while it reads settings, it refuses, or we do."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def free_memory() -> None:
    """Free the memory of models that are no longer used: they have cycles of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
