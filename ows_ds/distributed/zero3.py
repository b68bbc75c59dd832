"""DeepSpeed's ZeRO-3 as a home for frozen weights.

The engine is made without an optimizer: DeepSpeed shards the weights, prefetches and gathers them, and owns no
gradient, no optimizer state and no float32 copy. What it needs in return is in ``docs/design.md``; what is private to
it is in `ows_ds.compat.deepspeed`.
"""

from __future__ import annotations

import io
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ows_ds.compat import deepspeed as inside
from ows_ds.compat.deepspeed import ZeroParameter, full_shape
from ows_ds.compat.torch import build_directory, to_device
from ows_ds.distributed.communicator import Communicator
from ows_ds.distributed.formats import Format
from ows_ds.distributed.frozen import Fill, Frozen, frozen_of
from ows_ds.distributed.merging import add_low_rank
from ows_ds.distributed.weights import Home, interval
from ows_ds.errors import UserError

COMPILING = 120.0  # seconds; it takes about one minute

logger = logging.getLogger(__name__)


def free_operator() -> None:
    """Remove the lock of a process that was killed while it compiled DeepSpeed's CPU operator; else all wait for it.

    A lock that no process of this host has open may be another host's, in a shared folder: it gets `COMPILING` seconds.
    """
    lock = build_directory("deepspeed_shm_comm") / "lock"
    waiting = False
    with suppress(FileNotFoundError):  # it was released
        while not _open_here(lock):
            age = time.time() - lock.stat().st_mtime
            if age > COMPILING:
                lock.unlink()
                logger.warning("%s removed: nobody has been compiling DeepSpeed's operator for %.0f s", lock, age)
            elif not waiting:
                waiting = True
                wait = COMPILING - age
                logger.info("%s: waiting up to %.0f s for another host to compile DeepSpeed's operator", lock, wait)
            time.sleep(0.2)


def _open_here(path: Path) -> bool:
    """Whether a process of this host has the file open, as far as we may see."""
    where = str(path.resolve(strict=True))
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # closed by now, or another user's
            if os.readlink(descriptor) == where:
                return True
    return False


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group that there is; before a model is built in shards. Collective."""
    import deepspeed

    with redirect_stdout(io.StringIO()):  # it prints that its CPU operator is there
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


class InShards:
    """A maker of parameters that lie in DeepSpeed's shards from the beginning (see `ows_ds.model.loading.Make`)."""

    def __init__(self, config: dict[str, Any]) -> None:
        """config: from `resolve_config`. DeepSpeed must know the process group (`join_deepspeed`). Nothing is sent."""
        self._sharder = inside.Sharder(config)

    def parameter(self, shape: tuple[int, ...], dtype: torch.dtype, fill: Fill) -> ZeroParameter:
        # of this memory nothing is touched but the rank's own interval, which DeepSpeed copies into the shard
        parameter, rank, world_size = self._sharder.empty(shape, dtype)
        start, stop = interval(parameter.numel(), rank, world_size)
        fill(start, parameter.data.view(-1)[start:stop])
        self._sharder.partition(parameter)
        return parameter

    def frozen(self, format: Format, fill: Fill) -> Frozen:
        # every rank makes codes of the full matrix, which is there for so long
        real, _, _ = self._sharder.empty(format.full_shape, format.dtype)
        fill(0, real.data.view(-1))
        codes, scales = map(self._sharder.of, format.quantise(real.data))
        self._sharder.partition(real)
        inside.set_shard(real, None)
        return Frozen(format, real, codes, scales, source=fill)

    def later(self, real: ZeroParameter, format: Format) -> Frozen:
        def empty(shape: tuple[int, ...]) -> ZeroParameter:
            parameter, _, _ = self._sharder.empty(shape, torch.uint8)
            self._sharder.partition(parameter)
            inside.set_shard(parameter, None)
            return parameter

        return Frozen(format, real, empty(format.codes_shape), empty(format.scales_shape), resting=False)


