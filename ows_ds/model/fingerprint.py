"""A name for a model's content, so that scores made for one model are not used for another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ows_ds.compat.torch import to_device
from ows_ds.distributed.merging import entries_at_once
from ows_ds.distributed.weights import Weights

_BLOCK = 1 << 17  # entries at once: their int64 copies stay in a CPU's cache


def fingerprint(weights: Weights, named: Mapping[str, nn.Parameter] | None = None) -> str:
    """The content of ``weights`` in 64 hexadecimal digits. Collective: one all-reduce of 8 bytes per parameter.

    The same at any world size, replicated or sharded, and for any dtype that holds bfloat16 entries exactly:
    entries are rounded to bfloat16 first (a float32 checkpoint loaded in bfloat16 is the same model). Tied parameters
    count once. A single entry that changes always changes the result. The weights are only read.

    named: some of the model's parameters, under the names that count; None: all of them.
    """
    parameters = list((weights.parameters() if named is None else named).items())
    places, sums = _mix(torch.arange(_BLOCK, device=weights.device)), []
    for _, parameter in parameters:
        local = to_device(weights.local(parameter), weights.device)  # from the CPU where DeepSpeed or files have it
        sums.append(_checksum(local, weights.interval(parameter)[0], places))
    total = weights.comm.all_reduce(torch.stack(sums), "fingerprint").tolist()
    content = [(name, list(weights.shape(p)), value) for (name, p), value in zip(parameters, total, strict=True)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def replica(weights: Weights) -> str:
    """The content of this rank's own copy of replicated ``weights``, to be compared with the others'."""
    places = _mix(torch.arange(_BLOCK, device=weights.device))
    sums = [_checksum(weights.resident_slice(p)[1], 0, places) for p in weights.module.parameters()]
    return hashlib.sha256(json.dumps(torch.stack(sums).tolist()).encode()).hexdigest()


def _checksum(entries: Tensor, start: int, places: Tensor) -> Tensor:
    """Sum of position weight times bits, modulo 2^64; the sums of a parameter's intervals add up to its own.

    entries: 1-D, any float dtype. start: position of its first entry in the full parameter. places: weights of the
    positions in a block, int64. A position's weight is its block's times its place's. Returns int64, ().
    """
    total = torch.zeros((), dtype=torch.int64, device=entries.device)
    at = 0
    while at < len(entries):
        block, place = divmod(start + at, _BLOCK)
        whole = (len(entries) - at) // _BLOCK if place == 0 else 0  # blocks
        if whole:
            whole = min(whole, entries_at_once(entries.device, _BLOCK) // _BLOCK)
            part = entries[at : at + whole * _BLOCK]
            numbers = torch.arange(block, block + whole, device=entries.device)
            total += ((part.to(torch.bfloat16).view(torch.int16).view(whole, -1) * places).sum(1) * _mix(numbers)).sum()
        else:
            part = entries[at : at + _BLOCK - place]
            bits = part.to(torch.bfloat16).view(torch.int16)
            total += (places[place : place + len(part)] * bits).sum() * int(_mix(torch.tensor(block)))
        at += len(part)
    return total


def _mix(numbers: Tensor) -> Tensor:
    """Odd int64 weights that look random: odd, so that no change of an entry is lost modulo 2^64."""
    mixed = (numbers + 1) * -0x61C8864680B583EB  # 2^64 divided by the golden ratio
    return (mixed ^ (mixed >> 32)) | 1
