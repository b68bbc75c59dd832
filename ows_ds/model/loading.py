"""A checkpoint's safetensors files -> a model of which each rank reads its own part, and nothing else.

The model is made without memory for its parameters. Then each of them gets its memory, or its shard, and its entries,
one after the other: a rank never has more than its part and one tensor. Where a checkpoint's tensors are neither the
model's one to one nor those of single experts (`Source.why_not`), transformers loads it instead.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ows_ds import config, files
from ows_ds.compat.transformers import (
    auto_class,
    cached_file,
    ignored_on_load,
    is_registered,
    keeps_float32,
    only_stacks,
    reward_class,
    without_sharding,
)
from ows_ds.distributed.formats import Format
from ows_ds.distributed.frozen import Fill, Frozen, without_memory
from ows_ds.errors import UserError
from ows_ds.model.tensor_files import Files


class Make(Protocol):
    """Gives a model's parameters their memory."""

    def parameter(self, shape: tuple[int, ...], dtype: torch.dtype, fill: Fill) -> nn.Parameter:
        """A parameter of which this rank has asked ``fill`` for its own entries."""

    def frozen(self, format: Format, fill: Fill) -> Frozen:
        """A matrix in few bits. ``fill`` stays its source, of all its entries or of some."""

    def later(self, real: nn.Parameter, format: Format) -> Frozen:
        """The same of a matrix that is real now; its codes have no memory."""


class Source:
    """A model without memory, and the files that its entries lie in. Nothing here communicates.

    why_not: None, or why transformers has to load this checkpoint.
    """

    def __init__(self, model: config.Model, dtype: torch.dtype, reward: bool = False) -> None:
        """reward: with a head that gives a row one number, new where the files have none.

        Raises UserError (``model.path``) where tensors are missing, left over or of another shape, where the model
        is quantised, and where it has no safetensors files.

        Raises whatever transformers does where configuration or files are missing or damaged.
        """
        import transformers as tf
        from accelerate import init_empty_weights

        self.dtype = dtype
        self.files = Files([])
        self.keys: dict[str, tuple[str, ...]] = {}
        described = tf.AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        if getattr(described, "quantization_config", None) is not None:
            raise _quantised(model, "as its config.json says")
        if getattr(described, "transformers_weights", None) is not None:
            self.why_not: str | None = "its config.json names its files"
            return
        paths = _find(model)
        if not paths:
            right = "expected a model with safetensors files; transformers' save_pretrained makes them of others"
            raise UserError("model.path", model.path, right)
        how: dict[str, Any] = (
            {} if model.attn_implementation is None else {"attn_implementation": model.attn_implementation}
        )
        own_code = model.trust_remote_code and "AutoModelForCausalLM" in (getattr(described, "auto_map", None) or {})
        if own_code and not is_registered(described):  # it has not run yet
            how["code_revision"] = model.revision
        # with their buffers: some are computed and not stored
        with without_sharding(), init_empty_weights(include_buffers=False):
            auto = tf.AutoModelForCausalLM if own_code else auto_class(described)
            auto = reward_class(described) if reward else auto
            self.model: Any = auto.from_config(described, dtype=dtype, trust_remote_code=model.trust_remote_code, **how)
        self.model.tie_weights()  # each place of a tied weight has its own empty one so far
        self.files = Files(paths)
        called, self.why_not = _called(self.model, self.files.shapes, dtype)
        if self.why_not is None:
            shapes = {name: one.shape for name, one in called.items()}
            names, self.why_not = match(self.model, shapes, model.path, reward)
            self.keys = {name: called[stored].keys for name, stored in names.items()}
            for name, parameter in self.model.named_parameters() if names else ():
                kind = self.files.dtypes[self.keys[name][0]] if name in self.keys else "F"
                if parameter.is_floating_point() and "F" not in kind:
                    raise _quantised(model, f"{name} is of {kind}")
        if self.why_not is None and self.model.can_generate() and _cached(model, "generation_config.json"):
            # otherwise the model's own, made from its configuration
            self.model.generation_config = tf.GenerationConfig.from_pretrained(model.path, revision=model.revision)

    def fill(self, make: Make, device: torch.device, frozen: Mapping[str, Format] | None = None) -> Any:
        """The model with its entries, parameters by ``make`` and buffers on ``device``, in evaluation mode.

        frozen: the matrices that are in few bits from the beginning, by name.
        """
        formats = {id(self.model.get_parameter(name)): format for name, format in (frozen or {}).items()}
        made: dict[int, tuple[nn.Parameter, nn.Parameter | Frozen]] = {}  # the empty one too: its id must stay taken
        for prefix, module in self.model.named_modules():
            for last, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(parameter) not in made:
                    keys = self.keys.get(f"{prefix}.{last}".lstrip("."))
                    dtype = self.dtype if parameter.is_floating_point() else parameter.dtype
                    reader = _fresh(tuple(parameter.shape)) if keys is None else self._reader(keys)
                    format = formats.get(id(parameter))
                    if format is None:
                        made[id(parameter)] = parameter, make.parameter(tuple(parameter.shape), dtype, reader)
                    else:
                        made[id(parameter)] = parameter, make.frozen(format, reader)
                found = made[id(parameter)][1]
                if isinstance(found, Frozen):
                    found.use_in(module, last)
                else:
                    setattr(module, last, found)
            for last, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                name = f"{prefix}.{last}".lstrip(".")
                if name in self.keys:
                    self._reader(self.keys[name])(0, buffer.view(-1))
                setattr(module, last, buffer.to(device))
        return self.model.eval()

    def _reader(self, keys: tuple[str, ...]) -> Fill:
        """Of the files' tensors, laid end to end."""
        ends = list(itertools.accumulate(math.prod(self.files.shapes[key]) for key in keys))

        def read(start: int, out: Tensor) -> None:
            for key, first, last in zip(keys, [0, *ends], ends, strict=False):
                a, b = max(start, first), min(start + out.numel(), last)
                if a < b:
                    self.files.read(key, a - first, out[a - start : b - start])

        return read


