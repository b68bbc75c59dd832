"""A layer's matrices by what they do: attention, and multi-layer perceptrons, perhaps of experts. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ows_ds.model.blocks import Block, Matrix, ModelLayers

LEAST = 1024  # tokens of a run, at least: shorter products do not fill a GPU
LONG = 4  # runs that a pass must have for ``auto``


@dataclass(frozen=True)
class MLP:
    """Matrices of an MLP, or stacks of them: of all its experts.

    up: hidden -> between: one, two (gated), or the two in one. rows: experts that a token goes to, else 1.
    """

    up: tuple[Matrix, ...]
    down: Matrix

    @property
    def rows(self) -> int:
        """Rows of activations for each token: one for each of its experts."""
        return self.down.active

    @property
    def between(self) -> int:
        """The inner width."""
        return self.down.in_features

    @property
    def made(self) -> int:
        """Entries a row that are kept for the backward pass, frozen; of experts, their weighted outputs, too."""
        made = sum(m.out_features for m in self.up)
        return made + self.gated + (self.down.out_features if self.down.experts else 0)

    @property
    def gated(self) -> int:
        """Entries of the activation function's output, where that is multiplied with something."""
        return self.between if sum(m.out_features for m in self.up) > self.between else 0


@dataclass(frozen=True)
class LayerParts:
    """A layer's matrices by what they do, found by their shapes and order.

    attention: what takes hidden states and belongs to no MLP: queries, keys, values. output: of attention.
    """

    attention: tuple[Matrix, ...]
    output: Matrix | None
    mlps: tuple[MLP, ...]

    @property
    def made(self) -> int:
        """Entries a token that the MLPs keep for the backward pass, frozen."""
        return sum(mlp.rows * mlp.made for mlp in self.mlps)

    @property
    def heads(self) -> int:
        """Features of all of attention's heads."""
        return 0 if self.output is None else self.output.in_features

    def normed(self, block: Block) -> int:
        """Features of queries and keys, where each head's are normalised: by a weight of a head's size."""
        outputs = [m.out_features for m in self.attention]
        heads = [v.numel for v in block.vectors if outputs and v.numel not in outputs and v.numel < min(outputs)]
        return sum(outputs[: sum(all(out % size == 0 for out in outputs) for size in heads)])

    @property
    def widest(self) -> MLP | None:
        """The MLP that makes most."""
        return max(self.mlps, key=lambda mlp: mlp.rows * mlp.between, default=None)


def split(block: Block, hidden: int) -> LayerParts:
    """What looks like neither experts nor an MLP is taken for attention, whatever it is. Found once for each object."""
    known = _parts.get((id(block), hidden))
    if known is None or known[0] is not block:
        known = _parts[id(block), hidden] = block, _split(block, hidden)
    return known[1]


_parts: dict[tuple[int, int], tuple[Block, LayerParts]] = {}  # by identity: a hash of a layer takes as long as this


def _split(block: Block, hidden: int) -> LayerParts:
    stacks = [m for m in block.matrices if m.experts]
    rest = [m for m in block.matrices if not m.experts]
    mlps = []
    for down in (m for m in stacks if m.out_features == hidden and m.in_features != hidden):
        up = tuple(
            m for m in stacks if m.in_features == hidden and m.out_features in (down.in_features, 2 * down.in_features)
        )
        mlps.append(MLP(up, down))
    found = next((m for m in reversed(rest) if m.out_features == hidden), None)
    if found is not None:
        widths = (found.in_features, 2 * found.in_features)
        up = tuple(m for m in rest if m is not found and m.in_features == hidden and m.out_features in widths)
        others = [m for m in rest if m is not found and m not in up]
        if up and any(m.out_features == hidden for m in others):
            mlps.append(MLP(up, found))
            rest = others
    output = next((m for m in reversed(rest) if m.out_features == hidden), None)
    return LayerParts(tuple(m for m in rest if m is not output), output, tuple(mlps))


# ------------------------------------------------------------------ MLPs in runs of tokens


def tile_length(setting: bool | str, tokens: int, hidden: int) -> int | None:
    """Tokens of a run, as long as hidden states are wide; None: an MLP takes all at once.

    setting: ``train.tiled_mlp``. tokens: the most of a pass. hidden: features of a hidden state.
    """
    tile = max(LEAST, hidden)
    return tile if setting is True or (setting == "auto" and tokens >= LONG * tile) else None


def find_mlps(layers: ModelLayers) -> list[str]:
    """Names of the modules that are a layer's MLP and nothing else: not of experts, to which tokens go one by one."""
    found = []
    hidden = layers.embeddings[-1].shape[1]
    for block in layers.layers:
        for mlp in split(block, hidden).mlps:
            names = {module for matrix in (*mlp.up, mlp.down) for module in matrix.modules[:1]}
            parents = {name.rpartition(".")[0] for name in names}
            parent = parents.pop()
            others = [m for m in block.matrices if m not in mlp.up and m is not mlp.down]
            inside = any(f"{m.modules[0]}.".startswith(f"{parent}.") for m in others)
            if not (parents or mlp.down.experts or inside or parent == block.name):
                found.append(parent)
    return found


def gathered_at_once(layers: ModelLayers, compiled: bool, tile: int | None) -> list[str]:
    """Names of the modules whose weights ZeRO-3 has to gather together: what is compiled as one, and what several runs
    of tokens go through one after the other."""
    if compiled:
        return [block.name for block in layers.layers]
    return [] if tile is None else find_mlps(layers)
