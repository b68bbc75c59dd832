"""Importance of layers -> sampling probabilities -> the set of layers to train next (OWS, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ows_ds.errors import UserError
from ows_ds.importance.probabilities import probabilities

LayerSet = tuple[int, ...]
"""Indices of the sampled layers, or of the blocks that stand for them, ascending, 0 = nearest the input."""


class Sampler:
    """Draws layer sets from its own random stream, which nothing else in the program touches.

    scheme: ``bernoulli``: layer l when U(0, 1) <= p_l, each on its own (Algorithm 1). ``fixed``: exactly gamma layers
    a draw, layer l in a share p_l of the draws: Madow's systematic sampling in random order (Ann. Math. Stat. 20,
    1949). Drawing one layer after the other with weights p, as the authors' code does, has neither exact shares
    nor certainty for p_l = 1.
    """

    def __init__(self, probabilities: Sequence[float], scheme: str, seed: int) -> None:
        self.probabilities = list(probabilities)
        self.scheme = scheme
        self._stream = np.random.Generator(np.random.PCG64(seed))
        gamma = sum(self.probabilities)
        if scheme == "fixed" and not math.isclose(gamma, round(gamma), abs_tol=1e-9):
            raise UserError("sampling.gamma", gamma, "expected a whole number with sampling.scheme: fixed")

    def draw(self) -> LayerSet:
        """The next set; advances the stream."""
        p = np.asarray(self.probabilities)
        if self.scheme == "bernoulli":
            # random() is in [0, 1), so that "<" gives probability p exactly, 0 and 1 included
            return tuple(int(i) for i in np.flatnonzero(self._stream.random(len(p)) < p))
        order = self._stream.permutation(len(p))
        # layer i covers a stretch of length p_i; one point a unit, all shifted by the same uniform offset
        ends = np.concatenate([[0.0], np.cumsum(p[order])])
        ends[-1] = round(ends[-1])
        hits = np.ceil(ends - self._stream.random())
        return tuple(sorted(int(i) for i in order[np.diff(hits) > 0]))

    def state_dict(self) -> dict[str, Any]:
        """The stream's position, JSON-able."""
        return dict(self._stream.bit_generator.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where ``state`` was taken."""
        self._stream.bit_generator.state = state


class AdaptiveSampler(Sampler):
    """Draws layers in proportion to the gradients that they have had, each at least now and then.

    p_l = gamma ((1 - floor) m_l / sum(m) + floor / N_L), clipped as in `probabilities`. m_l is a moving mean over the
    periods in which the layer trained of its gradients' norm, which MISA (arXiv 2511.00056) and GRASS (arXiv
    2604.07808) sample by in their ways; of a layer that has not trained yet, the mean over those that have.

    sizes: see `probabilities`. decay: weight of the mean so far when a layer has trained again. Means are rounded to 6
    digits before they make probabilities, so that the order of sums over ranks does not show in the draws.
    """

    def __init__(
        self, sizes: Sequence[float], gamma: float, scheme: str, seed: int, *, decay: float, floor: float
    ) -> None:
        super().__init__(probabilities([1.0] * len(sizes), gamma, sizes=sizes), scheme, seed)
        self.sizes, self.gamma, self.decay, self.floor = sizes, gamma, decay, floor
        self.means: list[float | None] = [None] * len(sizes)

    def observe(self, norms: Mapping[int, float]) -> None:
        """Take in a period: by layer that trained in it, the root mean square of its steps' gradient norms."""
        for layer, norm in norms.items():
            before = self.means[layer]
            self.means[layer] = norm if before is None else self.decay * before + (1 - self.decay) * norm
        self._adapt()

    def _adapt(self) -> None:
        known = [float(f"{mean:.5e}") for mean in self.means if mean is not None]
        if not sum(known):
            return
        usual = sum(known) / len(known)
        weights = [usual if mean is None else float(f"{mean:.5e}") for mean in self.means]
        even = self.floor * sum(weights) / len(weights)
        mixed = [(1 - self.floor) * weight + even for weight in weights]
        self.probabilities = probabilities(mixed, self.gamma, sizes=self.sizes)

    def state_dict(self) -> dict[str, Any]:
        return {"stream": super().state_dict(), "means": list(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["stream"])
        self.means = list(state["means"])
        self._adapt()


class Cycle:
    """One layer after the other, round after round, with an interface like `Sampler`'s.

    order: ``ascending`` from the input, ``descending`` from the output, ``random``: again in each round.
    """

    def __init__(self, n_layers: int, order: str, seed: int) -> None:
        self.n_layers, self.order, self.seed = n_layers, order, seed
        self._drawn = 0

    def draw(self) -> LayerSet:
        """The next layer."""
        turn, place = divmod(self._drawn, self.n_layers)
        self._drawn += 1
        if self.order == "ascending":
            return (place,)
        if self.order == "descending":
            return (self.n_layers - 1 - place,)
        stream = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, turn])))
        return (int(stream.permutation(self.n_layers)[place]),)

    def state_dict(self) -> dict[str, Any]:
        """How many were drawn, JSON-able."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where ``state`` was taken."""
        self._drawn = int(state["drawn"])