def _fresh(shape: tuple[int, ...]) -> Fill:
    """Of a new head: small random numbers, always the same."""

    def read(start: int, out: Tensor) -> None:
        values = torch.empty(shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).view(-1)
        out.copy_(values[start : start + out.numel()])

    return read


class Unsharded:
    """A `Make` of parameters in full on this rank."""

    def __init__(self, device: torch.device, reads: bool) -> None:
        """reads: otherwise their entries come from another rank."""
        self.device, self.reads = device, reads

    def parameter(self, shape: tuple[int, ...], dtype: torch.dtype, fill: Fill) -> nn.Parameter:
        values = torch.empty(shape, dtype=dtype, device=self.device)
        if self.reads:
            fill(0, values.view(-1))
        return nn.Parameter(values, requires_grad=values.is_floating_point())

    def frozen(self, format: Format, fill: Fill) -> Frozen:
        if self.reads:
            codes, scales = format.quantise(self.parameter(format.full_shape, format.dtype, fill).data)
        else:
            codes, scales = (
                torch.empty(shape, dtype=torch.uint8, device=self.device)
                for shape in (format.codes_shape, format.scales_shape)
            )
        real = nn.Parameter(without_memory(format.full_shape, format.dtype, self.device))
        return Frozen(format, real, _bytes(codes), _bytes(scales), source=fill)

    def later(self, real: nn.Parameter, format: Format) -> Frozen:
        codes, scales = (
            _bytes(without_memory(shape, torch.uint8, self.device))
            for shape in (format.codes_shape, format.scales_shape)
        )
        return Frozen(format, real, codes, scales, resting=False)


