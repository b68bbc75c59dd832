"""Number formats of frozen weights, matrix by matrix."""

from __future__ import annotations

import pytest
import torch

from ows_ds.distributed.formats import LARGEST, NAMES, STORED, Format, Scaled
from ows_ds.distributed.packing import BLOCK, MOST_DIRECTIONS

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
ERRORS = {"int8": 0.012, "fp8": 0.04, "nf4": 0.09}  # relative, of normal numbers


def weight(format: Format) -> torch.Tensor:
    return torch.randn(format.full_shape, generator=torch.Generator().manual_seed(0)).to(format.dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stack", [(None, False), (None, True), (3, False), (3, True)])
def test_what_comes_back(name: str, dtype: torch.dtype, stack: tuple[int | None, bool]) -> None:
    """Near to what went in, of its dtype; the same codes again; each expert by itself."""
    experts, inputs_first = stack
    format = Format(name, (40, 27), inputs_first, experts, dtype=dtype)
    full = weight(format)
    codes, scales = format.quantise(full)
    assert codes.shape == format.codes_shape
    assert scales.shape == format.scales_shape
    assert codes.dtype == scales.dtype == torch.uint8
    assert codes.nbytes + scales.nbytes == format.nbytes
    found = format.dense(codes, scales)
    assert found.dtype == dtype
    assert (found - full).double().norm() < ERRORS[name] * full.double().norm()
    again = format.quantise(found)
    assert torch.equal(again[0], codes)
    for expert in range(experts or 0):
        alone = Format(name, (40, 27), inputs_first, dtype=dtype)
        assert torch.equal(format.dense(codes, scales, expert), alone.dense(*alone.quantise(full[expert])))


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_exact_on_given_directions(dtype: torch.dtype, inputs_first: bool) -> None:
    """But for bfloat16's rounding of the factors; on others it is as far off as without; the codes are the same."""
    format = Format("nf4", (200, 256), inputs_first, dtype=dtype)
    full, r = weight(format), format.directions
    assert r == 2
    u = torch.linalg.qr(torch.randn(format.in_features, r, generator=torch.Generator().manual_seed(1)))[0]
    codes, scales = format.quantise(full, u)
    assert scales.shape == format.scales_shape
    plain = format.quantise(full)
    assert torch.equal(codes, plain[0])

    def error(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        found = (format.dense(codes, scales) - full).float()
        return found.t() if inputs_first else found

    rest = torch.eye(format.in_features) - u @ u.t()
    assert (error(codes, scales) @ u).norm() < 0.04 * (error(*plain) @ u).norm()
    torch.testing.assert_close((error(codes, scales) @ rest).norm(), (error(*plain) @ rest).norm(), rtol=0.01, atol=0)


def test_stacks_have_no_directions() -> None:
    assert Format("nf4", (200, 256), experts=3, dtype=torch.float32).directions == 0
    assert Format("int8", (200, 256), dtype=torch.float32).directions == 0
    assert Format("nf4", (8192, 28672), dtype=torch.float32).directions == MOST_DIRECTIONS


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("inputs_first", [False, True])
def test_scales_are_of_output_channels(name: str, inputs_first: bool) -> None:
    format = Format(name, (6, 8), inputs_first, dtype=torch.float64)
    full = weight(format)
    codes, scales = format.quantise(full)
    of_outputs = full if not inputs_first else full.T
    expected = of_outputs.abs().amax(1).float() / LARGEST[name]
    assert torch.equal(scales.view(torch.float32), expected)
    stored = codes.view(STORED[name]).double()
    product = stored * (expected.double() if inputs_first else expected.double()[:, None])
    assert torch.equal(format.dense(codes, scales), product)


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_in_fp8(inputs_first: bool, dtype: torch.dtype) -> None:
    """Forward and backward: near to those with what the codes stand for; of zeros zeros, of no tokens none."""
    format = Format("fp8", (48, 32), inputs_first, dtype=dtype, products=True)
    codes, scales = format.quantise(weight(format) * torch.arange(1, 49)[:, None].to(dtype))
    factor, dense = format.factor(codes, scales, dtype), format.dense(codes, scales)
    assert isinstance(factor, Scaled)
    for one, plain in ((factor, dense), (factor.mT, dense.mT)):
        x = torch.randn(5, plain.shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
        y = one.product(x)
        assert y.dtype == dtype
        assert (y - x @ plain).float().norm() < 0.05 * (x @ plain).float().norm()
        assert not one.product(torch.zeros_like(x)).any()
        assert one.product(x[:0]).shape == (0, plain.shape[1])
    odd = Format("fp8", (40, 24), inputs_first, dtype=dtype, products=True)
    assert isinstance(odd.factor(*odd.quantise(weight(odd)), dtype), torch.Tensor)  # sides the products do not take


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_the_largest_stay(name: str) -> None:
    format = Format(name, (4, BLOCK), dtype=torch.float32)
    full = torch.zeros(4, BLOCK)
    full[1, 3], full[2, 5] = 7.0, -0.25
    assert torch.allclose(format.dense(*format.quantise(full)), full, rtol=1e-6)


@pytest.mark.parametrize(("name", "share"), [("int8", 0.51), ("fp8", 0.51), ("nf4", 0.30)])
def test_bytes(name: str, share: float) -> None:
    format = Format(name, (512, 384), dtype=torch.bfloat16)
    assert format.nbytes < share * 2 * 512 * 384
