"""A full gradient -> the projector of its dominant subspace, and the gradient inside it (GaLore, section 4.1).

Letters: G (m, n) gradient of a weight as stored; r rank; Q (min(m, n), r) projector with orthonormal columns, the top
singular vectors of G's shorter side; C, R (max(m, n), r) coordinates and low-rank gradient. In the paper's notation
P = Q^T for m >= n (R = G P^T) and P = Q for m < n (R^T = P^T G): keeping r last in all of them makes the
two sides one case, W + C Q^T, the second transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 8
POWER_ITERATIONS = 2


def is_tall(shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether the coordinates stand on the left: W = W_0 + C Q^T (m >= n), else W = W_0 + Q C^T."""
    return shape[0] >= shape[1]


def low_rank_gradient(gradient: Tensor, projector: Tensor) -> Tensor:
    """R (max(m, n), r) in the projector's dtype from G (m, n), any dtype, and Q (min(m, n), r)."""
    gradient = gradient.to(projector.dtype)
    return gradient @ projector if is_tall(gradient.shape) else gradient.T @ projector


def exact_projector(gradient: Tensor, rank: int) -> Tensor:
    """Q (min(m, n), r), float32, from an exact singular value decomposition of G (m, n) in float32."""
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    return (right[:rank].T if is_tall(gradient.shape) else left[:, :rank]).contiguous()


def randomized_projector(gradient: Tensor, rank: int, seed: int) -> Tensor:
    """Q (min(m, n), r), float32: randomised range finder with power iterations (Halko, Martinsson, Tropp 2011, 4.4).

    seed: of the Gaussian test matrix, so that the result does not depend on who computes it. About
    (2 * POWER_ITERATIONS + 2) * m * n * (r + OVERSAMPLING) multiply-adds in place of an SVD's m * n * min(m, n).
    """
    matrix = gradient.float()
    if not is_tall(matrix.shape):
        matrix = matrix.T
    short = matrix.shape[1]
    width = min(rank + OVERSAMPLING, short)
    stream = torch.Generator().manual_seed(seed)
    basis = torch.randn(short, width, generator=stream).to(matrix.device)
    for _ in range(POWER_ITERATIONS + 1):
        # orthonormalised between products: powers of G^T G alone would drown all but the first direction
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
    image = matrix @ basis
    _, vectors = torch.linalg.eigh(image.T @ image)
    return basis @ vectors[:, -rank:].flip(-1)


def find_projector(gradient: Tensor, rank: int, method: str, seed: int = 0) -> Tensor:
    """Q by ``method``: ``svd`` or ``randomized``."""
    if method == "svd":
        return exact_projector(gradient, rank)
    return randomized_projector(gradient, rank, seed)


def rotation(old: Tensor, new: Tensor) -> Tensor:
    """(r, r), float32: old coordinates times this are their best approximation in the new subspace."""
    return old.float().T @ new.float()
