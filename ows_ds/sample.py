"""Importance of layers -> sampling probabilities -> the set of layers to train next (OWS, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ows_ds.errors import UserError

LayerSet = tuple[int, ...]
"""Indices of the sampled layers, ascending, 0 = nearest the input."""

METRIC_OF = {"outlier": "outlier", "reverse": "outlier", "rm": "rm", "bi": "bi", "alpha": "alpha"}
"""Kinds of importance that need scores of the layers, and the metric that these must be of."""


def importance(kind: str, n_layers: int, ratios: Sequence[float] | None = None) -> list[float]:
    """What layers are sampled in proportion to, one number >= 0 each, input side first.

    outlier: D (equation 2). reverse: max(D) - D, OWS-Reverse (Li et al., appendix A). uniform: 1, LISA (equation 1).
    decreasing: N_L - l, LISA-D (Li et al., section 2.2). rm, bi: the metric itself (Li et al., table 9). alpha:
    1 / alpha, so that heavier tails are sampled more (Li et al., OwLore, abstract). The metrics are those of
    `ows_ds.score` and `ows_ds.metrics`.

    ratios: the metric's values, for the kinds in `METRIC_OF`. Raises UserError (``sampling.scores``) for an alpha of 0.
    """
    if kind == "uniform":
        return [1.0] * n_layers
    if kind == "decreasing":
        return [float(n_layers - layer) for layer in range(n_layers)]
    if ratios is None:
        raise ValueError(f"importance {kind} needs the layers' ratios")
    if kind == "reverse":
        return [max(ratios) - ratio for ratio in ratios]
    if kind == "alpha":
        if min(ratios) <= 0:
            raise UserError("sampling.scores", list(ratios), "give alphas above 0")
        return [1 / ratio for ratio in ratios]
    return list(ratios)


def probabilities(ratios: Sequence[float], gamma: float, tau: float | None = None) -> list[float]:
    """p_l = gamma * D_l / sum(D), clipped to 1, with what is clipped spread over the others in proportion.

    ratios: D_l >= 0, one a layer. gamma: expected number of sampled layers, 0 < gamma <= number of layers.
    The sum of the result is gamma to rounding: layers are fixed at 1 one round after the other until the share that
    is left for the others exceeds 1 for none of them (the paper clips nothing and does not say what happens).
    Raises UserError: ``sampling.scores`` for ratios that are no such numbers, ``sampling.tau`` where no layer has an
    outlier, ``sampling.gamma`` where gamma is too large, also when more layers than have D > 0 would be needed.
    """
    weights = np.asarray(ratios, dtype=np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise UserError("sampling.scores", list(ratios), "give finite numbers of at least 0")
    if not 0 < gamma <= len(weights):
        raise UserError("sampling.gamma", gamma, f"give more than 0 and at most {len(weights)}, the number of layers")
    if weights.sum() <= 0:
        raise UserError("sampling.tau", tau, "give a smaller threshold: no layer has an outlier at this one")
    able = np.count_nonzero(weights)
    if gamma > able:
        right = f"give at most {able}, the number of layers with an importance above 0"
        raise UserError("sampling.gamma", gamma, right)
    result = np.zeros_like(weights)
    sure = np.zeros(len(weights), dtype=bool)
    while True:
        free = ~sure & (weights > 0)
        left = gamma - sure.sum()
        result[sure] = 1.0
        result[free] = left * weights[free] / weights[free].sum() if free.any() else 0.0
        over = free & (result >= 1.0)
        if not over.any():
            return [float(p) for p in result]
        sure |= over


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
            raise UserError("sampling.gamma", gamma, "give a whole number with sampling.scheme: fixed")

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

    def state(self) -> dict[str, Any]:
        """The stream's position, JSON-able."""
        return dict(self._stream.bit_generator.state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self._stream.bit_generator.state = state


class Cycle:
    """One layer after the other, round after round, with an interface like `Sampler`'s.

    order: ``ascending`` from the input, ``descending`` from the output, ``random``: anew in each round.
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

    def state(self) -> dict[str, Any]:
        """How many were drawn, JSON-able."""
        return {"drawn": self._drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self._drawn = int(state["drawn"])
