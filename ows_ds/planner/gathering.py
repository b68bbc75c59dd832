"""What ZeRO-3 gathers in a step, and keeps: DeepSpeed's bookkeeping replayed with shapes alone.

    model on the meta device --forward, backward--> uses of its modules --replay--> entries gathered at every use

`record` runs a model without numbers under hooks that stand where DeepSpeed's do. `replay` then decides, use by use, as
``PartitionedParameterCoordinator`` of DeepSpeed 0.19.8 does once it knows a pass by heart: a module's weights are
gathered in one message, up to a bucket of later ones is fetched ahead, and a weight goes after its module unless it is
used again within the reuse distance. A message of several weights is copied out of its buffer, which stays until the
last of them is used.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Kind = str  # "reset", "fetch", "release", "leftovers"
Message = tuple[str, ...]


@dataclass(frozen=True)
class Use:
    """A module is entered (fetch) or left (release), in a forward pass or a backward pass.

    kind: reset before a forward pass, leftovers after a backward pass, else fetch or release. again: a forward pass
    inside of a backward pass, as gradient checkpointing takes it.
    """

    kind: Kind
    module: str = ""
    forward: bool = True
    again: bool = False


@dataclass(frozen=True)
class Trace:
    """A pass forward and backward. weights: of each module itself. numel: entries of each weight. frozen: names."""

    uses: tuple[Use, ...]
    weights: Mapping[str, tuple[str, ...]]
    numel: Mapping[str, int]
    frozen: frozenset[str]


class _Note(torch.autograd.Function):
    """The identity, which calls back when a gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.note()
        return (*grads, None)


def record(model: nn.Module, trained: Iterable[str], atomic_write: Iterable[str] = (), tokens: int = 8) -> Trace:
    """One pass of a model on the meta device, forward and, where anything trains, backward. Changes ``requires_grad``.

    trained: names of the weights that train, in the model without adapters or in it. beside: of those that coordinates
    stand beside.
    """
    uses = [Use("reset")]
    backward = False
    names = {id(p): _plain(name) for name, p in model.named_parameters()}
    wanted, handles = {_plain(name) for name in trained}, list[Any]()
    differentiated = wanted.union(atomic_write)
    for parameter in model.parameters():
        parameter.requires_grad_(names[id(parameter)] in differentiated)

    def watch(name: str, module: nn.Module) -> None:
        left = [0]

        def entered(_: nn.Module, inputs: Any) -> Any:
            uses.append(Use("fetch", name, True, backward))
            left[0] = 0

            def passed() -> None:
                left[0] -= 1
                if left[0] == 0:
                    uses.append(Use("release", name, False))

            def noted(one: Any) -> Any:
                if not isinstance(one, Tensor):
                    return one
                left[0] += one.requires_grad
                return _Note.apply(one, passed)

            return tree_map(noted, inputs)

        def exited(_: nn.Module, inputs: Any, output: Any) -> Any:
            uses.append(Use("release", name, True, backward))

            def reached() -> None:
                uses.append(Use("fetch", name, False))

            def noted(one: Any) -> Any:
                return _Note.apply(one, reached) if isinstance(one, Tensor) and one.is_floating_point() else one

            return tree_map(noted, output)

        handles.extend((module.register_forward_pre_hook(entered), module.register_forward_hook(exited)))

    weights = {}
    for full_name, module in model.named_modules():
        name = _plain(full_name)
        weights[name] = tuple(names[id(p)] for p in module.parameters(recurse=False))
        watch(name, module)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, tokens, tokens, device="meta")  # taken as it is: of a smaller one the values are looked at
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if logits.requires_grad:
        backward = True
        logits.sum().backward()
    for handle in handles:
        handle.remove()
    numel = {names[id(p)]: p.numel() for p in model.parameters()}
    return Trace((*uses, Use("leftovers")), weights, numel, frozenset(numel) - wanted)


def _plain(name: str) -> str:
    """A name as in the model without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's ``stage3_prefetch_bucket_size``, ``_max_live_parameters`` and ``_max_reuse_distance``, in entries."""

    bucket: int = 50_000_000
    live: int = 500_000_000
    reuse: int = 500_000_000


