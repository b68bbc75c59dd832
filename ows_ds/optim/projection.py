"""A full gradient -> the projector of its dominant subspace, and the gradient inside it (GaLore, section 4.1).

Letters: G (m, n) gradient of a weight as stored; r rank; Q (min(m, n), r) projector with orthonormal columns, the top
singular vectors of G's shorter side; C, R (max(m, n), r) coordinates and low-rank gradient. In the paper's notation
P = Q^T for m >= n (R = G P^T) and P = Q for m < n (R^T = P^T G): keeping r last in all of them makes the
two sides one case, W + C Q^T, the second transposed.

Projectors are found in float32; by the range finder in float64 where the gradient is. Everything takes stacks, too:
(..., m, n) for (m, n), each matrix for itself, all in one batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ows_ds.compat.torch import to_device
from ows_ds.optim.sizes import IN_FLOAT32, OVERSAMPLING, ROUNDS

Name = TypeVar("Name", bound=Hashable)

ROUNDS_FROM_PREVIOUS = 2
CHOLESKY_ROUNDS = 3  # after which columns are orthonormal, however dependent they were
SHIFT = 1e-14  # of a Gram matrix's diagonal, as a share of its trace: its factor exists in float64
LEAST = {torch.float32: 1e-5, torch.float64: 1e-7}  # singular value, as a share of the largest, that is no rounding
NUDGE = 1e-9  # as a share of all columns' norm, far below float32's rounding: directions where columns have none


def is_tall(shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether the coordinates stand on the left: W = W_0 + C Q^T (m >= n), else W = W_0 + Q C^T."""
    return shape[-2] >= shape[-1]


def low_rank_gradient(gradient: Tensor, projector: Tensor) -> Tensor:
    """R (max(m, n), r) in the projector's dtype from G (m, n), any dtype, and Q (min(m, n), r)."""
    return product(gradient if is_tall(gradient.shape) else gradient.mT, projector)