def _engine(module: nn.Module, config: dict[str, Any], at_once: Iterable[str] = (), **optimizer: Any) -> Any:
    import deepspeed

    for name in at_once:
        inside.gather_at_once(module.get_submodule(name))

    join_deepspeed()
    inside.hpz_group(config)
    adapted: Any
    for adapted in module.modules():
        # peft's DoRA reads the weight of another module, which DeepSpeed would have released by then
        for magnitude in getattr(adapted, "lora_magnitude_vector", {}).values():
            deepspeed.zero.register_external_parameter(magnitude, adapted.base_layer.weight)
    with inside.any_dtype():
        return deepspeed.initialize(model=module, config=config, dist_init_required=False, **optimizer)[0]


class Zero3(Home):
    """Weights as DeepSpeed's shards (see `ows_ds.distributed.weights.Weights` for what the methods do)."""

    sharded = True

    def __init__(
        self, module: nn.Module, config: dict[str, Any], comm: Communicator, at_once: Iterable[str] = ()
    ) -> None:
        """module: the model, plain or already loaded into shards under ``deepspeed.zero.Init``. Collective.

        at_once: names of modules whose weights are gathered together.

        config: a DeepSpeed configuration from `resolve_config`.
        """
        module.requires_grad_(False)
        self._use(_engine(module, config, at_once), comm)

    @classmethod
    def adopt(cls, engine: Any, comm: Communicator) -> Zero3:
        """A DeepSpeed engine that was made with ZeRO-3 and without an optimizer. Raises UserError for any other."""
        if not inside.trains_nothing(engine):
            raise UserError("model", "a DeepSpeed engine with an optimizer", "make it with ZeRO-3 and no optimizer")
        if gathered := inside.stays_gathered(engine.module):
            key, right = "zero_optimization.stage3_param_persistence_threshold", "a weight that stays gathered ignores"
            raise UserError(key, f"{len(gathered)} weights kept", f"expected 0: {right} what is written to its shard")
        weights = cls.__new__(cls)
        weights._use(engine, comm)
        return weights

    def _use(self, engine: Any, comm: Communicator) -> None:
        Home.__init__(self)
        self.engine = engine
        self.module: nn.Module = engine.module
        self.comm = comm
        self.device = torch.device(engine.device)
        self._gathers = inside.Gathers(engine)
        inside.count_bytes(engine, self._all(), comm.count)
        # before DeepSpeed's own hooks, whoever calls the module
        self.module.register_forward_pre_hook(lambda module, inputs: self._before_forward(), prepend=True)
        for name, parameter in self.module.named_parameters():
            size, found = math.ceil(inside.full_numel(parameter) / comm.world_size), inside.shard_numel(parameter)
            if found != size:
                raise RuntimeError(f"{name}: DeepSpeed's shard has {found} entries, not {size}")

    def _all(self) -> list[ZeroParameter]:
        """The module's parameters, and what changes places with them."""
        frozen = list(filter(None, map(frozen_of, self.parameters().values())))
        others = (one for f in frozen for one in (f.real, f.codes, f.scales))
        return list({id(p): p for p in (*self.module.parameters(), *others)}.values())

    def _before_forward(self) -> None:
        self.order_gathers()
        self._gathers.before_forward()

    def order_gathers(self) -> None:
        """Let DeepSpeed's gathers, on a stream of their own, come after what was written to the shards on this one."""
        if self.device.type == "cuda":
            self._gathers.wait_for_current_stream()

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def shape(self, parameter: ZeroParameter) -> tuple[int, ...]:
        return full_shape(parameter)

    def _local(self, parameter: ZeroParameter) -> Tensor:
        start, stop = self.interval(parameter)
        return inside.shard(parameter)[: stop - start]

    def resident_slice(self, parameter: ZeroParameter) -> tuple[int, Tensor]:
        return self.interval(parameter)[0], self.local(parameter)

    def _publish(self, parameters: list[ZeroParameter]) -> None:
        for parameter in parameters:  # also on the ranks that had no entry to write
            inside.forget_copy(parameter)
        self.order_gathers()

    def write(self, parameters: Sequence[ZeroParameter], values: Sequence[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            start, stop = self.interval(parameter)
            self.local(parameter).copy_(value.reshape(-1)[start:stop])
        self.order_gathers()

    def merge(
        self, parameter: ZeroParameter, left: Tensor, right: Tensor, decay: float, noise: str | None = None
    ) -> None:
        start, local = self.resident_slice(parameter)
        add_low_rank(local, start, left.to(local.device), right.to(local.device), decay, noise)
        self.order_gathers()

    def backward(self, loss: Tensor) -> None:
        (loss / self.comm.world_size if self.comm.world_size > 1 else loss).backward()
        self._gathers.after_backward()

    def gathered(self, parameters: Iterable[ZeroParameter]) -> AbstractContextManager[None]:
        import deepspeed

        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
        return context

    def after_step(self) -> None:
        self._gathers.release()

    def _release(self, parameter: ZeroParameter) -> None:
        inside.set_shard(parameter, None)

    def _store(self, parameter: ZeroParameter, full: Tensor) -> None:
        start, stop = self.interval(parameter)
        inside.set_shard(parameter, full.reshape(-1)[start:stop].clone())  # of its own memory

    def _needed(self, frozen: Frozen) -> tuple[int, int]:
        return self.interval(frozen.real)

    def _hold(self, frozen: Frozen) -> None:
        own = self.interval(frozen.real)
        inside.set_shard(frozen.real, to_device(frozen.staged(*own, own), self.device))

    def _moved(self, changed: bool) -> None:
        if changed:
            self._gathers.forget()
            self.order_gathers()


class Zero3AdamW(Zero3):
    """ZeRO-3 with DeepSpeed's own optimizer around torch's AdamW, as its users run it.

    What requires gradients trains, in float32 copies that DeepSpeed keeps: not for float64.
    """

    def __init__(
        self,
        module: nn.Module,
        config: dict[str, Any],
        comm: Communicator,
        max_grad_norm: float | None,
        at_once: Iterable[str] = (),
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
        self._use(_engine(module, config, at_once, optimizer=optimizer), comm)
        self._micro, self._steps = 0, config["gradient_accumulation_steps"]
        self.states: dict[str, dict[str, Tensor]] = {}
        """Of each weight that trains: master, exp_avg, exp_avg_sq (1-D, this rank's interval), step. Live."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for flat, parameters in inside.masters(self.engine):
            # moments of zero before the first step: there is a state to save and to restore at any time
            moments = {kind: torch.zeros_like(flat.data) for kind in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), dtype=torch.float32)
            inside.inner_state(self.engine)[flat] = {"step": step, **moments}
            for parameter in parameters:
                start, stop = self.interval(parameter)
                full = {
                    "master": safe_get_local_fp32_param(parameter),
                    **{kind: safe_get_local_optimizer_state(parameter, kind) for kind in moments},
                }
                own = {kind: tensor.data[: stop - start] for kind, tensor in full.items()}
                self.states[names[parameter]] = {"step": step, **own}

    def __call__(self, **batch: Any) -> Any:
        self.engine.set_gradient_accumulation_boundary(self._micro + 1 == self._steps)
        return self.engine(**batch)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)  # it averages over ranks by itself
        self._micro += 1

    def step(self, settings: dict[str, Any], vectors: dict[str, Any]) -> Tensor:
        """One step of AdamW with these settings for matrices and vectors. Returns the gradient's norm. Collective."""
        for group in self.engine.optimizer.param_groups:
            group.update(settings if group["decayed"] else vectors)
        self.engine.step()
        self._micro = 0
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
