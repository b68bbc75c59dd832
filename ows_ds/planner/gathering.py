"""What ZeRO-3 gathers in a step, and keeps: DeepSpeed's bookkeeping replayed with shapes alone.

    model on the meta device --forward, backward--> uses of its modules --replay--> entries gathered at every use

`ows_ds.planner.recording` runs a model without numbers, under hooks that stand where DeepSpeed's do; of the plainest
families `ows_ds.planner.passes` knows the uses without that. `replay` then decides, use by use, as
``PartitionedParameterCoordinator`` of DeepSpeed 0.19.8 does once it has seen a pass: a module's weights are gathered in
one message, up to a bucket of later ones is fetched ahead, and a weight goes after its module unless it is used again
within the reuse distance. A message of several weights is copied out of its buffer, which stays until the last of them
is used.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ows_ds.distributed.packing import SCALES, Packing

Message = tuple[str, ...]  # names of its weights


@dataclass(frozen=True)
class Use:
    """A module is entered (fetch) or left (release), in a forward pass or a backward pass.

    kind: reset before a forward pass, leftovers after a backward pass, else fetch or release. again: a forward pass in
    a backward pass, as gradient checkpointing takes it.
    """

    kind: str
    module: str = ""
    forward: bool = True
    again: bool = False


@dataclass(frozen=True)
class Trace:
    """A pass forward and backward. weights: of each module itself. numel: entries of each weight. frozen: names.

    itemsize: bytes of an entry; of those of ``in_bytes`` it is 1.
    """

    uses: tuple[Use, ...]
    weights: Mapping[str, tuple[str, ...]]
    numel: Mapping[str, int]
    frozen: frozenset[str]
    itemsize: int = 1
    in_bytes: frozenset[str] = frozenset()

    def entries(self, names: Iterable[str]) -> int:
        """Of all these weights together."""
        return sum(self.numel[name] for name in names)

    def size(self, names: Iterable[str]) -> int:
        """Bytes of all these weights together."""
        return sum(self.numel[name] * (1 if name in self.in_bytes else self.itemsize) for name in names)

    def in_few_bits(self, formats: Mapping[str, Packing], itemsize: int) -> Trace:
        """The same where the weights of ``formats`` are codes and scales. itemsize: bytes of an entry of the others."""
        numel: dict[str, int] = {}
        for name, entries in self.numel.items():
            found = formats.get(name)
            if found is None:
                numel[name] = entries
            else:
                numel |= {name: math.prod(found.codes_shape), name + SCALES: math.prod(found.scales_shape)}
        both = {name: (name, name + SCALES) if name in formats else (name,) for name in self.numel}
        weights = {module: tuple(one for name in own for one in both[name]) for module, own in self.weights.items()}
        frozen = frozenset(one for name in self.frozen for one in both[name])
        in_bytes = frozenset(one for name in formats for one in both[name])
        return replace(self, weights=weights, numel=numel, frozen=frozen, itemsize=itemsize, in_bytes=in_bytes)


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's ``stage3_prefetch_bucket_size``, ``_max_live_parameters`` and ``_max_reuse_distance``, in entries."""

    bucket: int = 50_000_000
    live: int = 500_000_000
    reuse: int = 500_000_000


@dataclass(frozen=True)
class Fetch:
    """What happens as a module is entered. sent: messages that leave. awaited: those that must be there.

    size: bytes of weights that are gathered or on their way afterwards.
    """

    use: Use
    sent: tuple[Message, ...]
    awaited: tuple[Message, ...]
    size: int


@dataclass(frozen=True)
class Gathered:
    """Of the micro-batches of a step.

    most: bytes that lie there as a module or one inside it is entered, while messages are copied out of their
    buffers, and as it runs: the largest of each, by (module, in a backward pass).
    """

    most: Mapping[tuple[str, bool], tuple[int, int]]
    first: Mapping[str, int]  # how often each weight is gathered in the first micro-batch
    later: Mapping[str, int]  # and in each later one
    messages: tuple[int, int]  # gathers, each of one weight or more, in those
    trace: Trace  # of each micro-batch
    course: tuple[Fetch, ...]  # the first one

    def at(self, module: str, backward: bool) -> tuple[int, int]:
        """Bytes as a module or one inside it is entered, and while it runs; 0 where there are no uses."""
        return self.most.get((module, backward), (0, 0))

    def shares(self, world_size: int, accumulation: int) -> int:
        """Bytes of its own shards that one of ``world_size`` ranks gives to the gathers of a step."""
        trace = self.trace
        return sum(
            math.ceil(numel / world_size) * trace.size([name]) // numel
            * (self.first.get(name, 0) + (accumulation - 1) * self.later.get(name, 0))
            for name, numel in trace.numel.items()
        )  # fmt: skip

    def gathers(self, accumulation: int) -> int:
        """Messages of a step."""
        return self.messages[0] + (accumulation - 1) * self.messages[1]


