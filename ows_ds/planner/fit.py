"""What makes a run fit into the memory that is there: ``auto`` keys are chosen, a run that cannot fit is refused.

First what leaves the training as it is: micro-batch and checkpointing, the fastest that fit. Where none does, `LEVERS`:
small changes of what is trained, one after the other, and of these no more than are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ows_ds import config
from ows_ds.config import Recipe, changed, value_of
from ows_ds.errors import UserError
from ows_ds.planner.choices import Choice, powers
from ows_ds.planner.forecast import DEVIATIONS, Planner
from ows_ds.tables import gib

ENOUGH = 8192  # tokens of a pass, of which more make it hardly faster
HALF = 512  # tokens with which a pass takes twice the time a token


class Lever(NamedTuple):
    """A change of what is trained that saves memory."""

    key: str
    changes: Callable[[Any], bool]  # which values
    value: Any
    meaning: str


LEVERS = (  # those that change least first
    Lever("optim.refresh", ("full",).__contains__, "compressed", "sums of gradients for projectors are compressed"),
    Lever("optim.refresh_batch", ("full",).__contains__, "first", "projectors are found from the first micro-batch"),
    Lever("sampling.scheme", ("bernoulli",).__contains__, "fixed", "never more than gamma layers train at a time"),
    Lever("model.frozen", ("same",).__contains__, "int8", "layers that do not train at the moment are in 8 bits"),
    Lever("optim.moments", ("float32",).__contains__, "int8", "moments of embedding and head are in 8 bits"),
    Lever("optim.master", ("float32",).__contains__, "none", "embedding and head have no float32 copy"),
    Lever("optim.always_on", ("full", "low_rank").__contains__, "none", "embedding and head do not train"),
    Lever("model.frozen", ("same", "int8", "fp8").__contains__, "nf4", "layers that do not train are in 4 bits"),
    Lever("sampling.gamma", lambda gamma: gamma > 5, 5.0, "5 layers train at a time"),
    Lever("sampling.gamma", lambda gamma: gamma > 2, 2.0, "2 layers train at a time"),
    Lever("optim.rank", lambda rank: rank > 64, 64, "rank 64"),
)
IN_BITS = {("model.frozen", "nf4"), ("optim.moments", "int8")}  # what bitsandbytes makes


@dataclass(frozen=True)
class Fitted:
    """What was chosen. changes: of what is trained, by key. peak: planned bytes of a GPU."""

    planner: Planner
    choice: Choice
    changes: Mapping[str, Any]
    peak: int
    fits: bool

    @property
    def recipe(self) -> Recipe:
        """With all that was chosen; in it only period and gamma, which steps and layers decide, may be ``auto``."""
        settings = self.choice.settings()
        chosen = {key: settings[key.partition(".")[2]] for key in CHOSEN}
        return config.exact(changed(self.planner.recipe, chosen))

    def options(self, other: Choice | None = None) -> list[str]:
        """The command line's options for what was changed, also of ``other``."""
        changes = [(f"--{key}", str(value)) for key, value in self.changes.items()]
        return [word for pair in (*changes, *self.choice.options(other)) for word in pair]

    def lines(self, auto: Container[str], place: str, free: float) -> list[str]:
        """What to show of it. auto: the keys that could be chosen. place: what has ``free`` bytes."""
        shown = {key: value_of(self.recipe, key) for key in CHOSEN if key in auto}
        values = ", ".join(f"{key} {str(value).lower()}" for key, value in shown.items())
        found = [f"chosen for {gib(free)} of a {place}: {values}; {gib(self.peak)} planned"]
        if not shown:
            found = [f"{gib(self.peak)} of a {place} planned, of {gib(free)}"]
        if self.changes:
            meanings = {(one.key, one.value): one.meaning for one in LEVERS}
            said = "; ".join(f"{meanings[pair].upper()} ({pair[0]} {pair[1]})" for pair in self.changes.items())
            found.append(f"NOTHING THAT IS EXACT FITS: {said}")
        return found


CHOSEN = ("train.micro_batch_size", "train.gradient_checkpointing")  # of keys that may be auto, what is always shown