def product(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix @ factor in the factor's dtype, without a whole copy of the matrix where its dtype is another."""
    if matrix.dtype == factor.dtype:
        return matrix @ factor
    if matrix.dim() > 2:
        at_once = max(1, IN_FLOAT32 // (matrix.shape[-2] * matrix.shape[-1]))
        pairs = zip(matrix.split(at_once), factor.split(at_once), strict=True)
        return torch.cat([some.to(factor.dtype) @ one for some, one in pairs])
    rows = max(1, IN_FLOAT32 // matrix.shape[1])
    return torch.cat([some.to(factor.dtype) @ factor for some in matrix.split(rows)])


def exact_directions(gradient: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Q (min(m, n), r) and r singular values, float32, from an exact singular value decomposition of G (m, n) in
    float32, as GaLore's authors compute it.

    On a GPU by QR iterations: what torch takes there by itself needs many seconds for a matrix of 4096 columns.
    """
    driver = "gesvd" if gradient.is_cuda else None
    left, values, right = torch.linalg.svd(gradient.float(), full_matrices=False, driver=driver)
    return (right[..., :r, :].mT if is_tall(gradient.shape) else left[..., :r]).contiguous(), values[..., :r]


def exact_projector(gradient: Tensor, r: int) -> Tensor:
    """Q (min(m, n), r) alone."""
    return exact_directions(gradient, r)[0]


def start_basis(short: int, width: int, seed: int | Sequence[int], previous: Tensor | None = None) -> Tensor:
    """(short, width): where a search begins, the ``previous`` projector (short, r) or nothing, then noise.

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
    return torch.cat([previous[..., :width].to(wide(previous)), to_device(noise, previous.device)], -1)


def seeds(key: str, experts: Sequence[int] | None) -> int | list[int]:
    """Of a matrix's randomness, on whatever rank; of a stack, one for each of ``experts``."""
    return zlib.crc32(key.encode()) if experts is None else [zlib.crc32(f"{key}/{e}".encode()) for e in experts]


def orthonormal(columns: Tensor, rounds: int = CHOLESKY_ROUNDS) -> tuple[Tensor, Tensor]:
    """Q (n, k) and R (k, k), float64, with columns (n, k) = Q R and R upper triangular.

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
    return q.to(wide(columns)), upper


def _trace(matrix: Tensor) -> Tensor:
    """(..., 1) of (..., n, n)."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)


@dataclass
class Range:
    """An orthonormal basis of a gradient's range, among which the leading directions are still to be chosen.

    r: how many directions are to be chosen. basis: (n, k). squares: float64, (k, k), whose leading eigenvectors are the
    directions inside the basis, or (k,), where the basis holds them in order: its eigenvalues, squared singular values
    of the gradient. norm: (), of the gradient; nothing is made of one that is not finite.
    """

    r: int
    basis: Tensor
    squares: Tensor
    norm: Tensor


@dataclass
class Choice:
    """Q = basis @ turn + other @ more, where the gradient has nothing in the directions that come from ``other``.

    turn: (k, r). other: (n, r), orthonormal, and more: (r, r); None: not needed. On the device, float64.
    """

    turn: Tensor
    other: Tensor | None = None
    more: Tensor | None = None

    def projector(self, found: Range, dtype: torch.dtype) -> Tensor:
        """Q (n, r)."""
        q = found.basis.to(dtype) @ self.turn.to(dtype)
        return q if self.other is None or self.more is None else q + self.other.to(dtype) @ self.more.to(dtype)


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
    (min(m, n), r) where there is one, which saves a round. Of a stack, a sequence: one for each matrix.
    """
    norm = torch.linalg.vector_norm(gradient, dim=(-2, -1), dtype=wide(gradient))
    if method == "svd":  # which refuses what is not finite
        basis, values = exact_directions(torch.where(norm.isfinite()[..., None, None], gradient, 0.0), r)
        return Range(r, basis, values.double().square(), norm)
    matrix = gradient if is_tall(gradient.shape) else gradient.mT
    width = min(r + OVERSAMPLING, *matrix.shape[-2:])
    image = to_device(start_basis(matrix.shape[-1], width, seed, previous), matrix.device).to(wide(gradient))
    image = iterated(lambda x: product(matrix, x), lambda y: product(matrix.mT, y), image, previous is not None)
    # G^T times a basis of (nearly) G's range: its singular vectors are about G's
    found = range_of(image, r)
    return Range(r, found.basis, found.squares, norm)


def iterated(
    times: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor], image: Tensor, warm: bool
) -> Tensor:
    """The range finder's rounds: (n, k) <- products with a matrix (m, n) and its transpose, which are all that is known
    of it. warm: ``image`` is near the range already."""
    for _ in range(ROUNDS_FROM_PREVIOUS if warm else ROUNDS):
        # orthonormalised between products: powers of G^T G alone would drown all but the first direction
        image = transposed(orthonormal(times(orthonormal(image, 1)[0]), 1)[0])
    return image


def choose(
    ranges: Mapping[Name, Range], near: Mapping[Name, Tensor], start: Callable[[Name], Tensor]
) -> dict[Name, Choice]:
    """By name, how the projector comes out of the range. Left out where a gradient is not finite.

    Where a name is in ``near``, (n, r), of all bases of that subspace the nearest to it: Q U V^T of Q^T Q_old = U S V^T
    (orthogonal Procrustes). It depends on the subspace alone, not on the signs and the order in which a decomposition
    gives its directions, which rounding decides where these are alike.

    A gradient may have fewer than r directions: an expert's has no more than it had tokens. Rounding would decide the
    others. In their place come those inside the subspace of ``start(name)``, (n, r), the previous projector or noise,
    that are orthogonal to what there is; so what has no gradient at all keeps its subspace.

    One wait for the device in all, one more where directions are missing; the small decompositions are the CPU's, which
    a GPU is no quicker at.
    """
    turns: dict[Name, Tensor] = {}
    overlaps: dict[Name, Tensor] = {}
    there: dict[Name, Tensor] = {}  # which directions are
    for name, norm, squares, overlap in _on_cpu(
        [(name, one.norm, one.squares, _overlap(one.basis, near.get(name))) for name, one in ranges.items()]
    ):
        if not norm.isfinite().all():
            continue
        r, dims = ranges[name].r, norm.dim()
        values, turn = squares, torch.eye(squares.shape[-1], dtype=torch.float64).expand(*norm.shape, -1, -1)
        if squares.dim() == dims + 2:
            values, turn = (some.flip(-1) for some in torch.linalg.eigh(squares))
        turns[name], overlaps[name] = turn[..., :r], overlap
        there[name] = values[..., :r] > values[..., :1] * LEAST[ranges[name].basis.dtype] ** 2

    others = {name: orthonormal(start(name))[0] for name in turns if not there[name].all()}
    mores: dict[Name, Tensor] = {}
    for name, inside, outside in _on_cpu(
        [(name, _overlap(ranges[name].basis, one), _overlap(one, near.get(name))) for name, one in others.items()]
    ):
        turns[name], mores[name] = _completed(turns[name], there[name], inside)
        if name in near:
            overlap = turns[name].mT @ overlaps[name] + mores[name].mT @ outside
            nearest = _nearest(overlap)
            turns[name], mores[name] = turns[name] @ nearest, mores[name] @ nearest
    for name in turns.keys() & near.keys() - others.keys():
        turns[name] = turns[name] @ _nearest(turns[name].mT @ overlaps[name])

    small = [*turns.values(), *mores.values()]
    if not small:
        return {}
    device = next(iter(ranges.values())).basis.device
    moved = to_device(torch.cat([one.flatten() for one in small]), device).split([one.numel() for one in small])
    back = iter([flat.view(one.shape) for flat, one in zip(moved, small, strict=True)])
    chosen = {name: Choice(turn) for name, turn in zip(turns, back, strict=False)}
    for name, more in zip(mores, back, strict=True):
        chosen[name] = replace(chosen[name], other=others[name], more=more)
    return chosen


def _on_cpu(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows of a name and tensors: the same in float64, brought to the CPU in one transfer."""
    tensors = [tensor.double() for _, *some in rows for tensor in some]
    if not tensors:
        return []
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
    views = iter([one.view(tensor.shape) for one, tensor in zip(flat, tensors, strict=True)])
    return [(name, *(next(views) for _ in some)) for name, *some in rows]


def _overlap(basis: Tensor, other: Tensor | None) -> Tensor:
    """basis^T other, of no entries without another."""
    return basis.new_empty(0) if other is None else basis.double().mT @ other.double()


def _nearest(overlap: Tensor) -> Tensor:
    """The orthogonal matrix (r, r) nearest to ``overlap``."""
    left, _, right = torch.linalg.svd(overlap)
    return left @ right


def _completed(turn: Tensor, there: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """turn (k, r) and more (r, r) of a `Choice`: columns of ``turn`` that are not ``there``, (r,), are replaced by
    directions of an other basis orthogonal to those that are. inside: (k, r), the range's basis^T the other."""
    shape = turn.shape
    turn, more = turn.reshape(-1, *shape[-2:]).clone(), turn.new_zeros(math.prod(shape[:-2]), shape[-1], shape[-1])
    for one, new, mask, overlap in zip(
        turn, more, there.reshape(-1, shape[-1]), inside.reshape(-1, *shape[-2:]), strict=True
    ):
        count = int(mask.sum())  # they are in order
        one[:, count:] = 0.0
        new[:, count:] = torch.linalg.svd(one[:, :count].T @ overlap)[2][count:].T
    return turn.view(shape), more.view(*shape[:-2], shape[-1], shape[-1])


def leading(columns: Tensor, r: int, start: Tensor | None = None, align: bool = False) -> Tensor:
    """(n, r), orthonormal: the top left singular vectors of columns (n, k), k >= r, the strongest first.

    start: see `choose`, None: noise; align: near to it. Float64 where the columns are, else float32.
    """
    start = start_basis(columns.shape[-2], r, 0) if start is None else start
    return _chosen(range_of(columns, r), start, align, wide(columns))


def find_projector(
    gradient: Tensor,
    r: int,
    method: str,
    seed: int | Sequence[int] = 0,
    previous: Tensor | None = None,
    start: Tensor | None = None,
    align: bool = False,
) -> Tensor:
    """Q (min(m, n), r) of a finite G: `find_range` and `choose` in one. Float64 where G is, else float32.

    start: see `choose`, None: ``previous``, or noise; align: near to it.
    """
    if start is None:
        start = start_basis(min(gradient.shape[-2:]), r, seed) if previous is None else previous
    return _chosen(find_range(gradient, r, method, seed, previous), start, align, wide(gradient))


def _chosen(found: Range, start: Tensor, align: bool, dtype: torch.dtype) -> Tensor:
    return choose({"": found}, {"": start} if align else {}, lambda _: start)[""].projector(found, dtype)


def rotation(old: Tensor, new: Tensor) -> Tensor:
    """(r, r): old coordinates times this are their best approximation in the new subspace."""
    return old.to(wide(old)).mT @ new.to(wide(new))


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, float64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)
