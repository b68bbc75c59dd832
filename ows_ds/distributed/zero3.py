"""DeepSpeed's ZeRO-3 as a home for frozen weights. The only module that touches DeepSpeed's internals.

The engine is made without an optimizer: DeepSpeed shards the weights, prefetches and gathers them, and owns no
gradient, no optimizer state and no float32 copy. What it needs from us in return is in ``docs/design.md``.
"""

from __future__ import annotations

import inspect
import io
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.weights import CHUNK, Fill, add_low_rank, interval
from ows_ds.errors import UserError, first_line
from ows_ds.files import parse_json, read_text

ZeroParameter = Any  # an nn.Parameter to which DeepSpeed has added ds_shape, ds_numel, ds_tensor, ds_status

DEFAULT_CONFIG: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        # entries: what may be gathered at a time, and how far ahead it is fetched
        "stage3_max_live_parameters": 5e8,
        "stage3_max_reuse_distance": 5e8,
        "stage3_prefetch_bucket_size": 5e7,
    },
    "steps_per_print": 1_000_000_000,
}


COMPILING = 120.0  # seconds; it takes about one minute
# sections of DeepSpeed's that train in a way of their own where they are enabled
OWN_TRAINING = (
    "amp", "elasticity", "progressive_layer_drop", "curriculum_learning", "data_efficiency", "hybrid_engine",
)  # fmt: skip
_COORDINATOR = "_PartitionedParameterCoordinator"  # whose private names begin with this


def _kept_answers(coordinator: type) -> Any:
    """The cache of what to release after which module, which outlives what was recorded: it is below a decorator."""
    decorated = getattr(coordinator, f"{_COORDINATOR}__params_to_release")
    return inspect.getclosurevars(decorated).nonlocals["func"]


_sent = Counter[str]()  # bytes that DeepSpeed's collectives have sent from this process and no Zero3 has booked yet


