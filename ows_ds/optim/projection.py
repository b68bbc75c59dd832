"""A full gradient -> the projector of its dominant subspace, and the gradient inside it (GaLore, section 4.1).

Letters: G (m, n) gradient of a weight as stored; r rank; Q (min(m, n), r) projector with orthonormal columns, the top
singular vectors of G's shorter side; C, R (max(m, n), r) coordinates and low-rank gradient. In the paper's notation
P = Q^T for m >= n (R = G P^T) and P = Q for m < n (R^T = P^T G): keeping r last in all of them makes the
two sides one case, W + C Q^T, the second transposed.

Everything takes stacks, too: (..., m, n) for (m, n), each matrix for itself, all in one batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ows_ds.compat.torch import to_device

Name = TypeVar("Name", bound=Hashable)

OVERSAMPLING = 8
BLOCK = 1 << 22  # entries of a gradient that are in float32 at once where it is not
ROUNDS = 3  # of the range finder: products with G and with G^T
ROUNDS_FROM_PREVIOUS = 2
CHOLESKY_ROUNDS = 3  # after which columns are orthonormal, however dependent they were
SHIFT = 1e-14  # of a Gram matrix's diagonal, as a share of its trace: its factor exists in float64
NUDGE = 1e-9  # as a share of all columns' norm, far below float32's rounding: directions where columns have none


def is_tall(shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether the coordinates stand on the left: W = W_0 + C Q^T (m >= n), else W = W_0 + Q C^T."""
    return shape[-2] >= shape[-1]


def low_rank_gradient(gradient: Tensor, projector: Tensor) -> Tensor:
    """R (max(m, n), r) in the projector's dtype from G (m, n), any dtype, and Q (min(m, n), r)."""
    return _product(gradient if is_tall(gradient.shape) else gradient.mT, projector)