def replay(trace: Trace, limits: Limits | None = None) -> Gathered:
    """A step of one micro-batch or more, each of them as in ``trace``."""
    state = _Coordinator(trace, limits or Limits())
    first, messages, course = state.micro_batch()
    later, more, _ = state.micro_batch()
    return Gathered(dict(state.most), first, later, (messages, more), trace, course)


class _Coordinator:
    """Who is gathered, in flight, or in use. The rules are those of DeepSpeed's class, and so are their order."""

    def __init__(self, trace: Trace, limits: Limits) -> None:
        self.trace, self.limits = trace, limits
        self.order = [use.module for use in trace.uses if use.kind == "fetch"]
        place = {name: index for index, name in enumerate(trace.numel)}
        self.own = {module: sorted(set(some), key=place.__getitem__) for module, some in trace.weights.items()}
        self.passed = [0]  # entries of the modules' own weights before each fetch
        for module in self.order:
            self.passed.append(self.passed[-1] + trace.entries(self.own[module]))
        self.most: dict[tuple[str, bool], tuple[int, int]] = defaultdict(lambda: (0, 0))
        self.whole: set[str] = set()
        self.size = 0  # bytes of them
        self.flying: dict[str, Message] = {}  # weight -> its message
        self.users: dict[str, set[str]] = defaultdict(set)
        self.again: dict[str, set[str]] = defaultdict(set)  # of a module in a backward pass: weights used again
        self.backward: dict[str, None] = {}  # modules in their backward pass, in order
        self.buffers: dict[Message, int] = {}  # message -> weights of it that were not yet asked for

    def micro_batch(self) -> tuple[Mapping[str, int], int, tuple[Fetch, ...]]:
        """Each weight's gathers, the number of messages, and what happens at each fetch."""
        count, course, backward = Counter[str](), [], False
        for use in self.trace.uses:
            backward = backward or not use.forward
            getattr(self, use.kind)(use)
            if use.kind != "fetch":
                continue
            for module in itertools.accumulate(use.module.split("."), "{}.{}".format):
                entering, running = self.most[module, backward]
                self.most[module, backward] = max(entering, self.entering), max(running, self.running)
            count.update(name for message in self.sent for name in message)
            size = self.size + self.trace.size(self.flying.keys() - self.whole)
            course.append(Fetch(use, tuple(self.sent), tuple(self.awaited), size))
        return count, sum(len(fetch.sent) for fetch in course), tuple(course)

    def reset(self, use: Use) -> None:
        for name in list(self.flying):
            self._arrive(name)
            self._drop(name)
        self.queue = deque((name, step) for step, module in enumerate(self.order) for name in self.own[module])
        self.fetched: dict[str, int] = {}
        self.step, self.available = 0, 0

    def fetch(self, use: Use) -> None:
        own = self.own[use.module]
        self.entering = 0  # the most bytes within this fetch
        self.sent: list[Message] = []
        self.awaited: list[Message] = []
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
        self.running = self._measure()  # bytes at its end
        self.step += 1

    def _prefetch(self) -> None:
        room, size = min(self.limits.live - self.available, self.limits.bucket), 0
        ahead: list[str] = []
        while self.queue and size < room:
            name, step = self.queue.popleft()
            self.fetched[name] = max(self.fetched.get(name, -1), step)
            if name not in self.whole and name not in self.flying and name not in ahead:
                ahead.append(name)
                size += self.trace.entries([name])
        self._gather(ahead)

    def _gather(self, names: Sequence[str]) -> None:
        if names:
            message = tuple(names)
            self.sent.append(message)
            self.buffers[message] = len(message)
            self.flying |= dict.fromkeys(message, message)
            self.available += self.trace.entries(message)

    def _arrive(self, name: str) -> None:
        """Wait for a weight's message; with the first one that is waited for, all of its weights are there."""
        message = self.flying.pop(name)
        self.awaited.append(message)
        if self.buffers[message] == len(message):
            self.whole.update(message)
            self.size += self.trace.size(message)
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
        released = set(own)
        if not use.forward:
            going |= self.again[use.module]
            released |= self.again.pop(use.module)
            self.backward.pop(use.module, None)
        for name in released:
            self.users[name].discard(use.module)
            if name in going:
                self._drop(name)

    def leftovers(self, use: Use) -> None:
        while self.backward:
            module, _ = self.backward.popitem()
            for name in {*self.own[module], *self.again.pop(module, ())}:
                self.users[name].discard(module)
                self._drop(name)

    def _drop(self, name: str) -> None:
        if name in self.whole and not self.users[name]:
            self.whole.remove(name)
            self.size -= self.trace.size([name])
            self.available -= self.trace.entries([name])

    def _measure(self) -> int:
        """Bytes: gathered weights, and buffers of messages; a message of one weight is its weight's memory."""
        buffers = (message for message in self.buffers if len(message) > 1 or message[0] in self.flying)
        now = self.size + sum(map(self.trace.size, buffers))
        self.entering = max(self.entering, now)
        return now
