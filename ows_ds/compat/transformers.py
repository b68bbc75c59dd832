"""Private names of transformers, as of 5.17 to 5.23."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn

# ------------------------------------------------------------------ packed sequences

_rows: list[Tensor | None] = []  # the innermost `known_rows` last; autograd's threads, which recompute, see it too


@contextmanager
def known_rows(rows: Tensor | None) -> Iterator[None]:
    """Within it, transformers takes from ``rows`` which rows are packed in a sequence.

    rows: the number of its row for each token; None: one row a sequence. Without it, transformers finds the rows from
    the positions and waits for the device in each forward pass: in ``find_packed_sequence_indices``, and with
    FlashAttention in each layer.
    """
    _look_up_rows()
    _rows.append(rows)
    try:
        yield
    finally:
        _rows.pop()


def _look_up_rows() -> None:
    """Replace both functions, once for the process: outside of `known_rows` they do what they did."""
    from transformers import masking_utils, modeling_flash_attention_utils

    if hasattr(masking_utils.find_packed_sequence_indices, "looks_up_rows"):
        return
    find, is_packed = masking_utils.find_packed_sequence_indices, modeling_flash_attention_utils._is_packed_sequence

    def find_packed_sequence_indices(position_ids: Any) -> Any:
        return _rows[-1] if _rows else find(position_ids)

    def is_packed_sequence(position_ids: Any, batch_size: Any) -> Any:
        return False if _rows else is_packed(position_ids, batch_size)

    find_packed_sequence_indices.looks_up_rows = True  # type: ignore[attr-defined]
    masking_utils.find_packed_sequence_indices = find_packed_sequence_indices
    modeling_flash_attention_utils._is_packed_sequence = is_packed_sequence


_attends: list[Callable[..., Any]] = []  # the innermost `attention_by` last; autograd's threads see it, too


@contextmanager
def attention_by(attend: Callable[..., Any]) -> Iterator[None]:
    """Within it, models call ``attend(name, kernel, module, query, key, value, mask, **more)`` in place of an attention
    ``kernel``, which transformers knows by ``name``, and make no masks. Not where a model runs ``eager`` attention.
    """
    _let_attention_be_replaced()
    _attends.append(attend)
    try:
        yield
    finally:
        _attends.pop()


def _let_attention_be_replaced() -> None:
    """Register functions that ask `attention_by`, for the process: outside of it they do what they did.

    Under their own names, by which models' code tells kernels apart, as DeepSpeed does it.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def asks(name: str, kernel: Callable[..., Any], masks: bool) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def call(*arguments: Any, **more: Any) -> Any:
            if not _attends:
                return kernel(*arguments, **more)
            return None if masks else _attends[-1](name, kernel, *arguments, **more)

        call.asks = True  # type: ignore[attr-defined]
        return call

    known: tuple[tuple[Any, bool], ...] = ((ALL_ATTENTION_FUNCTIONS, False), (ALL_MASK_ATTENTION_FUNCTIONS, True))
    for interface, masks in known:
        for name, kernel in list(interface.items()):
            if "eager" not in name and not hasattr(kernel, "asks"):
                interface.register(name, asks(name, kernel, masks))


def attn_implementation(config: Any) -> str:
    """The attention kernel that a model runs; the public argument of that name is not an attribute."""
    return str(getattr(config, "_attn_implementation", None) or "")


# ------------------------------------------------------------------ configurations and files


def commit_hash(config: Any) -> str | None:
    """The commit on the hub that a configuration was read from."""
    found: str | None = getattr(config, "_commit_hash", None)
    return found


def auto_class(config: Any) -> Any:
    """Which of transformers' classes makes the model of a configuration: that with the class that its checkpoint names,
    of causal language models and of models of images and text; the former where it names none of either."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    autos, named = (AutoModelForCausalLM, AutoModelForImageTextToText), set(getattr(config, "architectures", ()) or ())
    known = [auto for auto in autos if type(config) in auto._model_mapping]
    for auto in known:
        classes = auto._model_mapping[type(config)]
        if named & {kind.__name__ for kind in (classes if isinstance(classes, tuple) else (classes,))}:
            return auto
    return (*known, AutoModelForCausalLM)[0]


def reward_class(config: Any) -> Any:
    """transformers' class of models that give a row one number. Changes ``config`` for it."""
    from transformers import AutoModelForSequenceClassification

    config.num_labels = 1
    return AutoModelForSequenceClassification


def is_registered(config: Any) -> bool:
    """Whether a causal language model is known for a configuration of this class: loading one from code that comes with
    a model makes it known, and from then on ``from_config`` takes no ``code_revision``."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping


def forget_origin(config: Any) -> None:
    """Let a configuration be written without the path that it was read from."""
    for name in ("_name_or_path", "_model_name_or_path"):
        vars(config).pop(name, None)


def ignored_on_load(model: Any) -> list[str]:
    """Patterns of a checkpoint's tensors that the model does not want."""
    return list(model._keys_to_ignore_on_load_unexpected or ())


def ignored_on_save(model: Any) -> set[str]:
    """Names of the state dict that the model does not write."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def only_stacks(conversion: Any) -> bool:
    """Whether a conversion of weights stacks matrices of experts, after those of one expert lie one under the other."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    merge, *others = conversion.operations
    stacked = isinstance(merge, MergeModulelist) and merge.dim == 0
    return stacked and all(isinstance(one, Concatenate) and one.dim == 1 for one in others) and len(others) < 2


def keeps_float32(model: Any) -> bool:
    """Whether some of the model's weights stay in float32 when the others are bfloat16."""
    return bool(model._keep_in_fp32_modules_strict)


