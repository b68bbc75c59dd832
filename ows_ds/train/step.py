"""An optimizer step: its batch, its losses, what the ranks tell each other of it, its record."""

from __future__ import annotations

import functools
import hashlib
import math
import resource
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ows_ds.checkpoint import Saver
from ows_ds.compat.torch import to_device
from ows_ds.compat.transformers import known_rows
from ows_ds.data.batches import Step
from ows_ds.data.read_ahead import ReadAhead
from ows_ds.methods import Method
from ows_ds.train import preference
from ows_ds.train.best import Best
from ows_ds.train.context import RunContext, evaluate
from ows_ds.train.loss import token_losses
from ows_ds.train.sample_answers import sample

Batches = ReadAhead[tuple[Step, list[dict[str, Tensor]]]]


class StepRunner:
    """Optimizer steps, one after the other.

    Attributes:
        stop: a signal reached any rank before the last step's update.
        saved: all ranks' parts of a checkpoint are there, or have failed.
        nonfinite: why the last step was skipped: what was not finite. None: it was not.
        in_a_row: number of such steps.
        taken: the rows of the step in hand are there.
        data_state: `Steps.state` of the last step.
    """

    def __init__(
        self,
        context: RunContext,
        method: Method,
        batches: Batches,
        stop_requested: threading.Event,
        saver: Saver,
        best: Best,
    ) -> None:
        self.context, self.method, self.batches, self.comm = context, method, batches, context.runtime.comm
        self.best = best
        self.stop_requested, self.saver = stop_requested, saver
        self.stop = self.saved = self.taken = False
        self.nonfinite: str | None = None
        self.in_a_row = 0
        self.data_state: dict[str, Any] = {}
        self._before: Counter[str] = Counter()

    def take(self, step: int, last: bool) -> dict[str, Any]:
        """Step number ``step`` (from 0), perhaps the run's ``last``, and its record for metrics.jsonl."""
        context, method, device = self.context, self.method, self.context.runtime.device
        started = time.perf_counter()
        self._before = Counter(self.comm.sent)
        # set for each step, so that dropout is the same after a resume and differs between ranks
        name = f"{context.recipe.train.seed}/{step}/{self.comm.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little"))
        self.taken = False
        data, batches = self.batches.take(step)
        self.taken, self.data_state = True, data.state
        sampled, nothing_to_train, lr = list(method.layer_set), method.nothing_to_train, method.lr
        drawn_with = method.new_probabilities
        # ranks are averaged: the sum over all of them, divided by all targets of the step
        compares = bool(context.recipe.loss.rows)
        scale = self.comm.world_size / (data.sequences if compares else data.targets)
        context.weights.module.train()
        everyones: list[list[float]] = []
        balance: list[Tensor] = []
        refreshed: list[int] = []  # layers
        rewards: list[Tensor] = []  # of pairs, or of labelled rows: how many are right, and the sum of margins

        def accept(loss: Tensor, norm: Tensor) -> bool:
            # stop requests and finished checkpoints are sent along: all ranks act on them after the same step
            stop = self.stop_requested.is_set()
            more = torch.tensor([_peak_memory(device), stop, self.saver.done], dtype=loss.dtype)
            energies = method.projector_energy()
            refreshed.extend(energies)
            balances = [torch.stack(balance).sum().to(loss)[None]] if balance else []  # on all ranks or none
            gained = [torch.stack(rewards).sum(0).to(loss)] if compares else []
            some = [torch.stack([loss, norm.to(loss)]), to_device(more, device), *balances, *gained, *energies.values()]
            mine = torch.cat(some)
            # the step's only wait for the device
            everyones.extend(self.comm.all_gather(mine[None], "metrics").tolist())
            return math.isfinite(everyones[0][1])

        share = data.sequences / max(1, data.leading)
        losses_of = [functools.partial(self._loss, batch, scale, balance, share, rewards) for batch in batches]
        with (
            known_rows(None),
            context.runtime.sequence.passes(),
        ):  # layers that are computed again in a backward pass ask, too
            method.train_step(losses_of, accept)
        losses, norms, peaks, stops, saved, *squares = zip(*everyones, strict=True)
        aux = sum(squares.pop(0)) / len(losses) if balance else 0.0
        right, margins = (sum(squares.pop(0)) / data.sequences for _ in (0, 1)) if compares else (None, None)
        self.stop, self.saved = any(stops), all(saved)
        self.nonfinite = _nonfinite(losses, norms[0])
        self.in_a_row = 0 if self.nonfinite is None else self.in_a_row + 1
        seconds = time.perf_counter() - started
        sums = list(map(sum, squares))
        energy = {str(n): part / full for n, part, full in zip(refreshed, sums[::2], sums[1::2], strict=True) if full}
        updates = method.update_norm(last)
        # in the few steps that end with a merge, one more wait for the device
        norms_of = (
            dict(zip(map(str, updates), torch.stack(list(updates.values())).tolist(), strict=True)) if updates else {}
        )
        return {
            "step": step + 1,
            "loss": None if nothing_to_train else sum(losses) / len(losses) - aux,
            **({"aux_loss": aux} if balance else {}),
            **({"reward_accuracy": right, "reward_margin": margins} if compares and not nothing_to_train else {}),
            "lr": lr,
            **({"epoch": (step + 1) / per_epoch} if (per_epoch := context.steps_per_epoch) else {}),
            "grad_norm": None if nothing_to_train else norms[0],
            "sampled_layers": sampled,
            **({"probabilities": drawn_with} if drawn_with else {}),
            "tokens": data.tokens,
            "tokens_per_second": data.tokens / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": int(max(peaks)),
            **({"projector_energy": energy} if energy and not self.nonfinite else {}),
            **({"update_norm": norms_of} if norms_of else {}),
            **({"skipped": True} if nothing_to_train or self.nonfinite else {}),
        }

    def _loss(
        self, batch: dict[str, Tensor], scale: float, balance: list[Tensor], share: float, rewards: list[Tensor]
    ) -> Tensor:
        """The cross entropies of a micro-batch, or what is learned in their place, summed, times ``scale``; with what
        ``balance`` and ``rewards`` get of it."""
        own: list[Tensor] = []
        context, batch = self.context, self.context.to_device(batch)
        context.runtime.sequence.begin(batch)
        if context.recipe.loss.rows:
            loss = preference.loss(context, batch, share, own, rewards) * scale
        else:
            loss = token_losses(context.weights, batch, own) * scale
        balance += [one * scale for one in own]
        # one that is not finite has no finite gradient either: the gradients' norm tells all ranks
        return loss * (loss.detach() * 0 + 1)

    def before_the_first(self) -> dict[str, Any]:
        """The record of step 0: nothing trained, an evaluation."""
        started = time.perf_counter()
        self._before = Counter(self.comm.sent)
        found: dict[str, Any] = evaluate(self.context) if self.context.held_out else {}
        if samples := sample(self.context, self.context.recipe.log.samples):
            found["samples"] = samples
        return {
            "step": 0,
            "loss": None,
            "lr": self.method.lr,
            "grad_norm": None,
            "sampled_layers": [],
            "tokens": 0,
            "tokens_per_second": 0.0,
            "step_seconds": time.perf_counter() - started,
            "peak_memory_bytes": _peak_memory(self.context.runtime.device),
            "comm_bytes": self.sent(),
            **found,
        }

    def sent(self) -> dict[str, int]:
        """Bytes that rank 0 has sent since the step began, its evaluation included, by operation."""
        return dict(sorted((self.comm.sent - self._before).items()))


def _nonfinite(losses: Sequence[float], norm: float) -> str | None:
    """What is not finite, of the ranks' losses and their gradients' norm, in words; None: nothing."""
    if math.isfinite(norm):
        return None
    for rank, loss in enumerate(losses):
        if not math.isfinite(loss):
            return f"the loss is {loss}" + (f" on rank {rank}" if len(losses) > 1 else "")
    return f"the gradient's norm is {norm}"


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on the GPU, or the process's largest resident set on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
