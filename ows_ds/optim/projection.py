"""A full gradient -> the projector of its dominant subspace, and the gradient inside it (GaLore, section 4.1).

Letters: G (m, n) gradient of a weight as stored; r rank; Q (min(m, n), r) projector with orthonormal columns, the top
singular vectors of G's shorter side; C, R (max(m, n), r) coordinates and low-rank gradient. In the paper's notation
P = Q^T for m >= n (R = G P^T) and P = Q for m < n (R^T = P^T G): keeping r last in all of them makes the
two sides one case, W + C Q^T, the second transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ows_ds.compat.torch import to_device

OVERSAMPLING = 8
BLOCK = 1 << 22  # entries of a gradient that are in float32 at once where it is not
ROUNDS = 3  # of the range finder: products with G and with G^T
ROUNDS_FROM_PREVIOUS = 2
CHOLESKY_ROUNDS = 3  # after which columns are orthonormal, however dependent they were
SHIFT = 1e-14  # of a Gram matrix's diagonal, as a share of its trace: its factor exists in float64
NUDGE = 1e-9  # as a share of all columns' norm, far below float32's rounding: directions where columns have none


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
    """Q (min(m, n), r), float32, from an exact singular value decomposition of G (m, n) in float32.

    On a GPU by QR iterations: what torch takes there by itself needs many seconds for a matrix of 4096 columns.
    """
    driver = "gesvd" if gradient.is_cuda else None
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False, driver=driver)
    return (right[:r].T if is_tall(gradient.shape) else left[:, :r]).contiguous()


def start_basis(short: int, width: int, seed: int, previous: Tensor | None = None) -> Tensor:
    """(short, width), float32: where a search begins, the ``previous`` projector (short, r) or nothing, then noise.

    Of full rank, not orthonormal; columns have length 1 on average. The noise is drawn on the CPU from ``seed``, so
    that it depends neither on who draws it nor on the device; previous decides where the result lies.
    """
    known = 0 if previous is None else min(previous.shape[1], width)
    noise = torch.randn(short, width - known, generator=torch.Generator().manual_seed(seed)) / short**0.5
    if previous is None:
        return noise
    return torch.cat([previous[:, :width].float(), to_device(noise, previous.device)], 1)


def orthonormal(columns: Tensor, rounds: int = CHOLESKY_ROUNDS) -> tuple[Tensor, Tensor]:
    """Q (n, k), float32, and R (k, k), float64, with columns (n, k) = Q R and R upper triangular.

    Shifted Cholesky QR (Fukaya et al. 2020) in float64: products and a small factorisation, which cannot fail on finite
    columns and so asks nothing of the device. After three rounds Q is orthonormal whatever the columns were; after one,
    in all directions above float32's rounding.
    """
    scale = torch.linalg.vector_norm(columns, dtype=torch.float64)
    q = columns.to(torch.float64, copy=True).div_(torch.where(scale > 0, scale, 1.0))
    q.diagonal().add_(NUDGE)
    upper = torch.eye(q.shape[1], dtype=q.dtype, device=q.device) * scale
    for _ in range(rounds):
        gram = q.T @ q
        gram.diagonal().add_(SHIFT * gram.trace())
        factor, _ = torch.linalg.cholesky_ex(gram)
        q = torch.linalg.solve_triangular(factor, q.T, upper=False).T
        upper = factor.T @ upper
    return q.float(), upper


@dataclass
class Range:
    """An orthonormal basis of a gradient's range, among which the leading directions are still to be chosen.

    basis: (n, k), float32. squares: (k, k), float64, whose leading eigenvectors are the directions inside the basis;
    None: the basis holds them in order. norm: (), of the gradient; nothing is made of one that is not finite.
    """

    basis: Tensor
    squares: Tensor | None
    norm: Tensor


def range_of(columns: Tensor) -> Range:
    """Of columns (n, k), by their left singular vectors. Does not wait for the device."""
    q, upper = orthonormal(columns)
    squares = upper @ upper.T
    return Range(q, squares, squares.trace())


def find_range(gradient: Tensor, r: int, method: str, seed: int = 0, previous: Tensor | None = None) -> Range:
    """Of G (m, n), any dtype, on its shorter side.

    method: ``svd``, exact; or ``randomized``, the range finder of Halko, Martinsson, Tropp 2011, algorithm 4.4, without
    a wait for the device: about 2 * rounds * m * n * (r + OVERSAMPLING) multiply-adds, in place of an SVD's
    m * n * min(m, n) times ten or more. seed: of the noise that it starts with, beside the ``previous`` projector
    (min(m, n), r) where there is one, which saves a round.
    """
    norm = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
    if method == "svd":  # which refuses what is not finite
        return Range(exact_projector(torch.where(norm.isfinite(), gradient, 0.0), r), None, norm)
    matrix = gradient if is_tall(gradient.shape) else gradient.T
    width = min(r + OVERSAMPLING, *matrix.shape)
    image = to_device(start_basis(matrix.shape[1], width, seed, previous), matrix.device)
    for _ in range(ROUNDS if previous is None else ROUNDS_FROM_PREVIOUS):
        # orthonormalised between products: powers of G^T G alone would drown all but the first direction
        image = _product(matrix.T, orthonormal(_product(matrix, orthonormal(image, 1)[0]), 1)[0])
    # G^T times a basis of (nearly) G's range: its singular vectors are about G's
    found = range_of(image)
    return Range(found.basis, found.squares, norm)


def choose(ranges: Mapping[str, Range], r: int, near: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, (k, r), float64: a basis times it is the projector. Left out where a gradient is not finite.

    Where a name is in ``near``, (n, r), of all bases of that subspace the nearest to it: Q U V^T of Q^T Q_old = U S V^T
    (orthogonal Procrustes). It depends on the subspace alone, not on the signs and the order in which a decomposition
    gives its directions, which rounding decides where these are alike.

    One wait for the device in all; the small decompositions are the CPU's, which a GPU is no quicker at.
    """
    parts = []
    for name, one in ranges.items():
        overlap = one.basis.double().T @ near[name].double() if name in near else one.norm.new_empty(0)
        parts += [one.norm.double(), one.norm.new_empty(0) if one.squares is None else one.squares, overlap.double()]
    if not parts:
        return {}
    numbers = torch.cat([part.flatten() for part in parts]).cpu().split([part.numel() for part in parts])
    on_cpu = iter([some.view(part.shape) for some, part in zip(numbers, parts, strict=True)])
    turns = {}
    for (name, one), norm, squares, overlap in zip(ranges.items(), on_cpu, on_cpu, on_cpu, strict=True):
        if not norm.isfinite():
            continue
        turn = torch.eye(one.basis.shape[1], r, dtype=torch.float64)
        if squares.numel():
            turn = torch.linalg.eigh(squares).eigenvectors[:, -r:].flip(-1)
        if overlap.numel():
            left, _, right = torch.linalg.svd(turn.T @ overlap)
            turn = turn @ (left @ right)
        turns[name] = turn
    if not turns:
        return {}
    moved = to_device(torch.cat([turn.flatten() for turn in turns.values()]), next(iter(ranges.values())).basis.device)
    sizes = [turn.numel() for turn in turns.values()]
    return {name: moved.view(turn.shape) for (name, turn), moved in zip(turns.items(), moved.split(sizes), strict=True)}