def _count_collectives() -> None:
    """Let DeepSpeed's ways of gathering weights and of reducing gradients, one each, say how much they send."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters

    gather, reduce = partition_parameters._dist_allgather_fn, coalesced_collectives._torch_reduce_scatter_fn
    if hasattr(gather, "counted"):
        return

    def counting_gather(part: Tensor, whole: Tensor, group: Any = None) -> Any:
        _sent["weights"] += whole.nbytes - part.nbytes
        return gather(part, whole, group)

    def counting_reduce(whole: Tensor, part: Tensor, *arguments: Any, **named: Any) -> Any:
        _sent["full_rank_gradients"] += whole.nbytes - part.nbytes
        return reduce(whole, part, *arguments, **named)

    counting_gather.counted = True  # type: ignore[attr-defined]
    partition_parameters._dist_allgather_fn = counting_gather
    coalesced_collectives._torch_reduce_scatter_fn = counting_reduce


def free_operator() -> None:
    """Remove the lock of a process that was killed while it compiled DeepSpeed's CPU operator; else all wait for it.

    A lock that nobody on this host holds may be another host's, in a shared folder: it gets `COMPILING` seconds.
    """
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory("deepspeed_shm_comm", False)) / "lock"
    told = False
    with suppress(FileNotFoundError):
        while not _held(lock):
            age = time.time() - lock.stat().st_mtime
            if age > COMPILING:
                lock.unlink()
                print(f"{lock} removed: nobody has been compiling DeepSpeed's operator for {age:.0f} s", flush=True)
            elif not told:
                told = True
                wait = f"waiting up to {COMPILING - age:.0f} s"
                print(f"{lock}: {wait} for another host to compile DeepSpeed's operator", flush=True)
            time.sleep(0.2)


def _held(path: Path) -> bool:
    """Whether a process on this host has the file open, as far as we may know."""
    where = str(path.resolve(strict=True))
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(descriptor) == where:
                return True
    return False


def join_deepspeed() -> None:
    """Let DeepSpeed know of the process group that there is; before a model is built in shards. Collective."""
    import deepspeed

    with redirect_stdout(io.StringIO()):  # it prints that its CPU operator is there
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def read_config(path: str) -> dict[str, Any]:
    """A DeepSpeed file. Raises UserError (``train.ds_config``) for what is no JSON object."""
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError("train.ds_config", path, f"expected a JSON file ({error})") from None
    if not isinstance(found, dict):
        raise UserError("train.ds_config", path, "expected a JSON object of sections and settings")
    return found


def check_config(config: dict[str, Any], key: str = "train.ds_config") -> None:
    """Refuse (UserError) what does not work with frozen weights that are merged now and then."""
    zero = _section(config, "zero_optimization", key)
    if zero.get("stage") != 3:
        raise UserError(
            f"{key}: zero_optimization.stage", zero.get("stage"), "expected 3: it is what shards frozen weights"
        )
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(f"{key}: {section}", config[section], "leave it out: the recipe's optim section decides")
    for section in OWN_TRAINING:
        if _section(config, section, key).get("enabled"):
            right = "leave it out: it changes what is trained, and how, beside the recipe"
            raise UserError(f"{key}: {section}", config[section], right)
    if config.get("gradient_clipping", "auto") not in ("auto", 0):
        right = "leave it out: the recipe's optim.max_grad_norm decides"
        raise UserError(f"{key}: gradient_clipping", config["gradient_clipping"], right)
    in_memory = "expected none or cpu: shards on NVMe are not in memory when they are merged"
    own = "expected none: DeepSpeed offloads optimizers of its own, and none of them trains here"
    for name, refused, right in (("offload_param", ["nvme"], in_memory), ("offload_optimizer", ["cpu", "nvme"], own)):
        device = _section(zero, name, f"{key}: zero_optimization").get("device")
        if device in refused:
            raise UserError(f"{key}: zero_optimization.{name}.device", device, right)
    for name, right in (
        ("zero_quantized_weights", "expected false: every gather would round frozen weights to 8 bits, on GPUs alone"),
        ("zero_quantized_nontrainable_weights", "expected false: merges into shards of 8 bits would be lost"),
    ):
        if zero.get(name):
            raise UserError(f"{key}: zero_optimization.{name}", zero[name], right)


def _section(config: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    """A section of a DeepSpeed file, empty where it has none. Raises UserError for what is no section."""
    found = config.get(name)
    if not isinstance(found, dict | None):
        raise UserError(f"{key}: {name}", found, "expected a section, such as {}")
    return found or {}


def check_by_deepspeed(config: dict[str, Any], key: str = "train.ds_config") -> None:
    """Refuse (UserError) settings of ``zero_optimization`` that DeepSpeed does not know, or not of this type."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except (TypeError, ValueError) as error:  # pydantic's is a ValueError, with one entry for each mistake
        mistakes: list[dict[str, Any]] = error.errors() if hasattr(error, "errors") else []
        first = mistakes[0] if mistakes else {}
        name = ".".join(map(str, ["zero_optimization", *first.get("loc", ())]))
        right = f"expected what DeepSpeed takes ({first.get('msg') or first_line(error)})"
        raise UserError(f"{key}: {name}", first.get("input"), right) from None