def _bytes(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def match(
    model: Any, stored: Mapping[str, tuple[int, ...]], path: str, new_head: bool = False
) -> tuple[dict[str, str], str | None]:
    """The name in the files of each parameter and saved buffer of ``model``, or why there is none.

    stored: shapes by name. A file of the model without its head has names without the first word. Tied parameters may
    be stored under any of their names. new_head: what is not the base model's may be missing, and another head there.
    Raises UserError (``model.path``) where the two do not fit.
    """
    prefix = f"{model.base_model_prefix}."
    names: dict[int, list[str]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    parameters = set(tensors)
    saved = set(model.state_dict())
    tensors |= {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    keys: dict[str, str] = {}
    used, missing, wrong = set(), [], []
    for aliases in names.values():
        found = [key for name in aliases for key in {name, name.removeprefix(prefix)} if key in stored]
        used.update(found)
        if len(found) > 1:
            return {}, f"tied weights are stored as {' and '.join(found)}"
        if found:
            shape = tuple(tensors[aliases[0]].shape)
            if stored[found[0]] != shape:
                wrong.append(f"{found[0]} is {stored[found[0]]} in place of {shape}")
            keys |= dict.fromkeys(aliases, found[0])
        elif aliases[0] in parameters and (not new_head or aliases[0].startswith(prefix)):
            missing.append(aliases[0])
    ignored = [*ignored_on_load(model), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    ignored += [r"^lm_head\."] if new_head else []
    left = [key for key in stored if key not in used and not any(re.search(word, key) for word in ignored)]
    problems = [
        f"{len(what)} {text}: {', '.join(sorted(what)[:3])}{', ...' if len(what) > 3 else ''}"
        for what, text in (
            (missing, "of its weights are missing"),
            (left, "tensors are not the model's"),
            (wrong, "tensors have another shape"),
        )
        if what
    ]
    if problems:
        raise UserError("model.path", path, f"expected a checkpoint that fits its config.json ({'; '.join(problems)})")
    return keys, None


def _quantised(model: config.Model, why: str) -> UserError:
    return UserError(
        "model.path", model.path, f"expected a model that is not quantised ({why}): merges add to its weights"
    )


def _find(model: config.Model) -> list[Path]:
    """The checkpoint's safetensors files, in the order in which transformers looks for them; perhaps none."""
    from transformers.utils.hub import get_checkpoint_shard_files

    if path := _cached(model, "model.safetensors"):
        return [Path(path)]
    path = _cached(model, "model.safetensors.index.json")
    if not path:
        return []
    names = files.parse_json(Path(path).read_text(encoding="utf-8"))["weight_map"].values()
    if outside := sorted({name for name in names if Path(name).name != name or not name.endswith(".safetensors")}):
        right = "expected a model whose index names safetensors files of its own folder"
        raise UserError("model.path", f"{model.path}: {outside[0]}", right)
    shards = get_checkpoint_shard_files(model.path, path, revision=model.revision or "main")[0]
    return [Path(shard) for shard in shards]


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def processor_files(model: config.Model) -> list[Path]:
    """Files of a model that takes more than text, which who loads it whole asks for."""
    return [Path(found) for name in PROCESSOR_FILES if (found := _cached(model, name))]


def _cached(model: config.Model, name: str) -> str | None:
    return cached_file(model.path, name, model.revision or "main")


@dataclass(frozen=True)
class _Stored:
    """A tensor as the model knows it: the files' tensors ``keys``, laid end to end, in this shape."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]


def _called(
    model: Any, stored: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[dict[str, _Stored], str | None]:
    """What the files hold, by the names that transformers reads it under; or why it changes more than names.

    stored: shapes by the files' names. Matrices of single experts make a stack: (E, rows, columns), in which those of
    one expert, such as gate and up, lie one under the other.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    if dtype == torch.bfloat16 and keeps_float32(model):
        return {}, "some of its weights must stay in float32"
    conversions = get_model_conversion_mapping(model)
    called: dict[str, _Stored] = {}
    stacks: dict[str, dict[str, list[str]]] = {}  # name -> keys by the converter's patterns, in its order
    for key, shape in stored.items():
        name, pieces = key, None
        for conversion in conversions:
            name, pattern = conversion.rename_source_key(name)
            if pattern is not None and isinstance(conversion, WeightConverter):
                if pieces is not None or not only_stacks(conversion):
                    return {}, f"transformers converts {key}"
                pieces = stacks.setdefault(name, {one: [] for one in conversion.source_patterns})
                pieces[pattern].append(key)
        if pieces is None:
            called[name] = _Stored((key,), shape)
    for name, by_pattern in stacks.items():
        rows = [sorted(keys, key=dot_natural_key) for keys in by_pattern.values() if keys]
        experts = list(zip(*rows, strict=False))
        shapes = {tuple(stored[key] for key in expert) for expert in experts}
        if len({len(row) for row in rows}) > 1 or len(shapes) > 1 or len({s[1:] for s in next(iter(shapes))}) > 1:
            return {}, f"the tensors of {name} differ"
        [one] = shapes
        shape = (len(experts), sum(piece[0] for piece in one), *one[0][1:])
        called[name] = _Stored(tuple(key for expert in experts for key in expert), shape)
    return called, None
