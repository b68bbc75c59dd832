"""What is used of DeepSpeed's inside, as of 0.19.8: its marks on parameters, its prefetcher, its collectives.

DeepSpeed has no public way to read or write the shards of weights that no optimizer of its own trains, nor to say how
many bytes it sends.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ZeroParameter = Any  # an nn.Parameter to which DeepSpeed has added ds_shape, ds_numel, ds_tensor, ds_status
Count = Callable[[str, int], None]  # (name, bytes)

_COORDINATOR = "_PartitionedParameterCoordinator"  # the prefix of its private names
_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


@contextmanager
def any_dtype() -> Iterator[None]:
    """Within it an engine takes float64 weights, too, process-wide.

    DeepSpeed refuses them by an assertion where half precision is supported, on GPUs and on some CPUs; what it asserts
    of is a dtype that it uses for nothing when it takes the weights of a module that there is.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Init

    own = Init._set_dtype

    def set_dtype(self: Any, config: Any, dtype: torch.dtype | None) -> None:
        own(self, config, torch.float32 if dtype == torch.float64 else dtype)

    Init._set_dtype = set_dtype
    try:
        yield
    finally:
        Init._set_dtype = own


# ------------------------------------------------------------------ a parameter in shards


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter that may be in shards."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: ZeroParameter) -> int:
    """The number of its entries, without padding."""
    return int(parameter.ds_numel)


def shard_numel(parameter: ZeroParameter) -> int:
    """The number of entries of each rank's shard, padding included."""
    return int(parameter.ds_tensor.ds_numel)


def shard(parameter: ZeroParameter) -> Tensor:
    """This rank's shard, 1-D, padding included, to be read and written.

    Raises RuntimeError while the parameter is gathered: the gathered copy would hide what is written, or (at world
    size 1) receive it twice.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
        raise RuntimeError(f"{parameter.ds_summary()} is gathered; its shard must not be touched now")
    forget_copy(parameter)
    found: Tensor = parameter.ds_tensor.data
    return found


def set_shard(parameter: ZeroParameter, values: Tensor | None) -> None:
    """Let this rank's shard be ``values``, 1-D, without its padding; None: of no memory, until it is set again.

    Not while the parameter is gathered.
    """
    held = shard(parameter)
    if values is None:
        parameter.ds_tensor.data = held.new_empty(0)
    else:
        parameter.ds_tensor.data = torch.nn.functional.pad(values, (0, shard_numel(parameter) - values.numel()))


def forget_copy(parameter: ZeroParameter) -> None:
    """Drop the copy that hpZ keeps on each host: the next gather makes it again, from the shards as they are then."""
    parameter.ds_secondary_tensor = None


def stays_gathered(module: nn.Module) -> list[str]:
    """Names of the parameters that DeepSpeed keeps gathered: its live copy does not see what is written to a shard."""
    return [name for name, parameter in module.named_parameters() if getattr(parameter, "ds_persist", False)]


class Sharder:
    """Makes parameters that lie in shards from the beginning, one at a time: `deepspeed.zero.Init` takes modules."""

    def __init__(self, config: dict[str, Any]) -> None:
        import deepspeed

        self._init = deepspeed.zero.Init(config_dict_or_path=config, zero_param_parallel_group=hpz_group(config))
        if self._init.mem_efficient_linear:
            self._init._enable_mem_efficient_linear()  # torch's own keeps the gathered weight for the backward pass

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[ZeroParameter, int, int]:
        """A parameter, in full until `partition`, and (rank, world size) of its part here."""
        parameter = self._made(torch.empty(shape, dtype=dtype, device=self._init.local_device))
        return parameter, parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size

    def of(self, values: Tensor) -> ZeroParameter:
        """A parameter of which every rank has all ``values``, in shards."""
        parameter = self._made(values)
        self.partition(parameter)
        return parameter

    def _made(self, values: Tensor) -> ZeroParameter:
        parameter: ZeroParameter = nn.Parameter(values, requires_grad=values.is_floating_point())
        self._init._convert_to_deepspeed_param(parameter)
        return parameter

    def partition(self, parameter: ZeroParameter) -> None:
        """Keep this rank's part alone."""
        parameter.partition()
        forget_copy(parameter)  # parts of other ranks were never written