def fit(
    planner: Planner,
    choices: Iterable[Choice],
    free: float,
    keys: Container[str] | None = None,
    possible: Callable[[str, Any], bool] = lambda key, value: True,
) -> Fitted:
    """The first of ``choices`` whose largest step fits into ``free`` bytes, with as few `LEVERS` as that takes.

    keys: the only ones that may be changed; None: any. possible: whether a key may have a value here. Where nothing
    fits, the leanest of all.
    """
    choices = list(choices)

    def first(one: Planner) -> tuple[Choice, int] | None:
        found = ((choice, one.peak(choice, DEVIATIONS)) for choice in choices)
        return next((pair for pair in found if pair[1] <= free), None)

    taken: dict[str, Any] = {}
    last, found = planner, first(planner)
    levers = _levers(planner, keys, possible)
    while found is None:
        if (more := next(levers, None)) is None:
            choice = min(choices, key=last.peak)
            return Fitted(last, choice, taken, last.peak(choice, DEVIATIONS), False)
        taken, last = more
        found = first(last)
    for key in reversed([*taken][:-1]):  # what the last one has made needless
        fewer = {name: value for name, value in taken.items() if name != key}
        one = _with(planner, fewer)
        if one is not None and (again := first(one)):
            taken, last, found = fewer, one, again
    return Fitted(last, found[0], taken, found[1], True)


def by_speed(planner: Planner, world_size: int, homes: Iterable[str]) -> list[Choice]:
    """What leaves the training as it is: keys of the recipe that are not ``auto`` as they are, the fastest first; of
    equals those that need least."""
    recipe, auto = planner.recipe, planner.recipe.auto
    asked, ranks = planner.choice(world_size), config.data_ranks(recipe, world_size)
    share = max(1, recipe.train.global_batch_size // ranks)
    sizes = [asked.micro_batch]
    if "train.micro_batch_size" in auto:
        sizes = [size for size in powers(share) if recipe.train.global_batch_size % (size * ranks) == 0] or [1]
    ways = (False, True) if "train.gradient_checkpointing" in auto else (asked.checkpointing,)
    found = [Choice(world_size, home, size, way) for home in homes for size in sizes for way in ways]

    def slow(choice: Choice) -> tuple[float, int]:
        tokens = min(choice.micro_batch * recipe.data.max_length, ENOUGH)
        return (3 + choice.checkpointing) * (1 + HALF / tokens), choice.micro_batch  # forward is a third

    return sorted(found, key=slow)


def _levers(
    planner: Planner, keys: Container[str] | None, possible: Callable[[str, Any], bool]
) -> Iterator[tuple[dict[str, Any], Planner]]:
    """``planner`` under `LEVERS`, one more each time, and what they change. What the method does not take is left
    out."""
    taken: dict[str, Any] = {}
    for key, changes, value, _ in LEVERS:
        now = taken.get(key, planner.gamma if key == "sampling.gamma" else value_of(planner.recipe, key))
        if not changes(now) or (keys is not None and key not in keys) or not possible(key, value):
            continue
        if (one := _with(planner, {**taken, key: value})) is None:
            continue
        taken = {**{name: old for name, old in taken.items() if name != key}, key: value}
        yield taken, one


def _with(planner: Planner, changes: Mapping[str, Any]) -> Planner | None:
    """The same with other values of some keys; None where the method has no use for them."""
    recipe = changed(planner.recipe, changes)
    try:
        config.check(recipe, files=False)
    except UserError:
        return None
    return Planner(recipe, planner.model, planner.ratios, planner.replays)


def require(
    planner: Planner, asked: Choice, free: int, margin: float = 1.0, place: tuple[str, str] = ("GPU", "GPUs")
) -> None:
    """Refuse (UserError) a step that cannot fit into ``free`` bytes, before weights are loaded.

    The set that is expected must fit, not the largest that may be drawn. margin: so many times ``free`` may be planned.
    place: what has ``free`` bytes, one and several, for the message, which says what would fit.
    """
    needed = planner.peak(asked)
    if needed <= free * margin:
        return
    homes = ("replicated", "zero3") if asked.world_size > 1 else ("replicated",)
    sizes = dict.fromkeys((asked.micro_batch, 1))
    others = [Choice(asked.world_size, home, size, way) for home in homes for size in sizes for way in (False, True)]
    fitted = fit(planner, others, free)
    right = f"more {place[1]} under zero3, or a smaller optim.rank"
    if fitted.fits:
        options = fitted.options(asked)
        pairs = [f"{key} {value}" for key, value in zip(options[::2], options[1::2], strict=True)]
        right = f"{', '.join(pairs)}, which needs {gib(fitted.peak)}"
    needs = f"a step needs {gib(needed)} of a {place[0]} that has {gib(free)}"
    raise UserError("train.sharding", asked.sharding, f"{needs}; expected {right}")