def resolve_config(
    config: dict[str, Any],
    dtype: str,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    per_host: int | None = None,
    key: str = "train.ds_config",
) -> dict[str, Any]:
    """A copy of ``config`` with what must agree with the recipe filled in. Raises UserError as `check_config`.

    dtype: ``model.dtype``, the number format of the shards. per_host: processes of a host, where they are as many on
    each and their numbers follow one another: what hpZ's ``"auto"`` means. key: what errors name.
    """
    check_config(config, key)
    for name, format in (("bf16", "bfloat16"), ("fp16", "float16")):
        if _section(config, name, key).get("enabled", "auto") not in ("auto", dtype == format):
            right = f'expected "auto"; the recipe\'s model.dtype is {dtype}'
            raise UserError(f"{key}: {name}.enabled", config[name]["enabled"], right)
    zero = {
        **config["zero_optimization"],
        # edits of a shard are ignored by the live copy of a parameter that is kept gathered
        "stage3_param_persistence_threshold": 0,
    }
    group = zero.get("zero_hpz_partition_size", 1)
    if group == "auto":
        group = per_host or 1
    if type(group) is not int or group < 1 or world_size % group:
        right = f'expected "auto", or a divisor of the {world_size} processes'
        raise UserError(f"{key}: zero_optimization.zero_hpz_partition_size", group, right)
    zero["zero_hpz_partition_size"] = 1 if group == world_size else group  # a group of all is what there is without
    sizes = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world_size,
    }
    for name, value in sizes.items():
        if config.get(name, "auto") not in ("auto", value):
            raise UserError(f"{key}: {name}", config[name], f'expected "auto"; the recipe makes it {value}')
    rest = {key: value for key, value in config.items() if key not in ("bf16", "fp16", "gradient_clipping")}
    return {**rest, **sizes, "bf16": {"enabled": dtype == "bfloat16"}, "zero_optimization": zero}


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter that may be in shards."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def in_shards(config: dict[str, Any]) -> Callable[[tuple[int, ...], torch.dtype, Fill], ZeroParameter]:
    """A maker of parameters that lie in DeepSpeed's shards from the beginning (see `ows_ds.model.loading.Make`).

    config: from `resolve_config`. The process group must be known (`join_deepspeed`). Nothing is sent: each process
    asks for the entries of its own shard alone.
    """
    import deepspeed

    init = deepspeed.zero.Init(config_dict_or_path=config, zero_param_parallel_group=_hpz_group(config))
    if init.mem_efficient_linear:
        init._enable_mem_efficient_linear()  # torch's own keeps the gathered weight for the backward pass

    def make(shape: tuple[int, ...], dtype: torch.dtype, fill: Fill) -> ZeroParameter:
        # of this memory nothing is touched but the process's own interval, which DeepSpeed copies into the shard
        parameter: ZeroParameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=init.local_device))
        init._convert_to_deepspeed_param(parameter)
        rank, world_size = parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size
        start, stop = interval(parameter.ds_numel, rank, world_size)
        fill(start, parameter.data.view(-1)[start:stop])
        parameter.partition()
        parameter.ds_secondary_tensor = None  # under hpZ: what was copied there was the untouched memory
        return parameter

    return make


def _hpz_group(config: dict[str, Any]) -> Any:
    """This process's group of those that hold all weights together under hpZ, made if need be; None without hpZ."""
    from deepspeed.utils import groups

    size = config["zero_optimization"]["zero_hpz_partition_size"]
    if size > 1 and groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group() if size > 1 else None


def _engine(module: nn.Module, config: dict[str, Any], **optimizer: Any) -> Any:
    import deepspeed

    join_deepspeed()
    _hpz_group(config)  # DeepSpeed expects it where there is no optimizer
    adapted: Any
    for adapted in module.modules():
        # peft's DoRA reads the weight of the module beside it, which DeepSpeed would have released by then
        for magnitude in getattr(adapted, "lora_magnitude_vector", {}).values():
            deepspeed.zero.register_external_parameter(magnitude, adapted.base_layer.weight)
    return deepspeed.initialize(model=module, config=config, dist_init_required=False, **optimizer)[0]


