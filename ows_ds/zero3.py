"""DeepSpeed's ZeRO-3 as a home for frozen weights. The only module that touches DeepSpeed's internals.

The engine is made without an optimizer: DeepSpeed shards the weights, prefetches and gathers them, and owns no
gradient, no optimizer state and no float32 copy. What it needs from us in return is in ``docs/design.md``.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds.communicate import Communicator
from ows_ds.errors import UserError
from ows_ds.weights import add_low_rank, interval

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


_gathered = Counter[str]()  # bytes that DeepSpeed's gathers have sent from this process and no Zero3 has booked yet


def _count_gathers() -> None:
    """Let DeepSpeed's one way of gathering weights say how much it sends."""
    from deepspeed.runtime.zero import partition_parameters

    gather = partition_parameters._dist_allgather_fn
    if hasattr(gather, "counted"):
        return

    def counting(part: Tensor, whole: Tensor, group: Any = None) -> Any:
        _gathered["weights"] += whole.nbytes - part.nbytes
        return gather(part, whole, group)

    counting.counted = True  # type: ignore[attr-defined]
    partition_parameters._dist_allgather_fn = counting


def join_deepspeed() -> None:
    """Let DeepSpeed know of the process group that there is; before a model is built in shards. Collective."""
    import deepspeed

    with redirect_stdout(io.StringIO()):  # it prints that its CPU operator is there
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def check_config(config: dict[str, Any], key: str = "train.ds_config") -> None:
    """Refuse (UserError) what does not work with frozen weights that are folded now and then."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise UserError(
            f"{key}: zero_optimization.stage", zero.get("stage"), "give 3: it is what shards frozen weights"
        )
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(f"{key}: {section}", config[section], "leave it out: the recipe's optim section decides")
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise UserError(f"{key}: zero_optimization.offload_param.device", "nvme", "give none or cpu")
    if zero.get("zero_quantized_weights"):
        raise UserError(f"{key}: zero_optimization.zero_quantized_weights", True, "give false")
    if zero.get("zero_hpz_partition_size", 1) > 1:
        raise UserError(f"{key}: zero_optimization.zero_hpz_partition_size", zero["zero_hpz_partition_size"], "give 1")


def resolve_config(
    config: dict[str, Any], dtype: str, micro_batch_size: int, accumulation: int, world: int
) -> dict[str, Any]:
    """A copy of ``config`` with what must agree with the recipe filled in. Raises UserError as `check_config`.

    dtype: ``model.dtype``, the number format of the shards.
    """
    check_config(config)
    for name, format in (("bf16", "bfloat16"), ("fp16", "float16")):
        if (config.get(name) or {}).get("enabled", "auto") not in ("auto", dtype == format):
            right = f'give "auto"; the recipe\'s model.dtype is {dtype}'
            raise UserError(f"train.ds_config: {name}.enabled", config[name]["enabled"], right)
    zero = {
        **config["zero_optimization"],
        # edits of a shard are ignored by the live copy of a parameter that is kept gathered
        "stage3_param_persistence_threshold": 0,
    }
    sizes = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world,
    }
    for key, value in sizes.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(f"train.ds_config: {key}", config[key], f'give "auto"; the recipe makes it {value}')
    rest = {key: value for key, value in config.items() if key not in ("bf16", "fp16")}
    return {**rest, **sizes, "bf16": {"enabled": dtype == "bfloat16"}, "zero_optimization": zero}


class Zero3:
    """Weights as DeepSpeed's shards (see `ows_ds.weights.Weights` for what the methods do)."""

    sharded = True

    def __init__(self, module: nn.Module, config: dict[str, Any], comm: Communicator) -> None:
        """module: the model, plain or already loaded into shards under ``deepspeed.zero.Init``. Collective.

        config: a DeepSpeed configuration from `resolve_config`.
        """
        import deepspeed

        join_deepspeed()
        module.requires_grad_(False)
        engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
        self._take(engine, comm)

    @classmethod
    def adopt(cls, engine: Any, comm: Communicator) -> Zero3:
        """A DeepSpeed engine that was made with ZeRO-3 and without an optimizer. Raises UserError for any other."""
        if engine.zero_optimization_stage() != 3 or not hasattr(engine.optimizer, "partition_all_parameters"):
            raise UserError("model", "a DeepSpeed engine with an optimizer", "make it with ZeRO-3 and no optimizer")
        kept = [name for name, p in engine.module.named_parameters() if getattr(p, "ds_persist", False)]
        if kept:
            right = "give 0: edits of a shard are ignored where the weight is kept gathered"
            raise UserError("zero_optimization.stage3_param_persistence_threshold", f"{len(kept)} weights kept", right)
        weights = cls.__new__(cls)
        weights._take(engine, comm)
        return weights

    def _take(self, engine: Any, comm: Communicator) -> None:
        self.engine = engine
        self.module: nn.Module = engine.module
        self.comm = comm
        self.device = torch.device(engine.device)
        self._offload = engine.optimizer
        _count_gathers()
        _gathered.clear()
        for name, parameter in self.module.named_parameters():
            size = math.ceil(parameter.ds_numel / comm.world)
            if parameter.ds_tensor.ds_numel != size:
                raise RuntimeError(f"{name}: DeepSpeed's shard has {parameter.ds_tensor.ds_numel} entries, not {size}")

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def shape(self, parameter: ZeroParameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)

    def interval(self, parameter: ZeroParameter) -> tuple[int, int]:
        return interval(parameter.ds_numel, self.comm.index, self.comm.world)

    def local(self, parameter: ZeroParameter) -> Tensor:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
            # a gathered copy would hide the edit, or (in a world of one) receive it twice
            raise RuntimeError(f"{parameter.ds_summary()} is gathered; its shard must not be touched now")
        start, stop = self.interval(parameter)
        shard: Tensor = parameter.ds_tensor
        return shard.data[: stop - start]

    def publish(self, parameters: list[ZeroParameter]) -> None:
        pass

    def write(self, parameter: ZeroParameter, value: Tensor) -> None:
        start, stop = self.interval(parameter)
        self.local(parameter).copy_(value.reshape(-1)[start:stop])

    def fold(self, parameter: ZeroParameter, left: Tensor, right: Tensor, decay: float) -> None:
        start, _ = self.interval(parameter)
        local = self.local(parameter)
        add_low_rank(local, start, parameter.ds_shape[1], left.to(local.device), right.to(local.device), decay)

    def after_backward(self) -> None:
        self._offload.release_backward_leftovers()

    def after_step(self) -> None:
        self._offload.partition_all_parameters()
        self.comm.sent.update(_gathered)
        _gathered.clear()

    def whole(self, parameter: ZeroParameter) -> Tensor:
        local = self.local(parameter)
        part = local.new_zeros(math.ceil(parameter.ds_numel / self.comm.world))
        part[: local.numel()] = local
        return self.comm.all_gather(part, "export")[: parameter.ds_numel].view(parameter.ds_shape)