def _product(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix @ factor in the factor's dtype, without a whole copy of the matrix where its dtype is another."""
    if matrix.dtype == factor.dtype:
        return matrix @ factor
    if matrix.dim() > 2:
        at_once = max(1, BLOCK // (matrix.shape[-2] * matrix.shape[-1]))
        pairs = zip(matrix.split(at_once), factor.split(at_once), strict=True)
        return torch.cat([some.to(factor.dtype) @ one for some, one in pairs])
    rows = max(1, BLOCK // matrix.shape[1])
    return torch.cat([some.to(factor.dtype) @ factor for some in matrix.split(rows)])


def exact_projector(gradient: Tensor, r: int) -> Tensor:
    """Q (min(m, n), r), float32, from an exact singular value decomposition of G (m, n) in float32.

    On a GPU by QR iterations: what torch takes there by itself needs many seconds for a matrix of 4096 columns.
    """
    driver = "gesvd" if gradient.is_cuda else None
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False, driver=driver)
    return (right[..., :r, :].mT if is_tall(gradient.shape) else left[..., :r]).contiguous()


def start_basis(short: int, width: int, seed: int | Sequence[int], previous: Tensor | None = None) -> Tensor:
    """(short, width), float32: where a search begins, the ``previous`` projector (short, r) or nothing, then noise.

    Of full rank, not orthonormal; columns have length 1 on average. The noise is drawn on the CPU from ``seed``, so
    that it depends neither on who draws it nor on the device; previous decides where the result lies. Of a stack, a
    sequence of seeds: one for each matrix.
    """
    known = 0 if previous is None else min(previous.shape[-1], width)

    def draw(seed: int) -> Tensor:
        return torch.randn(short, width - known, generator=torch.Generator().manual_seed(seed)) / short**0.5

    noise = draw(seed) if isinstance(seed, int) else torch.stack([draw(one) for one in seed])
    if previous is None:
        return noise
    return torch.cat([previous[..., :width].float(), to_device(noise, previous.device)], -1)


def seeds(key: str, experts: Sequence[int] | None) -> int | list[int]:
    """Of a matrix's randomness, on whatever rank; of a stack, one for each of ``experts``."""
    return zlib.crc32(key.encode()) if experts is None else [zlib.crc32(f"{key}/{e}".encode()) for e in experts]


def orthonormal(columns: Tensor, rounds: int = CHOLESKY_ROUNDS) -> tuple[Tensor, Tensor]:
    """Q (n, k), float32, and R (k, k), float64, with columns (n, k) = Q R and R upper triangular.

    Shifted Cholesky QR (Fukaya et al. 2020) in float64: products and a small factorisation, which cannot fail on finite
    columns and so asks nothing of the device. After three rounds Q is orthonormal whatever the columns were; after one,
    in all directions above float32's rounding.
    """
    scale = torch.linalg.vector_norm(columns, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    q = columns.to(torch.float64, copy=True).div_(torch.where(scale > 0, scale, 1.0))
    q.diagonal(dim1=-2, dim2=-1).add_(NUDGE)
    upper = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) * scale
    for _ in range(rounds):
        gram = q.mT @ q
        gram.diagonal(dim1=-2, dim2=-1).add_(SHIFT * _trace(gram))
        factor, _ = torch.linalg.cholesky_ex(gram)
        q = torch.linalg.solve_triangular(factor, q.mT, upper=False).mT
        upper = factor.mT @ upper
    return q.float(), upper


def _trace(matrix: Tensor) -> Tensor:
    """(..., 1) of (..., n, n)."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)


@dataclass
class Range:
    """An orthonormal basis of a gradient's range, among which the leading directions are still to be chosen.

    r: how many directions are to be chosen. basis: (n, k), float32. squares: (k, k), float64, whose leading eigenvectors
    are the directions inside the basis; None: the basis holds them in order. norm: (), of the gradient; nothing is made
    of one that is not finite.
    """

    r: int
    basis: Tensor
    squares: Tensor | None
    norm: Tensor


def range_of(columns: Tensor, r: int) -> Range:
    """Of columns (n, k), by their left singular vectors. Does not wait for the device."""
    q, upper = orthonormal(columns)
    squares = upper @ upper.mT
    return Range(r, q, squares, _trace(squares).squeeze(-1))


def find_range(
    gradient: Tensor, r: int, method: str, seed: int | Sequence[int] = 0, previous: Tensor | None = None
) -> Range:
    """Of G (m, n), any dtype, on its shorter side.

    method: ``svd``, exact; or ``randomized``, the range finder of Halko, Martinsson, Tropp 2011, algorithm 4.4, without
    a wait for the device: about 2 * rounds * m * n * (r + OVERSAMPLING) multiply-adds, in place of an SVD's
    m * n * min(m, n) times ten or more. seed: of the noise that it starts with, beside the ``previous`` projector
    (min(m, n), r) where there is one, which saves a round. Of a stack, a sequence: one for each matrix. What has no
    gradient at all, as an expert that no token went to, keeps its previous subspace.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm = torch.linalg.vector_norm(gradient, dim=(-2, -1), dtype=wide)
    keep = (norm == 0)[..., None, None]
    if method == "svd":  # which refuses what is not finite
        finite = torch.where(norm.isfinite()[..., None, None], gradient, 0.0)
        exact = exact_projector(finite, r)
        return Range(r, exact if previous is None else torch.where(keep, previous.float(), exact), None, norm)
    matrix = gradient if is_tall(gradient.shape) else gradient.mT
    width = min(r + OVERSAMPLING, *matrix.shape[-2:])
    image = to_device(start_basis(matrix.shape[-1], width, seed, previous), matrix.device)
    start = basis = orthonormal(image, 1)[0]
    for again in range(ROUNDS if previous is None else ROUNDS_FROM_PREVIOUS):
        # orthonormalised between products: powers of G^T G alone would drown all but the first direction
        basis = orthonormal(image, 1)[0] if again else basis
        image = _product(matrix.mT, orthonormal(_product(matrix, basis), 1)[0])
    # G^T times a basis of (nearly) G's range: its singular vectors are about G's
    found = range_of(image, r)
    assert found.squares is not None
    in_order = torch.arange(width, 0, -1, dtype=found.squares.dtype, device=matrix.device).diag()
    basis, squares = torch.where(keep, start, found.basis), torch.where(keep, in_order, found.squares)
    return Range(r, basis, squares, norm)


def choose(ranges: Mapping[Name, Range], near: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
    """By name, (k, r), float64: a basis times it is the projector. Left out where a gradient is not finite.

    Where a name is in ``near``, (n, r), of all bases of that subspace the nearest to it: Q U V^T of Q^T Q_old = U S V^T
    (orthogonal Procrustes). It depends on the subspace alone, not on the signs and the order in which a decomposition
    gives its directions, which rounding decides where these are alike.

    One wait for the device in all; the small decompositions are the CPU's, which a GPU is no quicker at.
    """
    parts = []
    for name, one in ranges.items():
        overlap = one.basis.double().mT @ near[name].double() if name in near else one.norm.new_empty(0)
        parts += [one.norm.double(), one.norm.new_empty(0) if one.squares is None else one.squares, overlap.double()]
    if not parts:
        return {}
    numbers = torch.cat([part.flatten() for part in parts]).cpu().split([part.numel() for part in parts])
    on_cpu = iter([some.view(part.shape) for some, part in zip(numbers, parts, strict=True)])
    turns = {}
    for (name, one), norm, squares, overlap in zip(ranges.items(), on_cpu, on_cpu, on_cpu, strict=True):
        if not norm.isfinite().all():
            continue
        turn = torch.eye(one.basis.shape[-1], one.r, dtype=torch.float64).expand(*norm.shape, -1, -1)
        if squares.numel():
            turn = torch.linalg.eigh(squares).eigenvectors[..., -one.r :].flip(-1)
        if overlap.numel():
            left, _, right = torch.linalg.svd(turn.mT @ overlap)
            turn = turn @ (left @ right)
        turns[name] = turn
    if not turns:
        return {}
    device = next(iter(ranges.values())).basis.device
    moved = to_device(torch.cat([turn.flatten() for turn in turns.values()]), device)
    sizes = [turn.numel() for turn in turns.values()]
    return {name: moved.view(turn.shape) for (name, turn), moved in zip(turns.items(), moved.split(sizes), strict=True)}


def leading(columns: Tensor, r: int, near: Tensor | None = None) -> Tensor:
    """(n, r), orthonormal: the top left singular vectors of columns (n, k), k >= r, the strongest first.

    near: see `choose`. Float64 where the columns are, else float32.
    """
    return _chosen(range_of(columns, r), near, columns.dtype)


def find_projector(
    gradient: Tensor,
    r: int,
    method: str,
    seed: int | Sequence[int] = 0,
    previous: Tensor | None = None,
    near: Tensor | None = None,
) -> Tensor:
    """Q (min(m, n), r) of a finite G: `find_range` and `choose` in one. Float64 where G is, else float32."""
    return _chosen(find_range(gradient, r, method, seed, previous), near, gradient.dtype)


def _chosen(found: Range, near: Tensor | None, dtype: torch.dtype) -> Tensor:
    turn = choose({"": found}, {} if near is None else {"": near})[""]
    wide = torch.promote_types(dtype, torch.float32)
    return found.basis.to(wide) @ turn.to(wide)


def sketch_width(r: int, short: int) -> int:
    """Columns of a sketch: more than twice the rank, for two products make one round, and there is no other."""
    return min(2 * r + OVERSAMPLING, short)


def rotation(old: Tensor, new: Tensor) -> Tensor:
    """(r, r), float32: old coordinates times this are their best approximation in the new subspace."""
    return old.float().mT @ new.float()
