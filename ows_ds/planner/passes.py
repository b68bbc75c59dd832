"""The uses of modules in a pass of a model of which only the outline is known: what `recording.record` would find."""

from __future__ import annotations

from collections.abc import Iterator

from ows_ds.compat.checkpointing import enters_layer_again
from ows_ds.model.outline import EMBEDDING, FINAL, HEAD, STACK, Outline
from ows_ds.planner.gathering import Trace, Use


def passes(outline: Outline, lowest: int | None, outside: bool, checkpointing: bool) -> Trace:
    """A pass forward and, where anything trains, backward.

    lowest: of the layers that train in full; None: none does. outside: the embedding trains, too.
    """
    last = outline.shape.layers - 1
    inner = [("model", True), *_leaf(EMBEDDING), *_leaf("model.rotary_emb")]
    inner += [use for index in range(last + 1) for use in outline.running(index)]
    inner += [*_leaf(FINAL), ("model", False), *_leaf(HEAD)]
    uses = [Use("reset"), Use("fetch"), *(_use(*one) for one in inner), Use("release")]
    bottom = 0 if outside else lowest
    if bottom is not None:
        uses += [
            Use("fetch", "", False),
            *_backward(_leaf(HEAD)),
            Use("fetch", "model", False),
            *_backward(_leaf(FINAL)),
        ]
        for index in range(last, bottom - 1, -1):
            uses += _layer(outline, index, outside or index > bottom, checkpointing)
        uses += [Use("fetch", EMBEDDING, False)] if outside else []
    weights = {name: tuple(own) for name, own in outline.modules.items()}
    numel = {name: _numel(shape) for own in outline.modules.values() for name, shape in own.items()}
    return Trace((*uses, Use("leftovers")), weights, numel, frozenset())


def _layer(outline: Outline, index: int, passing: bool, checkpointing: bool) -> Iterator[Use]:
    """A layer's backward pass. passing: gradients go on to the layer below."""
    forward = list(outline.running(index))
    layer, first = f"{STACK}.{index}", f"{STACK}.{index}.{outline.family.run[0]}"
    # attention gets its input by name, where DeepSpeed does not look; the first norm's has no gradient at the bottom
    unseen = {f"{layer}.self_attn", *(() if passing else (layer, first))}
    *_, end = (place for place, (name, entered) in enumerate(forward) if entered and name in outline.modules
               and outline.modules[name])  # fmt: skip
    again, start = checkpointing, 0 if enters_layer_again() else 1
    for use in _backward(forward):
        if use.kind == "release" and use.module in unseen:
            continue
        yield use
        if again and use.module == forward[end][0]:  # its tensors are wanted: the layer runs again, as far as here
            yield from (_use(name, entered, True) for name, entered in forward[start : end + 1])
            again = False


def _leaf(name: str) -> list[tuple[str, bool]]:
    return [(name, True), (name, False)]


def _use(name: str, entered: bool, again: bool = False) -> Use:
    return Use("fetch" if entered else "release", name, True, again)


def _backward(forward: list[tuple[str, bool]]) -> Iterator[Use]:
    """The same the other way round: what was left last is entered first."""
    return (Use("release" if entered else "fetch", name, False) for name, entered in reversed(forward))


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)