@dataclass(frozen=True)
class Fetch:
    """What happens as a module is entered. sent: messages that leave. awaited: those that must be there.

    A message is the names of its weights. entries: of weights that are gathered or on their way afterwards.
    """

    use: Use
    sent: tuple[Message, ...]
    awaited: tuple[Message, ...]
    entries: int


@dataclass(frozen=True)
class Gathered:
    """Of the micro-batches of a step.

    most: entries that lie there as a module or one inside it is entered, while messages are copied out of their
    buffers, and as it runs: the largest of each, by (module, in a backward pass).
    first, later: how often each weight is gathered in the first micro-batch, and in each later one. messages: gathers,
    each of one weight or more, in those. numel: entries of each weight. course: the first micro-batch, fetch by fetch.
    """

    most: Mapping[tuple[str, bool], tuple[int, int]]
    first: Mapping[str, int]
    later: Mapping[str, int]
    messages: tuple[int, int]
    numel: Mapping[str, int]
    course: tuple[Fetch, ...] = ()

    def at(self, module: str, backward: bool) -> tuple[int, int]:
        """Entries as a module or one inside it is entered, and while it runs; 0 where there are no uses."""
        return self.most.get((module, backward), (0, 0))

    def shares(self, world_size: int, accumulation: int) -> int:
        """Entries of its own shards that one of ``world_size`` processes gives to the gathers of a step."""
        return sum(
            math.ceil(numel / world_size) * (self.first.get(name, 0) + (accumulation - 1) * self.later.get(name, 0))
            for name, numel in self.numel.items()
        )

    def gathers(self, accumulation: int) -> int:
        """Messages of a step."""
        return self.messages[0] + (accumulation - 1) * self.messages[1]


def replay(trace: Trace, limits: Limits | None = None) -> Gathered:
    """A step of one micro-batch or more, each of them as in ``trace``."""
    state = _Coordinator(trace, limits or Limits())
    most: dict[tuple[str, bool], tuple[int, int]] = defaultdict(lambda: (0, 0))
    counts, messages, course = [], [], []
    for micro_batch in range(2):
        state.count, state.messages = Counter(), 0
        backward = False
        for use in trace.uses:
            backward = backward or not use.forward
            if use.kind == "reset":
                state.reset()
            elif use.kind == "leftovers":
                state.leftovers()
            elif use.kind == "fetch":
                state.fetch(use)
                parts = use.module.split(".")
                for count in range(1, len(parts) + 1):
                    key = (".".join(parts[:count]), backward)
                    entering, running = most[key]
                    most[key] = max(entering, state.entering), max(running, state.running)
                if not micro_batch:
                    entries = sum(trace.numel[name] for name in state.whole.union(state.flying))
                    course.append(Fetch(use, tuple(state.sent), tuple(state.awaited), entries))
            else:
                state.release(use)
        counts.append(state.count)
        messages.append(state.messages)
    return Gathered(dict(most), counts[0], counts[1], (messages[0], messages[1]), trace.numel, tuple(course))


