"""A name for a model's content, so that scores made for one model are not used for another."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from ows_ds.weights import Weights

_CHUNK = 1 << 20  # entries at once: their int64 copies stay in a CPU's cache
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 divided by the golden ratio, as a signed integer


def fingerprint(weights: Weights) -> str:
    """The content of ``weights`` in 64 hexadecimal digits. Collective: one all-reduce of 8 bytes per parameter.

    The same for any number of processes, replicated or sharded, and any dtype that holds bfloat16 entries exactly:
    entries are rounded to bfloat16 first (a float32 checkpoint loaded in bfloat16 is the same model). Tied parameters
    count once. A single entry that changes always changes the result. The weights are only read.
    """
    parameters = list(weights.module.named_parameters())
    sums = [_checksum(weights.local(p), weights.interval(p)[0]) for _, p in parameters]
    total = weights.comm.all_reduce(torch.stack([s.to(weights.device) for s in sums]), "fingerprint").tolist()
    content = [(name, list(weights.shape(p)), value) for (name, p), value in zip(parameters, total, strict=True)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _checksum(entries: Tensor, start: int) -> Tensor:
    """Sum of position weight times bits, modulo 2^64; intervals of one parameter add up to the whole's.

    entries: 1-D, any float dtype. start: position of its first entry in the whole parameter. Returns int64, ().
    """
    total = torch.zeros((), dtype=torch.int64, device=entries.device)
    for part in entries.split(_CHUNK):
        bits = part.to(torch.bfloat16).view(torch.int16)
        place = torch.arange(start, start + len(part), dtype=torch.int64, device=part.device).add_(1).mul_(_MIX)
        place.bitwise_xor_(place >> 32).bitwise_or_(1)  # odd: no change of one entry's bits is lost modulo 2^64
        total += place.mul_(bits).sum()
        start += len(part)
    return total
