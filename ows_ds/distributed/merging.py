"""Low-rank updates added to runs of a weight's entries, with the same bits for every way to cut it; noise by key."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

CHUNK = 1 << 24  # entries of a weight handled at once where a float32 or float64 copy is needed
MERGE_ENTRIES = 1 << 20  # entries of a matrix that a CPU merges at once, in whole rows
SAME_ON_ALL_GPUS = 1 << 17  # random numbers drawn at once: of more, torch takes as many threads as a GPU can run


def entries_at_once(device: torch.device, on_cpu: int) -> int:
    """Entries of a weight to work on at once: ``on_cpu``, which fit its cache, or as many as keep a GPU busy."""
    return CHUNK if device.type == "cuda" else on_cpu


def stream(key: str, device: torch.device) -> torch.Generator:
    """A random stream that depends on ``key`` and the kind of device alone, if at most `SAME_ON_ALL_GPUS` numbers are
    drawn at once."""
    word = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(word, "little"))


def add_low_rank(
    flat: Tensor, start: int, left: Tensor, right: Tensor, decay: float = 1.0, noise: str | None = None
) -> None:
    """flat <- decay * flat + (left @ right.mT).flatten()[start : start + flat.numel()], in place.

    flat: a run of entries of a (rows, columns) matrix, or of a stack of them, any float dtype; the sum is formed in the
    factors' dtype (float32 or float64) and rounded once: to the nearest or, where ``noise`` is given and flat is
    bfloat16, stochastically, by noise that depends on that key and the entry's position alone.

    Blocks of rows are the same for every run, so that all shardings give the same bits.
    """
    columns, stop = right.shape[-2], start + flat.numel()
    if left.dim() == 3:
        size = left.shape[1] * columns
        for expert in range(start // size, math.ceil(stop / size)):
            first, last = max(start, expert * size), min(stop, (expert + 1) * size)
            key = None if noise is None else f"{noise}/{expert}"
            run = flat[first - start : last - start]
            add_low_rank(run, first - expert * size, left[expert], right[expert], decay, key)
        return
    rows_at_once = max(1, entries_at_once(flat.device, MERGE_ENTRIES) // columns)
    for row in range(start // columns // rows_at_once * rows_at_once, math.ceil(stop / columns), rows_at_once):
        update = (left[row : row + rows_at_once] @ right.T).flatten()
        first = row * columns
        a, b = max(start, first), min(stop, first + update.numel())
        part, own = flat[a - start : b - start], slice(a - first, b - first)
        total = part.to(update.dtype).mul_(decay).add_(update[own])
        if noise is not None and part.dtype == torch.bfloat16:
            total = round_stochastically(total, draw_bits(update.numel(), f"{noise}/{row}", flat.device)[own])
        part.copy_(total)


def draw_bits(count: int, key: str, device: torch.device) -> Tensor:
    """(count,), int32, uniform in [0, 2^16): the noise of `round_stochastically`."""
    bits, generator = torch.empty(count, dtype=torch.int32, device=device), stream(key, device)
    for run in bits.split(SAME_ON_ALL_GPUS):
        run.random_(1 << 16, generator=generator)
    return bits


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> float32 that bfloat16 holds exactly: a neighbour of x, the nearer the likelier, x itself on average.

    bits: int32, uniform in [0, 2^16), x's shape. bfloat16 is the upper half of float32, so that a carry out of the
    lower half has the probability of rounding away from zero.
    """
    rounded = ((x.view(torch.int32) + bits) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)  # a carry could turn a NaN into a number