class Zero3:
    """Weights as DeepSpeed's shards (see `ows_ds.distributed.weights.Weights` for what the methods do)."""

    sharded = True

    def __init__(self, module: nn.Module, config: dict[str, Any], comm: Communicator) -> None:
        """module: the model, plain or already loaded into shards under ``deepspeed.zero.Init``. Collective.

        config: a DeepSpeed configuration from `resolve_config`.
        """
        module.requires_grad_(False)
        self._take(_engine(module, config), comm)

    @classmethod
    def adopt(cls, engine: Any, comm: Communicator) -> Zero3:
        """A DeepSpeed engine that was made with ZeRO-3 and without an optimizer. Raises UserError for any other."""
        if engine.zero_optimization_stage() != 3 or not hasattr(engine.optimizer, "partition_all_parameters"):
            raise UserError("model", "a DeepSpeed engine with an optimizer", "make it with ZeRO-3 and no optimizer")
        kept = [name for name, p in engine.module.named_parameters() if getattr(p, "ds_persist", False)]
        if kept:
            right = "expected 0: edits of a shard are ignored where the weight is kept gathered"
            raise UserError("zero_optimization.stage3_param_persistence_threshold", f"{len(kept)} weights kept", right)
        weights = cls.__new__(cls)
        weights._take(engine, comm)
        return weights

    def _take(self, engine: Any, comm: Communicator) -> None:
        self.engine = engine
        self.module: nn.Module = engine.module
        self.comm = comm
        self.device = torch.device(engine.device)
        # with an optimizer of its own, DeepSpeed keeps what it does with weights one level below
        self._offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        self._went_back = False  # whether the last pass had a backward pass
        self._traced_backward = False  # whether what the prefetcher recorded, or records, has a backward pass
        _count_collectives()
        _sent.clear()
        # first of all, whoever calls the module
        self.module.register_forward_pre_hook(lambda module, inputs: self._follow(), prepend=True)
        for name, parameter in self.module.named_parameters():
            size = math.ceil(parameter.ds_numel / comm.world_size)
            if parameter.ds_tensor.ds_numel != size:
                raise RuntimeError(f"{name}: DeepSpeed's shard has {parameter.ds_tensor.ds_numel} entries, not {size}")

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def _follow(self) -> None:
        """Before a forward pass: let DeepSpeed's prefetcher record anew if it has recorded other passes than come now.

        What it has recorded says which weights to keep gathered for their next use. A record of evaluations has no
        backward pass; one of a backward pass that went further down keeps what is not used again.
        """
        coordinator = self._offload.get_param_coordinator()
        steps, recorded = (getattr(coordinator, f"{_COORDINATOR}__{name}") for name in ("step_id", "submodule_order"))
        shorter = self._went_back and steps < len(recorded)
        if not coordinator.is_invalid_trace() and (
            (torch.is_grad_enabled() and not self._traced_backward) or (coordinator.is_complete_trace() and shorter)
        ):
            coordinator._invalidate_trace()
        self._went_back = False
        if coordinator.is_invalid_trace():
            _kept_answers(type(coordinator)).cache_clear()
            self._traced_backward = torch.is_grad_enabled()

    def shape(self, parameter: ZeroParameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)

    def interval(self, parameter: ZeroParameter) -> tuple[int, int]:
        return interval(parameter.ds_numel, self.comm.rank, self.comm.world_size)

    def local(self, parameter: ZeroParameter) -> Tensor:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
            # a gathered copy would hide the edit, or (in a world of one) receive it twice
            raise RuntimeError(f"{parameter.ds_summary()} is gathered; its shard must not be touched now")
        # hpZ's copy of the host would not see an edit: the next gather makes it anew, out of the shards
        parameter.ds_secondary_tensor = None
        start, stop = self.interval(parameter)
        shard: Tensor = parameter.ds_tensor
        return shard.data[: stop - start]

    def resident_slice(self, parameter: ZeroParameter) -> tuple[int, Tensor]:
        return self.interval(parameter)[0], self.local(parameter)

    def publish(self, parameters: list[ZeroParameter]) -> None:
        for parameter in parameters:  # as in `local`, on the processes too that had no entry to write
            parameter.ds_secondary_tensor = None

    def write(self, parameters: Sequence[ZeroParameter], values: Sequence[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            start, stop = self.interval(parameter)
            self.local(parameter).copy_(value.reshape(-1)[start:stop])

    def merge(
        self, parameter: ZeroParameter, left: Tensor, right: Tensor, decay: float, noise: str | None = None
    ) -> None:
        start, _ = self.interval(parameter)
        local = self.local(parameter)
        add_low_rank(local, start, parameter.ds_shape[1], left.to(local.device), right.to(local.device), decay, noise)

    def backward(self, loss: Tensor) -> None:
        (loss / self.comm.world_size if self.comm.world_size > 1 else loss).backward()
        self._offload.release_backward_leftovers()
        self._went_back = True

    def gathered(self, parameters: Iterable[ZeroParameter]) -> AbstractContextManager[None]:
        import deepspeed

        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
        return context

    def after_step(self) -> None:
        self._offload.partition_all_parameters()
        self.comm.sent.update(_sent)
        _sent.clear()

    def full_tensor(self, parameter: ZeroParameter) -> Tensor:
        size = math.ceil(parameter.ds_numel / self.comm.world_size)
        return self._gather(parameter, 0, size)[: parameter.ds_numel].view(parameter.ds_shape)

    def runs(self, parameter: ZeroParameter) -> Iterator[tuple[int, Tensor]]:
        size = math.ceil(parameter.ds_numel / self.comm.world_size)
        length = math.ceil(CHUNK / self.comm.world_size)
        for at in range(0, size, length):
            length = min(length, size - at)
            gathered = self._gather(parameter, at, length)
            for index in range(self.comm.world_size):
                start = index * size + at
                if start < parameter.ds_numel:
                    yield start, gathered[index * length : (index + 1) * length][: parameter.ds_numel - start]
            del gathered  # before the next is there

    def _gather(self, parameter: ZeroParameter, at: int, length: int) -> Tensor:
        """``length`` entries of every process's shard, from its entry ``at`` on, one after the other."""
        # the CPU is where DeepSpeed keeps the shards if it is told to offload them
        part = self.local(parameter)[at : at + length].to(self.device)
        if part.numel() < length:  # the last shards are shorter
            part = torch.nn.functional.pad(part, (0, length - part.numel()))
        return self.comm.all_gather(part, "export")


class Zero3AdamW(Zero3):
    """ZeRO-3 with DeepSpeed's own optimizer around torch's AdamW, as its users run it.

    What requires gradients trains, in float32 copies that DeepSpeed keeps: not for float64.
    """

    def __init__(
        self, module: nn.Module, config: dict[str, Any], comm: Communicator, max_grad_norm: float | None
    ) -> None:
        """Collective. config: from `resolve_config`, which says how many micro-batches make a step."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        trained = [p for p in module.parameters() if p.requires_grad]
        # as usual, neither biases nor norms decay
        groups = [[p for p in trained if (len(full_shape(p)) > 1) == decayed] for decayed in (True, False)]
        optimizer = torch.optim.AdamW(
            [{"params": group, "decayed": len(full_shape(group[0])) > 1} for group in groups if group]
        )
        config = {**config, "gradient_clipping": max_grad_norm or 0.0, "zero_allow_untested_optimizer": True}
        self._take(_engine(module, config, optimizer=optimizer), comm)
        self._micro, self._steps = 0, config["gradient_accumulation_steps"]
        optimizer = self.engine.optimizer
        self.states: dict[str, dict[str, Tensor]] = {}
        """Of each weight that trains: master, exp_avg, exp_avg_sq (1-D, this process's interval), step. Live."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            # moments of zero before the first step: there is a state to save and to restore at any time
            moments = {kind: torch.zeros_like(flat.data) for kind in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32)
            optimizer.optimizer.state[flat] = {"step": step, **moments}
            for parameter in parameters:
                start, stop = self.interval(parameter)
                whole = {
                    "master": safe_get_local_fp32_param(parameter),
                    **{kind: safe_get_local_optimizer_state(parameter, kind) for kind in moments},
                }
                own = {kind: tensor.data[: stop - start] for kind, tensor in whole.items()}
                self.states[names[parameter]] = {"step": step, **own}

    def __call__(self, **batch: Any) -> Any:
        self.engine.set_gradient_accumulation_boundary(self._micro + 1 == self._steps)
        return self.engine(**batch)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)  # it averages over processes by itself
        self._micro += 1

    def step(self, settings: dict[str, Any], vectors: dict[str, Any]) -> Tensor:
        """One step of AdamW with these settings for matrices and vectors. Returns the gradient's norm. Collective."""
        for group in self.engine.optimizer.param_groups:
            group.update(settings if group["decayed"] else vectors)
        self.engine.step()
        self._micro = 0
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