def cached_file(path: str, name: str, revision: str) -> str | None:
    """A file of a model, downloaded if need be; None where the model has no such file.

    The public way raises the same OSError for a missing file and for a hub that does not answer.
    """
    from transformers.utils.hub import cached_file

    found: str | None = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return found


@contextmanager
def without_sharding() -> Iterator[None]:
    """Within it, transformers builds models in full, even if the launcher has set ZeRO-3 up.

    The public functions set and unset its reference to the DeepSpeed configuration, and none reads it.
    """
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


# ------------------------------------------------------------------ layers


def model_in(model: Any) -> Any:
    """The model without the adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


CHECKPOINT = "_gradient_checkpointing_func"  # the function that a layer, or a model, computes parts of itself with


def checkpointed(layer: nn.Module) -> tuple[str, Callable[..., Any]] | None:
    """The name of the attribute by which a layer checkpoints itself, and what it is; None where it does not."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = getattr(layer, CHECKPOINT, None)
    on = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    return (CHECKPOINT, found) if on and found is not None else None


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward pass of a module's class, to be called with the module: of a layer that checkpoints itself, what it
    checkpoints; of one whose own attribute takes the place of the class', such as Liger's, that one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    own: Any = module.__dict__.get("forward")
    if isinstance(own, MethodType) and own.__self__ is module:
        own = own.__func__
    elif own is not None:
        return lambda _, *args, **kwargs: own(*args, **kwargs)
    found: Callable[..., Any] = own or type(module).forward
    return getattr(found, "__wrapped__", found) if isinstance(module, GradientCheckpointingLayer) else found


LIGER = {  # its losses aside: `ows_ds.train.loss` has one that knows of coordinates
    "rope": True, "rms_norm": True, "layer_norm": True, "swiglu": True, "geglu": True,
    "cross_entropy": False, "fused_linear_cross_entropy": False,
}  # fmt: skip


def has_liger() -> bool:
    """Whether Liger's kernels are installed."""
    from transformers.utils import is_liger_kernel_available

    return bool(is_liger_kernel_available())


def use_liger(model: Any) -> tuple[int, Callable[[], None]]:
    """Let a model's modules use Liger's kernels. Returns how many modules have changed, and what gives them back.

    Liger sets attributes of modules, and functions of the Python module that defines the model. Stacks of experts keep
    their own code, which knows of coordinates.
    """
    from transformers.integrations.liger import apply_liger_kernel

    base = model_in(model)
    owners: list[Any] = [*base.modules(), *{sys.modules[type(one).__module__] for one in base.modules()}]
    before = [dict(vars(owner)) for owner in owners]
    apply_liger_kernel(model, LIGER)
    undo: list[Callable[[], None]] = []
    changed = 0
    for owner, old in zip(owners, before, strict=True):
        names = [name for name in {*vars(owner), *old} if vars(owner).get(name, owner) is not old.get(name, owner)]
        if not names:
            continue
        back = functools.partial(_restore, owner, {name: old[name] for name in names if name in old}, names)
        if isinstance(owner, nn.Module) and any(p.dim() > 2 for p in owner.parameters(recurse=False)):
            back()
            continue
        undo.append(back)
        changed += isinstance(owner, nn.Module)

    def undo_all() -> None:
        for back in undo:
            back()

    return changed, undo_all


def _restore(owner: Any, old: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name in old:
            vars(owner)[name] = old[name]
        else:
            vars(owner).pop(name, None)


# ------------------------------------------------------------------ chat templates

GENERATION = "_generation_support"  # of the extension that reads {% generation %}


def compiled_template(source: str) -> Any:
    """A chat template in the sandbox that transformers runs it in: a `jinja2.Template`, with its environment."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template(source)


def template_messages(messages: Sequence[Any]) -> list[Any]:
    """Messages, without None in them, as `apply_chat_template` hands them to the template: copies, with reasoning under
    all its names. As they are under versions (5.17) that do neither."""
    from transformers.utils import chat_template_utils as utils

    found = list(messages)
    for name in ("_plain_template_data", "_alias_reasoning_fields"):
        found = getattr(utils, name, lambda same: same)(found)
    return found


# ------------------------------------------------------------------ the Trainer


class CheckpointHooks:
    """Public names for the places where a Trainer writes and reads a checkpoint, before a Trainer's class.

    Callbacks cannot take their part: `on_save` comes after older checkpoints were deleted, and none comes while a
    checkpoint is loaded.
    """

    def write_model(self, folder: str | None, in_checkpoint: bool) -> None:
        """What `save_model` does, for users and (in_checkpoint) for a checkpoint."""
        super().save_model(folder, in_checkpoint)  # type: ignore[misc]

    def write_all_but_weights(self, folder: Path) -> None:
        """Configuration, tokenizer and arguments. On rank 0."""
        self._save(str(folder), state_dict={})  # type: ignore[attr-defined]

    def write_state(self, checkpoint: Path) -> None:
        """Called while a checkpoint is written, before the state of optimizer and scheduler is. Collective."""

    def open_state(self, checkpoint: Path) -> None:
        """Called in place of loading a checkpoint's model, before training."""

    def load_state(self) -> None:
        """Called before the state of the scheduler is loaded, or where there is none to load."""

    def load_best(self, checkpoint: Path) -> None:
        """Called in place of loading the best model at the end of training."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.write_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.write_state(Path(output_dir))
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.open_state(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_state()
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        self.load_best(Path(self.state.best_model_checkpoint))  # type: ignore[attr-defined]
