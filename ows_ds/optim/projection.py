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
BLOCK = 1 << 22  # entries of a gradient that are in float32 at once where it is not
ROUNDS = 3  # of the range finder: products with G and with G^T
ROUNDS_FROM_PREVIOUS = 2
WELL_CONDITIONED = 1e-4  # smallest over largest diagonal entry of R, from which Q is orthonormal to about 1e-7


def is_tall(shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether the coordinates stand on the left: W = W_0 + C Q^T (m >= n), else W = W_0 + Q C^T."""
    return shape[0] >= shape[1]


def low_rank_gradient(gradient: Tensor, projector: Tensor) -> Tensor:
    """R (max(m, n), r) in the projector's dtype from G (m, n), any dtype, and Q (min(m, n), r)."""
    return _product(gradient if is_tall(gradient.shape) else gradient.T, projector)


def _product(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix @ factor in the factor's dtype, without a whole copy of the matrix where its dtype is another."""
    if matrix.dtype == factor.dtype:
        return matrix @ factor
    rows = max(1, BLOCK // matrix.shape[1])
    return torch.cat([some.to(factor.dtype) @ factor for some in matrix.split(rows)])


def exact_projector(gradient: Tensor, r: int) -> Tensor:
    """Q (min(m, n), r), float32, from an exact singular value decomposition of G (m, n) in float32."""
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    return (right[:r].T if is_tall(gradient.shape) else left[:, :r]).contiguous()


def start_basis(short: int, width: int, seed: int, previous: Tensor | None = None) -> Tensor:
    """(short, width), float32: where a search begins, the ``previous`` projector (short, r) or nothing, then noise.

    Of full rank, not orthonormal; columns have length 1 on average. The noise is drawn on the CPU from ``seed``, so
    that it does not depend on who draws it; previous decides the device.
    """
    noise = torch.randn(short, width, generator=torch.Generator().manual_seed(seed)) / short**0.5
    if previous is None:
        return noise
    kept = previous[:, :width].float()
    return torch.cat([kept, noise[:, kept.shape[1] :].to(kept.device)], 1)


def orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Q (n, k) and R (k, k), both float32, with columns (n, k) = Q R and Q orthonormal.

    Cholesky's factor of the Gram matrix, in float64, where that is accurate: products and a small factorisation.
    Householder's reflections where columns are nearly dependent.
    """
    wide = columns.double()
    factor, failed = torch.linalg.cholesky_ex(wide.T @ wide)
    diagonal = factor.diagonal()
    if failed or not diagonal.min() > WELL_CONDITIONED * diagonal.max():
        q, r = torch.linalg.qr(columns.float())
        return q, r
    q = torch.linalg.solve_triangular(factor, wide.T, upper=False).T
    return q.float(), factor.T.float()


def leading(columns: Tensor, r: int) -> Tensor:
    """(n, r), float32, orthonormal: the top left singular vectors of columns (n, k), k >= r, the strongest first."""
    q, upper = orthonormal(columns)
    _, vectors = torch.linalg.eigh(upper.double() @ upper.double().T)
    return q @ vectors[:, -r:].flip(-1).float()


def randomized_projector(gradient: Tensor, r: int, seed: int, previous: Tensor | None = None) -> Tensor:
    """Q (min(m, n), r), float32: randomised range finder (Halko, Martinsson, Tropp 2011, algorithm 4.4).

    seed: of the noise that it starts with, beside the ``previous`` projector (min(m, n), r) where there is one, which
    saves a round. About 2 * rounds * m * n * (r + OVERSAMPLING) multiply-adds, in place of an SVD's m * n * min(m, n)
    times ten or more.
    """
    matrix = gradient if is_tall(gradient.shape) else gradient.T
    width = min(r + OVERSAMPLING, *matrix.shape)
    image = start_basis(matrix.shape[1], width, seed, previous).to(matrix.device)
    for _ in range(ROUNDS if previous is None else ROUNDS_FROM_PREVIOUS):
        # orthonormalised between products: powers of G^T G alone would drown all but the first direction
        image = _product(matrix.T, orthonormal(_product(matrix, orthonormal(image)[0]))[0])
    # G^T times an orthonormal basis of (nearly) G's range: its singular vectors are G's
    return leading(image, r)


def find_projector(gradient: Tensor, r: int, method: str, seed: int = 0, previous: Tensor | None = None) -> Tensor:
    """Q by ``method``: ``svd``, or ``randomized`` from ``seed`` and the ``previous`` projector."""
    if method == "svd":
        return exact_projector(gradient, r)
    return randomized_projector(gradient, r, seed, previous)


def sketch_width(r: int, short: int) -> int:
    """Columns of a sketch: more than twice the rank, for two products make one round, and there is no other."""
    return min(2 * r + OVERSAMPLING, short)


def aligned(projector: Tensor, to: Tensor) -> Tensor:
    """The basis of the subspace of ``projector`` (n, r) that is nearest to the basis ``to`` (n, r), in float64.

    Q U V^T of Q^T Q_old = U S V^T (orthogonal Procrustes): it depends on the subspace alone, not on the signs and the
    order in which a decomposition gives its directions, which rounding decides where these are alike.
    """
    wide = projector.double()
    left, _, right = torch.linalg.svd(wide.T @ to.to(wide))
    return (wide @ (left @ right)).to(projector.dtype)


def rotation(old: Tensor, new: Tensor) -> Tensor:
    """(r, r), float32: old coordinates times this are their best approximation in the new subspace."""
    return old.float().T @ new.float()
