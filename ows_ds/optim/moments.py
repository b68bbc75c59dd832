"""Adam's moments in 8 bits: blocks of 256 entries with a scale each, by bitsandbytes (Dettmers et al. 2022, "8-bit
Optimizers via Block-wise Quantization")."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ows_ds.optim.sizes import MOMENT_BLOCK


@functools.cache
def moment_map(signed: bool, device: torch.device) -> Tensor:
    """What the 256 codes stand for, in units of a block's scale."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed).to(device)


class Moment8:
    """A moment of n entries, float32 to whoever reads it.

    codes: (n,), uint8. scales: (blocks,), float32. signed: the first moment is, the second is not.
    """

    def __init__(self, codes: Tensor, scales: Tensor, signed: bool) -> None:
        self.codes, self.scales, self.signed = codes, scales, signed

    @classmethod
    def zeros(cls, n: int, signed: bool, device: torch.device) -> Moment8:
        """Of a weight that begins to train."""
        made = cls(
            torch.empty(n, dtype=torch.uint8, device=device),
            torch.empty(math.ceil(n / MOMENT_BLOCK), device=device),
            signed,
        )
        made.write(slice(0, n), torch.zeros(n, device=device))
        return made

    def to(self, device: torch.device | str) -> Moment8:
        """The same there."""
        return Moment8(self.codes.to(device), self.scales.to(device), self.signed)

    def read(self, entries: slice) -> Tensor:
        """float32. entries: they begin with a block."""
        from bitsandbytes.functional import dequantize_blockwise

        codes = self.codes[entries]
        if not len(codes):
            return codes.float()
        code, scales = moment_map(self.signed, codes.device), self.scales[self._blocks(entries)]
        found: Tensor = dequantize_blockwise(codes, absmax=scales, code=code, blocksize=MOMENT_BLOCK)
        return found

    def write(self, entries: slice, values: Tensor) -> None:
        """Set ``entries``, which begin with a block, to float ``values``."""
        from bitsandbytes.functional import quantize_blockwise

        if len(values):
            code = moment_map(self.signed, values.device)
            codes, state = quantize_blockwise(values.float(), code=code, blocksize=MOMENT_BLOCK)
            self.codes[entries] = codes
            self.scales[self._blocks(entries)] = state.absmax

    def _blocks(self, entries: slice) -> slice:
        return slice(entries.start // MOMENT_BLOCK, math.ceil(min(entries.stop, len(self.codes)) / MOMENT_BLOCK))
