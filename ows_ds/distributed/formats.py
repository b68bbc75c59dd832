"""Number formats of frozen weights, in 8 and in 4 bits: pure functions of a matrix.

    int8, fp8 (e4m3)   by output channel   W_ij ~ s_i q_ij    s_i = max_j |W_ij| / the format's largest number
    nf4                in blocks of 32 entries in row-major order (Dettmers et al. 2023, "QLoRA"), as bitsandbytes reads
                       it: of a few scales around the block's largest number the one with the least squared error, in
                       bfloat16. As many bits as blocks of 64 with float32 scales, and a smaller error.
                       On r of its input directions U, given from outside, the matrix is exact but for rounding:
                       W ~ Q + (W - Q) U U^T, the correction held as two factors in bfloat16 (as in Zhang et al. 2024,
                       "LQER", with directions of inputs in place of a decomposition of the error)

Codes and scales, behind which the factors lie, are bytes (uint8), whatever they hold: DeepSpeed and all backends of
torch.distributed send those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ows_ds.compat.torch import scaled_product
from ows_ds.distributed.merging import entries_at_once
from ows_ds.distributed.packing import BLOCK, SCALE, Packing
from ows_ds.errors import UserError

NAMES = ("int8", "fp8", "nf4")
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
SCALES = (0.8, 0.87, 0.94, 1.0, 1.06)  # that are tried, in units of a block's largest number
FINE = 1 << 13
ZERO = 7  # the code of 0 in nf4
AT_ONCE = 1 << 18  # entries that a CPU scales at once, in whole rows: of mixed formats it makes copies


def require_bitsandbytes(key: str, value: str) -> None:
    """Raises UserError where it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(key, value, f"install ows_ds[quantised] ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Format(Packing):
    """A packing, and the numbers that are packed.

    dtype: of the weights, and of what `dense` gives. products: of fp8, those of the device (`Scaled`) in place of
    products with what `dense` gives.
    """

    dtype: torch.dtype
    products: bool = False

    def quantise(self, weight: Tensor, directions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """weight (full_shape), any float dtype -> codes (codes_shape) and scales (scales_shape), uint8, on its device.

        directions: U (C_in, r), orthonormal columns, where r = `directions` is not 0; None: no direction is better than
        the others. Each matrix of a stack by itself. Depends on nothing but the entries.
        """
        if self.experts is not None:
            of_each = [self._quantise(one) for one in weight]
            return torch.stack([codes for codes, _ in of_each]), torch.stack([scales for _, scales in of_each])
        codes, scales = self._quantise(weight)
        if self.directions:
            factors = self._factors(weight, codes, scales, directions)
            scales = torch.cat([scales, factors.flatten().view(torch.uint8)])
        return codes, scales

    def _factors(self, weight: Tensor, codes: Tensor, scales: Tensor, directions: Tensor | None) -> Tensor:
        """(C_out + C_in, r), bfloat16: (W - Q) U, and below it U."""
        factors = torch.zeros(sum(self.shape), self.directions, dtype=torch.bfloat16, device=weight.device)
        if directions is None:
            return factors
        missing, basis = factors.split([len(factors) - self.in_features, self.in_features])
        basis.copy_(directions)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total, wide = torch.zeros(missing.shape, dtype=dtype, device=weight.device), basis.to(dtype)
        coarse = self._dense_nf4(codes, scales)
        for rows in self._runs(weight.device):
            error = weight[rows].to(dtype) - coarse[rows]
            if self.inputs_first:
                total += error.t() @ wide[rows]
            else:
                total[rows] = error @ wide
        missing.copy_(total)
        return factors

    def _quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.name == "nf4":
            return self._quantise_nf4(pad(weight.reshape(-1), (0, -weight.numel() % BLOCK)).view(-1, BLOCK))
        scales = weight.abs().amax(0 if self.inputs_first else 1).float() / LARGEST[self.name]
        divisor = self._along(torch.where(scales > 0, scales, 1.0)).to(torch.promote_types(weight.dtype, torch.float32))
        stored, codes = STORED[self.name], torch.empty(self.shape, dtype=torch.uint8, device=weight.device)
        for rows in self._runs(weight.device):
            some = weight[rows] / (divisor if self.inputs_first else divisor[rows])
            some = some.round_() if self.name == "int8" else some.clamp_(-LARGEST["fp8"], LARGEST["fp8"])
            codes[rows] = some.to(stored).view(torch.uint8)
        return codes, scales.view(torch.uint8)

    def _quantise_nf4(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """blocks: (blocks, BLOCK)."""
        from bitsandbytes.functional import get_4bit_type

        device = blocks.device
        values = get_4bit_type("nf4", device=device).to(device, torch.float32)
        # the nearest value's code, of numbers from -1 to 1 in steps finer than what a code decides
        steps = torch.linspace(-1, 1, FINE, device=device)
        nearest_of = torch.bucketize(steps, (values[1:] + values[:-1]) / 2, out_int32=True)
        codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(len(blocks), dtype=torch.bfloat16, device=device)
        for some in torch.arange(len(blocks)).split(max(1, entries_at_once(device, AT_ONCE) // BLOCK)):
            run = slice(int(some[0]), int(some[-1]) + 1)
            x = blocks[run].float()
            largest, least = x.abs().amax(1), torch.full((len(x),), torch.inf, device=device)
            chosen, scale = torch.empty(x.shape, dtype=torch.int32, device=device), torch.empty_like(largest)
            for factor in SCALES:
                tried = (largest * factor).bfloat16().float()
                unit = x / torch.where(tried > 0, tried, 1.0)[:, None]
                nearest = nearest_of[unit.add_(1).mul_((FINE - 1) / 2).round_().clamp_(0, FINE - 1).int()]
                error = _sum((values[nearest].mul_(tried[:, None]) - x).square_())
                better = error < least
                least = torch.where(better, error, least)
                scale = torch.where(better, tried, scale)
                chosen = torch.where(better[:, None], nearest, chosen)
            chosen[largest == 0] = ZERO
            scale[largest == 0] = 0.0
            codes[run] = ((chosen[:, ::2] << 4) | chosen[:, 1::2]).to(torch.uint8)
            scales[run] = scale.bfloat16()
        return codes.view(-1), scales.view(torch.uint8)

    def _along(self, scales: Tensor) -> Tensor:
        """Scales, one an output channel, as they multiply a matrix."""
        return scales if self.inputs_first else scales[:, None]

    def _runs(self, device: torch.device) -> list[slice]:
        """Rows to work on at once."""
        rows, columns = self.shape
        size = max(1, entries_at_once(device, AT_ONCE) // columns)
        return [slice(row, row + size) for row in range(0, rows, size)]

    def dense(self, codes: Tensor, scales: Tensor, expert: int | None = None) -> Tensor:
        """The weights that codes and scales stand for, in `dtype`, rounded once, and again with nf4's correction; of a
        stack one expert's matrix, or all of them."""
        if self.experts is not None and expert is None:
            return torch.stack([self.dense(codes, scales, one) for one in range(self.experts)])
        if expert is not None:
            codes, scales = codes[expert], scales[expert]
        if self.name == "nf4":
            coarse = self._dense_nf4(codes, scales)
            return self._corrected(coarse, scales) if self.directions else coarse
        numbers = scales.view(torch.float32)
        out, along = torch.empty(self.shape, dtype=self.dtype, device=codes.device), self._along(numbers)
        stored = codes.view(STORED[self.name])
        for rows in self._runs(codes.device):
            out[rows].copy_(stored[rows]).mul_(along if self.inputs_first else along[rows])
        return out

    def _corrected(self, coarse: Tensor, scales: Tensor) -> Tensor:
        """``coarse``, in place, with the product of the factors that lie behind the ``scales``."""
        factors = scales[self._blocks * SCALE["nf4"] :].view(torch.bfloat16).view(-1, self.directions).to(coarse.dtype)
        missing, basis = factors.split([len(factors) - self.in_features, self.in_features])
        return coarse.addmm_(basis, missing.t()) if self.inputs_first else coarse.addmm_(missing, basis.t())

    def _dense_nf4(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Without a correction. scales: perhaps with its factors behind them."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        absmax = scales[: self._blocks * SCALE["nf4"]].view(torch.bfloat16).float()
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        shape = torch.Size([self._blocks * BLOCK])
        state = QuantState(absmax, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        flat: Tensor = dequantize_4bit(codes.view(-1, 1), state).reshape(-1)
        return flat[: math.prod(self.shape)].view(self.shape).to(self.dtype)

    def factor(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, expert: int | None = None) -> Tensor | Scaled:
        """What tokens of ``dtype`` are multiplied with, as it is stored: `dense`, or `Scaled`."""
        if not self.products or any(side % 16 for side in self.shape):  # which the products need
            return self.dense(codes, scales, expert).to(dtype)
        codes, scales = (codes, scales) if expert is None else (codes[expert], scales[expert])
        stored, numbers = codes.view(STORED["fp8"]), scales.view(torch.float32)
        return Scaled(stored, numbers, self.inputs_first)


def _sum(rows: Tensor) -> Tensor:
    """(n, BLOCK) -> (n,), in an order that does not depend on n, as torch's own may: equal entries get equal codes."""
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]


@dataclass(frozen=True, eq=False)
class Scaled:
    """A matrix (a, b) in fp8 that tokens are multiplied with in fp8, in products of the device: each token is rounded
    to e4m3 times a scale of its own.

    scales: float32, (b,) where ``by_column``, else (a,).
    """

    codes: Tensor
    scales: Tensor
    by_column: bool

    @property
    def mT(self) -> Scaled:
        """As a tensor's."""
        return Scaled(self.codes.t(), self.scales, not self.by_column)

    @property
    def shape(self) -> torch.Size:
        """As a tensor's."""
        return self.codes.shape

    def product(self, x: Tensor) -> Tensor:
        """x (n, a) -> (n, b), of x's dtype."""
        if not len(x):
            return x.new_zeros(0, self.shape[1])
        columns = self.scales
        if not self.by_column:  # scales of what is summed over go into the tokens
            x, columns = x * self.scales.to(x.dtype), torch.ones_like(self.scales[:1]).expand(self.shape[1])
        rows = (x.abs().amax(1, keepdim=True).float() / LARGEST["fp8"]).clamp_(min=1e-30)
        tokens = (x / rows.to(x.dtype)).clamp_(-LARGEST["fp8"], LARGEST["fp8"]).to(STORED["fp8"])
        codes = self.codes if self.codes.stride(0) == 1 else self.codes.t().contiguous().t()
        return scaled_product(tokens, codes, rows, columns.contiguous()[None]).to(x.dtype)


def has_fp8_products(device: torch.device) -> bool:
    """Whether the device multiplies fp8 with fp8 (from Ada and Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