def hpz_group(config: dict[str, Any]) -> Any:
    """This rank's group of those that hold all weights together under hpZ, made if need be; None without hpZ.

    Without an optimizer of its own, DeepSpeed expects the group to be there.
    """
    from deepspeed.utils import groups

    size = config["zero_optimization"]["zero_hpz_partition_size"]
    if size == 1:
        return None
    if groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()


# ------------------------------------------------------------------ an engine


def gather_at_once(module: nn.Module) -> None:
    """Let an engine that is made later gather all weights within ``module`` when it is entered, and release them when
    it is left, in a forward pass and in a backward pass: a leaf, in DeepSpeed's words."""
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)


class Gathers:
    """How an engine gathers, prefetches and releases its weights."""

    def __init__(self, engine: Any) -> None:
        # with an optimizer of its own, an engine has this one level below
        self._offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        self._went_back = False  # whether the last pass had a backward pass
        self._traced_backward = False  # whether what the prefetcher recorded, or records, has a backward pass

    def before_forward(self) -> None:
        """Let the prefetcher record again if it has recorded other passes than those that come now.

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
            release_cache(coordinator).cache_clear()
            self._traced_backward = torch.is_grad_enabled()

    def wait_for_current_stream(self) -> None:
        """Let the stream that gathers read shards come after what is on the current one. The host does not wait.

        DeepSpeed's users are safe as long as it keeps some weights gathered, for which it waits for the whole device
        after each step. Here it keeps none.
        """
        stream = self._offload._DeepSpeedZeRoOffload__allgather_stream
        stream.wait_stream(torch.cuda.current_stream())

    def forget(self) -> None:
        """Forget what was recorded: modules have other parameters now. Not inside a forward or backward pass."""
        coordinator = self._offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        self._went_back = self._traced_backward = False

    def after_backward(self) -> None:
        """Release what a backward pass leaves gathered: the norm at the input of the lowest layer that trains."""
        self._offload.release_backward_leftovers()
        self._went_back = True

    def release(self) -> None:
        """Release everything; not inside a hook."""
        self._offload.partition_all_parameters()


def release_cache(coordinator: Any) -> Any:
    """The cache of what to release after which module, below two decorators. It outlives the record it was made from.

    All engines of a process share it; clearing it costs the others one computation of theirs.
    """
    decorated = getattr(type(coordinator), f"{_COORDINATOR}__params_to_release")
    return inspect.getclosurevars(decorated).nonlocals["func"]


def trains_nothing(engine: Any) -> bool:
    """Whether an engine has ZeRO-3 and no optimizer."""
    return engine.zero_optimization_stage() == 3 and hasattr(engine.optimizer, "partition_all_parameters")


def count_bytes(engine: Any, parameters: Iterable[ZeroParameter], count: Count) -> None:
    """Let an engine say how many bytes this rank sends: ``weights`` when it gathers some of ``parameters``,
    ``full_rank_gradients`` when an optimizer of its own reduces them.

    Both are done by attributes of the engine's own objects, which are replaced: other engines are not concerned.
    """
    for parameter in parameters:
        parameter.all_gather_coalesced = _counting_gather(parameter.all_gather_coalesced, count)
    scatter = getattr(engine.optimizer, _SCATTER, None)
    if scatter is not None:
        setattr(engine.optimizer, _SCATTER, _counting_scatter(scatter, count))


def _counting_gather(gather: Callable[..., Any], count: Count) -> Callable[..., Any]:
    def counting(params: Any, *args: Any, **kwargs: Any) -> Any:
        params = list(params)
        count("weights", sum(map(_sent_to_gather, params)))
        return gather(params, *args, **kwargs)

    return counting


def _sent_to_gather(parameter: ZeroParameter) -> int:
    from deepspeed.runtime.zero.partition_parameters import get_allgather_dtype

    own, ranks = parameter.ds_tensor.ds_numel, parameter.ds_zero_partition_world_size
    if parameter.ds_secondary_tensor is not None:
        own *= parameter.ds_secondary_tensor_num_of_groups
        ranks = parameter.ds_secondary_tensor_group_size
    return int(own * (ranks - 1) * get_allgather_dtype(parameter, parameter.ds_tensor).itemsize)


def _counting_scatter(scatter: Callable[..., Any], count: Count) -> Callable[..., Any]:
    def counting(parameters: Any, dtype: torch.dtype) -> Any:
        ranks = parameters[0].ds_zero_partition_world_size
        parts = sum(math.ceil(parameter.ds_numel / ranks) for parameter in parameters)
        count("full_rank_gradients", parts * (ranks - 1) * dtype.itemsize)
        return scatter(parameters, dtype)

    return counting


def masters(engine: Any) -> Iterator[tuple[Tensor, list[ZeroParameter]]]:
    """The float32 copies of an engine with an optimizer, each with the parameters that lie in it one after another."""
    optimizer = engine.optimizer
    yield from zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)


def inner_state(engine: Any) -> dict[Tensor, dict[str, Any]]:
    """The state of the optimizer that DeepSpeed runs, by master."""
    state: dict[Tensor, dict[str, Any]] = engine.optimizer.optimizer.state
    return state


# ------------------------------------------------------------------ rows that ranks share


class Ulysses:
    """Attention over rows whose tokens lie on the ranks of a group, one piece after the other: DeepSpeed's
    `UlyssesSPAttentionHF` (Jacobs et al. 2023; Bekman et al. 2025, ALST).

    Each rank gets some of the heads of all tokens, runs the kernel, and gets all heads of its own tokens back: four
    exchanges, and as many in the backward pass. Keys and values of fewer heads than ranks are sent more than once.
    DeepSpeed registers itself for a whole process, with groups of its own; here it is one object a shape.
    """

    def __init__(self, group: Any, count: Count) -> None:
        """group: of torch.distributed, which DeepSpeed must know (`deepspeed.init_distributed`)."""
        self._group, self._count = group, count
        self._made: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, kernel: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, **more: Any
    ) -> Any:
        """query (rows, heads, tokens, head size), key and value of this rank's tokens -> (rows, tokens, heads, size).

        kernel: a function of transformers' kind, of whole rows; the same object in each call. Collective, also where
        it is differentiated. Raises ValueError or AssertionError for shapes that cannot be divided.
        """
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        rows, heads, _, size = query.shape
        shape = kernel, rows, heads, key.shape[1], size
        if shape not in self._made:
            self._made[shape] = UlyssesSPAttentionHF(
                attn=kernel, batch_size=rows, attn_head_count=heads, attn_head_size=size, kv_head_count=key.shape[1],
                num_hidden_layers=1, process_group=self._group, seq_length_is_variable=True,
            )  # fmt: skip
        made = self._made[shape]
        copies = max(1, made.kv_replication_factor)
        for tensor, times in ((query, 1), (key, copies), (value, copies)):
            self._counts(tensor, times * tensor.nbytes, made.world_size)
        groups = getattr(module, "num_key_value_groups", None)
        # DeepSpeed gathers positions for kernels that find rows by them; ours know the rows
        more["position_ids"] = torch.zeros(rows, 1, dtype=torch.int64, device=query.device)
        try:
            found, nothing = made(module, query, key, value, None, **more)
        finally:
            if groups is not None:  # DeepSpeed changes it to that of the heads of a rank
                module.num_key_value_groups = groups
        self._counts(found, found.nbytes, made.world_size)
        return found.view(*found.shape[:2], heads, size), nothing

    def _counts(self, tensor: Tensor, size: int, ranks: int) -> None:
        """An exchange of ``size`` bytes now, and of the tensor's gradient, if there will be one."""
        sent = size // ranks * (ranks - 1)
        self._count("sequence", sent)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._count("sequence", sent))
