"""Importance of layers -> sampling probabilities (OWS, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ows_ds.config import Recipe
from ows_ds.errors import UserError

METRIC_OF = {"outlier": "outlier", "reverse": "outlier", "rm": "rm", "bi": "bi", "alpha": "alpha"}
"""Kinds of importance that need scores of the layers, and the metric that these must be of."""


def importance(kind: str, n_layers: int, ratios: Sequence[float] | None = None) -> list[float]:
    """What layers are sampled in proportion to, one number >= 0 each, input side first.

    outlier: D (equation 2). reverse: max(D) - D, OWS-Reverse (Li et al., appendix A). uniform: 1, LISA (equation 1).
    decreasing: N_L - l, LISA-D (Li et al., section 2.2). rm, bi: the metric itself (Li et al., table 9). alpha:
    1 / alpha, so that heavier tails are sampled more (Li et al., OwLore, abstract). gradient: 1, from which it adapts
    while training (`ows_ds.optim.sampling.AdaptiveSampler`). The metrics are those of `ows_ds.importance.scores` and
    `ows_ds.importance.metrics`.

    ratios: the metric's values, for the kinds in `METRIC_OF`. Raises UserError (``sampling.scores``) for an alpha of 0.
    """
    if kind in ("uniform", "gradient"):
        return [1.0] * n_layers
    if kind == "decreasing":
        return [float(n_layers - layer) for layer in range(n_layers)]
    if ratios is None:
        raise ValueError(f"importance {kind} needs the layers' ratios")
    if kind == "reverse":
        return [max(ratios) - ratio for ratio in ratios]
    if kind == "alpha":
        if min(ratios) <= 0:
            raise UserError("sampling.scores", list(ratios), "expected alphas above 0")
        return [1 / ratio for ratio in ratios]
    return list(ratios)


def probabilities(
    ratios: Sequence[float], gamma: float, tau: float | None = None, sizes: Sequence[float] | None = None
) -> list[float]:
    """p_l = gamma * D_l / sum(D), clipped to 1, with what is clipped spread over the others in proportion.

    ratios: D_l >= 0, one a layer. gamma: expected number of sampled layers, 0 < gamma <= number of layers. sizes: how
    many layers each counts for, where these are parts of layers; their sum is the largest gamma.
    The sum of the result (times ``sizes``) is gamma to rounding: layers are fixed at 1 one round after the other until
    the share that is left for the others exceeds 1 for none of them (the paper clips nothing and does not say what
    happens).
    Raises UserError: ``sampling.scores`` for ratios that are no such numbers, ``sampling.tau`` where no layer has an
    outlier, ``sampling.gamma`` where gamma is too large, also when more layers than have D > 0 would be needed.
    """
    weights = np.asarray(ratios, dtype=np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise UserError("sampling.scores", list(ratios), "expected finite numbers of at least 0")
    share = np.ones_like(weights) if sizes is None else np.asarray(sizes, dtype=np.float64)
    number = round(share.sum())
    if not 0 < gamma <= number:
        right = f"expected more than 0 and at most {number}, the number of layers"
        raise UserError("sampling.gamma", gamma, right)
    if weights.sum() <= 0:
        raise UserError("sampling.tau", tau, "expected a smaller threshold: no layer has an outlier at this one")
    able = share[weights > 0].sum()
    if gamma > able + 1e-9:
        right = f"expected at most {able:g}, the number of layers with an importance above 0"
        raise UserError("sampling.gamma", gamma, right)
    result = np.zeros_like(weights)
    sure = np.zeros(len(weights), dtype=bool)
    while True:
        free = ~sure & (weights > 0)
        left = gamma - share[sure].sum()
        result[sure] = 1.0
        result[free] = left * weights[free] / (weights[free] * share[free]).sum() if free.any() else 0.0
        over = free & (result >= 1.0)
        if not over.any():
            return [float(p) for p in result]
        sure |= over


def importance_of(recipe: Recipe) -> str:
    """What layers are sampled by: ``sampling.importance`` under ows, else what defines the method."""
    name = recipe.method.name
    return recipe.sampling.importance if name == "ows" else "decreasing" if name == "lisa-d" else "uniform"