def leading(columns: Tensor, r: int, near: Tensor | None = None) -> Tensor:
    """(n, r), orthonormal: the top left singular vectors of columns (n, k), k >= r, the strongest first.

    near: see `choose`. Float64 where the columns are, else float32.
    """
    return _chosen(range_of(columns), r, near, columns.dtype)


def find_projector(
    gradient: Tensor, r: int, method: str, seed: int = 0, previous: Tensor | None = None, near: Tensor | None = None
) -> Tensor:
    """Q (min(m, n), r) of a finite G: `find_range` and `choose` in one. Float64 where G is, else float32."""
    return _chosen(find_range(gradient, r, method, seed, previous), r, near, gradient.dtype)


def _chosen(found: Range, r: int, near: Tensor | None, dtype: torch.dtype) -> Tensor:
    turn = choose({"": found}, r, {} if near is None else {"": near})[""]
    wide = torch.promote_types(dtype, torch.float32)
    return found.basis.to(wide) @ turn.to(wide)


def sketch_width(r: int, short: int) -> int:
    """Columns of a sketch: more than twice the rank, for two products make one round, and there is no other."""
    return min(2 * r + OVERSAMPLING, short)


def rotation(old: Tensor, new: Tensor) -> Tensor:
    """(r, r), float32: old coordinates times this are their best approximation in the new subspace."""
    return old.float().T @ new.float()
