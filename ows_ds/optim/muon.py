"""Muon inside subspaces: orthonormalised momentum of coordinates (``optim.rule: muon``).

    M <- b M + (1 - b) R;   U = (1 - b) R + b M                 momentum after Nesterov, in each rank's own rows
    A = U^T U, (r, r), all-reduced in one message                T = the iteration's polynomial in A
    C <- (1 - lr * decay) * C - lr * scale * adjustment * U T

Newton-Schulz multiplies U from the right with polynomials in A alone. So ranks need not see each other's rows: they sum
A once, which has r / long of the entries of U, iterate on it in float64, and multiply their own rows with the result.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon/), with its coefficients and five iterations, which leave singular values of
0.68 to 1.2; a sixth has coefficients under which they converge to 1. The adjustment ``match_rms_adamw`` is that of Liu
et al. 2025, "Muon is Scalable for LLM Training". But for the sixth iteration this is `torch.optim.Muon` on a plain
matrix, which iterates in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ows_ds.distributed.communicator import Communicator
from ows_ds.model.blocks import Matrix
from ows_ds.optim.layout import Scale, scale_of
from ows_ds.optim.sizes import MUON_ITERATIONS

if TYPE_CHECKING:
    from ows_ds.optim.update import BlockBuffer

FAST, EXACT = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (*[FAST] * (MUON_ITERATIONS - 1), EXACT)  # of x <- a x + b x^3 + c x^5, by iteration
EPS = 1e-7  # least Frobenius norm that is divided by


@dataclass(frozen=True)
class Rule:
    """How coordinates take their steps: the recipe's keys of section optim by the same names, ``name`` is its rule."""

    name: Literal["adamw", "muon"] = "adamw"
    scale: Scale = 1.0
    momentum: float = 0.95
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"


def adjustment(rows: int, columns: int, adjust_lr: str) -> float:
    """The factor on the learning rate of a matrix (rows, columns), as in `torch.optim.Muon`."""
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


def whitening(grams: Tensor) -> Tensor:
    """T (n, r, r), float64: what U is multiplied with, of U^T U (n, r, r), float64.

    The singular values of U T are 0.95 to 1.06, where those of U are not below about 2e-3 of its norm.
    """
    norm = grams.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp(min=EPS)[..., None, None]
    gram, found = grams / norm.square(), torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device) / norm
    for a, b, c in COEFFICIENTS:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        found = found @ factor
        gram = factor @ gram @ factor
    return found


def grams_of(rows: Tensor, first: int, long: int, count: int) -> Tensor:
    """(count, r, r), float64: of the matrices (count, long, r) whose rows from ``first`` on are ``rows`` (n, r), these
    rows' part of U^T U."""
    r = rows.shape[-1]
    found = torch.zeros(count, r, r, dtype=torch.float64, device=rows.device)
    if count == 1:
        wide = rows.double()
        return torch.mm(wide.mT, wide, out=found[0])[None]
    experts = slice(first // long, math.ceil((first + len(rows)) / long))
    wide = torch.zeros((experts.stop - experts.start) * long, r, dtype=torch.float64, device=rows.device)
    wide[first - experts.start * long :][: len(rows)] = rows
    wide = wide.view(-1, long, r)
    found[experts] = wide.mT @ wide
    return found


def times_whitening(rows: Tensor, first: int, long: int, factors: Tensor) -> Tensor:
    """(n, r): each of the ``rows`` (n, r), from row ``first`` on of (count, long, r), times its matrix's factor, of
    (count, r, r)."""
    if len(factors) == 1:
        return rows @ factors[0].to(rows.dtype)
    r, begin, end = rows.shape[-1], first // long, math.ceil((first + len(rows)) / long)
    wide = rows.new_zeros((end - begin) * long, r)
    own = wide[first - begin * long :][: len(rows)]
    own.copy_(rows)
    return (wide.view(-1, long, r) @ factors[begin:end].to(rows.dtype)).view(-1, r)[first - begin * long :][: len(rows)]


@dataclass
class _Own:
    """What a rank has of a matrix. first: of its rows, in row-major order of (count, long). update: U, (n, r); None
    where it has no row."""

    block: BlockBuffer
    matrix: Matrix
    first: int = 0
    update: Tensor | None = None


def _momentum(block: BlockBuffer, matrix: Matrix, rank: int, decay: float) -> _Own:
    """Take in the reduced gradient, which becomes U in place."""
    layout, rows = block.layout, block.local_rows(matrix.name)
    if rows is None:
        return _Own(block, matrix)
    gradient, momentum = block.reduced_grads[rows], block.exp_avg[rows]
    momentum.lerp_(gradient, 1 - decay)
    r = matrix.low_rank(layout.r)  # divides a row
    first = (layout.part(rank)[0] + rows.start - layout.slots[matrix.name][0]) * layout.r // r
    update = gradient.lerp_(momentum, decay).view(-1, r)[: matrix.count * matrix.long - first]
    return _Own(block, matrix, first, update)


def step(blocks: Mapping[str, BlockBuffer], comm: Communicator, lr: float, weight_decay: float, rule: Rule) -> None:
    """One step on this rank's rows of all matrices; the reduced gradients are spent. Collective."""
    parts = [
        _momentum(block, matrix, comm.rank, rule.momentum)
        for block in blocks.values()
        for matrix in block.layout.block.matrices
    ]
    if not parts:
        return
    grams = []
    for one in parts:
        r, count = one.matrix.low_rank(one.block.layout.r), one.matrix.count
        if one.update is None:
            grams.append(torch.zeros(count, r, r, dtype=torch.float64, device=one.block.master.device))
        else:
            grams.append(grams_of(one.update, one.first, one.matrix.long, count))
    flat = comm.all_reduce(torch.cat([gram.flatten() for gram in grams]), "grams")
    grams = [some.view(gram.shape) for some, gram in zip(flat.split([g.numel() for g in grams]), grams, strict=True)]
    ranks = {gram.shape[-1] for gram in grams}
    factors = {r: whitening(torch.cat([gram for gram in grams if gram.shape[-1] == r])) for r in ranks}
    for one, gram in zip(parts, grams, strict=True):
        count, r = gram.shape[:2]
        mine, factors[r] = factors[r][:count], factors[r][count:]
        rows = one.block.local_rows(one.matrix.name)
        if one.update is None or rows is None:
            continue
        update = times_whitening(one.update, one.first, one.matrix.long, mine)
        factor = scale_of(one.matrix, one.block.layout.r, rule.scale) * adjustment(one.matrix.long, r, rule.adjust_lr)
        master = one.block.master[rows].view(-1, r)[: len(update)]
        master.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * factor)