class _Coordinator:
    """Who is gathered, in flight, or in use. The rules are those of DeepSpeed's class, and so are their order."""

    def __init__(self, trace: Trace, limits: Limits) -> None:
        self.trace, self.limits = trace, limits
        self.count = Counter[str]()
        self.messages = 0
        self.order = [use.module for use in trace.uses if use.kind == "fetch"]
        rank = {name: index for index, name in enumerate(trace.numel)}
        self.own = {module: sorted(set(some), key=rank.__getitem__) for module, some in trace.weights.items()}
        self.passed = [0]  # entries of the modules' own weights before each fetch
        for module in self.order:
            self.passed.append(self.passed[-1] + sum(trace.numel[name] for name in self.own[module]))
        self.whole: set[str] = set()
        self.entries = 0  # of them
        self.flying: dict[str, Message] = {}  # weight -> its message
        self.users: dict[str, set[str]] = defaultdict(set)
        self.again: dict[str, set[str]] = defaultdict(set)  # of a module in a backward pass: weights used anew
        self.backward: dict[str, None] = {}  # modules in their backward pass, in order
        self.buffers: dict[Message, int] = {}  # message -> weights of it that were not yet asked for
        self.entering = self.running = 0  # entries: the most within the last fetch, and at its end
        self.sent: list[Message] = []  # in it
        self.awaited: list[Message] = []

    def reset(self) -> None:
        for name in list(self.flying):
            self._arrive(name)
            self._drop(name)
        self.queue = deque((name, step) for step, module in enumerate(self.order) for name in self.own[module])
        self.fetched: dict[str, int] = {}
        self.step, self.available = 0, 0

    def fetch(self, use: Use) -> None:
        own = self.own[use.module]
        self.entering, self.sent, self.awaited = 0, [], []
        if not use.forward:
            self.backward[use.module] = None
        self._gather([name for name in own if name not in self.whole and name not in self.flying])
        for name in own:
            self.users[name].add(use.module)
            if use.again and self.backward and name in self.trace.frozen:
                owner = next(reversed(self.backward))
                self.again[owner].add(name)
                self.users[name].add(owner)
            if name in self.flying:
                self._arrive(name)
        due = {name for name in own if self.fetched.get(name, -1) < self.step}
        while self.queue and due:
            name, step = self.queue.popleft()
            self.fetched[name] = step
            due.discard(name)
        self._prefetch()
        self.running = self._measure()
        self.step += 1

    def _prefetch(self) -> None:
        room, size = min(self.limits.live - self.available, self.limits.bucket), 0
        ahead: list[str] = []
        while self.queue and size < room:
            name, step = self.queue.popleft()
            self.fetched[name] = max(self.fetched.get(name, -1), step)
            if name not in self.whole and name not in self.flying and name not in ahead:
                ahead.append(name)
                size += self.trace.numel[name]
        self._gather(ahead)

    def _gather(self, names: Sequence[str]) -> None:
        if not names:
            return
        message = tuple(names)
        self.sent.append(message)
        self.buffers[message] = len(message)
        for name in message:
            self.flying[name] = message
            self.available += self.trace.numel[name]
            self.count[name] += 1
        self.messages += 1

    def _arrive(self, name: str) -> None:
        """Wait for a weight's message; with the first one that is waited for, all of its weights are there."""
        message = self.flying.pop(name)
        self.awaited.append(message)
        if self.buffers[message] == len(message):
            self.whole.update(message)
            self.entries += sum(self.trace.numel[one] for one in message)
        self.buffers[message] -= 1
        self._measure()
        if not self.buffers[message]:
            del self.buffers[message]

    def release(self, use: Use) -> None:
        own = self.own[use.module]
        going = {name for name in own if self.fetched.get(name, -1) <= self.step}
        for step in range(self.step, len(self.order)):
            if not going or self.passed[step] - self.passed[self.step] >= self.limits.reuse:
                break
            going.difference_update(self.own[self.order[step]])
        trained_names = set(own)
        if not use.forward:
            going |= self.again[use.module]
            trained_names |= self.again.pop(use.module)
            self.backward.pop(use.module, None)
        for name in trained_names:
            self.users[name].discard(use.module)
            if name in going:
                self._drop(name)

    def leftovers(self) -> None:
        while self.backward:
            module, _ = self.backward.popitem()
            for name in {*self.own[module], *self.again.pop(module, ())}:
                self.users[name].discard(module)
                self._drop(name)

    def _drop(self, name: str) -> None:
        if name in self.whole and not self.users[name]:
            self.whole.remove(name)
            self.entries -= self.trace.numel[name]
            self.available -= self.trace.numel[name]

    def _measure(self) -> int:
        """Entries: gathered weights, and buffers of messages; a message of one weight is its weight's memory."""
        now = self.entries
        for message in self.buffers:
            if len(message) > 1 or message[0] in self.flying:
                now += sum(self.trace.numel[name] for name in message)
        self.entering = max(self.entering, now)
        return now
