"""project.py against singular value decompositions in float64 and against galore_torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ows_ds.optim.projection import (
    exact_projector,
    find_projector,
    is_tall,
    leading,
    low_rank_gradient,
    orthonormal,
    rotation,
    start_basis,
)
from ows_ds.optim.sizes import sketch_width

SHAPES = [(40, 24), (24, 40), (30, 30)]
RANK = 6
SPECTRA = {
    "1 / k": lambda k: 1 / k,
    "0.8^k": lambda k: 0.8**k,
    "1 / sqrt(k)": lambda k: k**-0.5,
    "two large, the rest small": lambda k: torch.where(k <= 2, 1.0, 1e-3 / k),
}


def gradient(shape: tuple[int, int], spectrum: str = "1 / k", seed: int = 0) -> Tensor:
    """(m, n), float64, with random singular vectors and the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    short = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], short, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], short, generator=generator, dtype=torch.float64)).Q
    values = SPECTRA[spectrum](torch.arange(1, short + 1, dtype=torch.float64))
    return (left * values) @ right.T


def randomized_projector(matrix: Tensor, rank: int, seed: int, previous: Tensor | None = None) -> Tensor:
    return find_projector(matrix, rank, "randomized", seed, previous)


def top(matrix: Tensor, rank: int) -> Tensor:
    """(min(m, n), rank), float64: singular vectors of the short side."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return right[:rank].T if matrix.shape[0] >= matrix.shape[1] else left[:, :rank]


def energy(matrix: Tensor, q: Tensor) -> float:
    """|| projection of the matrix ||^2."""
    matrix, q = matrix.double(), q.double()
    return float((matrix @ q if matrix.shape[0] >= matrix.shape[1] else matrix.T @ q).square().sum())


def assert_orthonormal(q: Tensor) -> None:
    gap = q.double().T @ q.double() - torch.eye(q.shape[1], dtype=torch.float64)
    assert float(gap.abs().max()) < 2e-6  # float32


def test_sides() -> None:
    assert [is_tall(shape) for shape in SHAPES] == [True, False, True]
    assert is_tall(torch.Size((3, 2)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = gradient(shape).to(dtype)
    q = exact_projector(g, RANK)
    assert (q.dtype, q.shape, q.is_contiguous()) == (torch.float32, (min(shape), RANK), True)
    assert_orthonormal(q)
    expected = top(g, RANK)
    assert float((q.double() @ q.double().T - expected @ expected.T).abs().max()) < 1e-5  # the same subspace
    assert energy(g, q) == pytest.approx(float(torch.linalg.svdvals(g.double())[:RANK].square().sum()), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [1, RANK, 20])
def test_randomized_keeps_the_energy(shape: tuple[int, int], spectrum: str, rank: int) -> None:
    for seed in range(5):
        g = gradient(shape, spectrum, seed)
        q = randomized_projector(g.float(), rank, seed)
        assert (q.dtype, q.shape) == (torch.float32, (min(shape), rank))
        assert_orthonormal(q)
        assert 0.99 <= energy(g, q) / energy(g, top(g, rank)) <= 1 + 1e-5


def test_randomized_is_wider_than_its_rank_and_in_order() -> None:
    """A larger problem, where the range finder sees 16 of 200 dimensions; directions come with falling energy."""
    g = gradient((300, 200), "1 / sqrt(k)").float()
    q = randomized_projector(g, 8, 1)
    assert 0.99 <= energy(g, q) / energy(g, top(g, 8)) <= 1
    each = [energy(g, column[:, None]) for column in q.T]
    assert each == sorted(each, reverse=True)


@pytest.mark.parametrize("shape", [*SHAPES, (300, 200)])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_from_the_previous_projector(shape: tuple[int, int], spectrum: str, kept: float) -> None:
    """One round less from a projector that shares a part of its directions with the new one, or none."""
    for seed in range(5):
        g = gradient(shape, spectrum, seed)
        best = top(g, RANK)
        noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        previous = torch.linalg.qr(kept * best + (1 - kept) * noise / best.shape[0] ** 0.5).Q
        q = randomized_projector(g.float(), RANK, seed, previous.to(torch.bfloat16))
        assert (q.dtype, q.shape) == (torch.float32, (min(shape), RANK))
        assert_orthonormal(q)
        assert 0.975 + 0.015 * (kept > 0) <= energy(g, q) / energy(g, best) <= 1 + 1e-5


def test_start_basis() -> None:
    cold, again = start_basis(24, 8, 5), start_basis(24, 8, 5)
    assert torch.equal(cold, again)
    assert not torch.equal(cold, start_basis(24, 8, 6))
    assert float(start_basis(2000, 50, 1).norm(dim=0).mean()) == pytest.approx(1, rel=0.01)
    previous = exact_projector(gradient((40, 24)), 6)
    warm = start_basis(24, 8, 5, previous)
    assert torch.equal(warm[:, :6], previous)
    assert torch.equal(warm[:, 6:], start_basis(24, 2, 5))
    assert torch.linalg.matrix_rank(warm) == 8
    assert torch.equal(start_basis(24, 6, 5, previous), previous)


@pytest.mark.parametrize("largest_over_smallest", [1.0, 1e2, 1e3, 1e5, 1e8, float("inf")])
def test_orthonormal(largest_over_smallest: float) -> None:
    """To float32's precision however the columns depend on each other; their span is kept."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        left = torch.linalg.qr(torch.randn(300, 40, generator=generator, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
        values = torch.logspace(0, -1, 40, dtype=torch.float64) ** torch.tensor(largest_over_smallest).log10()
        columns = 7e-6 * ((left * values.nan_to_num(0.0)) @ right.T).float()
        q, r = orthonormal(columns)
        assert (q.dtype, r.dtype) == (torch.float32, torch.float64)
        assert_orthonormal(q)
        assert float((q.double() @ r - columns).norm() / columns.norm()) < 1e-6
        assert not r.tril(-1).any()


def test_leading() -> None:
    columns = gradient((50, 30), "1 / sqrt(k)").float()
    q = leading(columns, 7)
    assert_orthonormal(q)
    expected = torch.linalg.svd(columns.double()).U[:, :7]
    torch.testing.assert_close((q.double().T @ expected).abs(), torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", list(SPECTRA)[:2])
def test_two_sketches_keep_the_energy(shape: tuple[int, int], spectrum: str) -> None:
    for seed in range(5):
        g = gradient(shape, spectrum, seed)
        tall = (g if is_tall(shape) else g.T).float()
        short = min(shape)
        basis = orthonormal(tall @ start_basis(short, sketch_width(RANK, short), seed))[0].to(torch.bfloat16)
        q = leading(tall.T @ basis.float(), RANK)
        assert energy(g, q) >= 0.99 * energy(g, top(g, RANK))
    assert (sketch_width(4, 20), sketch_width(12, 20)) == (16, 20)


@pytest.mark.parametrize("shape", SHAPES)
def test_randomized_depends_on_the_seed_alone(shape: tuple[int, int]) -> None:
    g = gradient(shape, "1 / sqrt(k)").float()
    torch.manual_seed(1)
    first = randomized_projector(g, RANK, 5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(randomized_projector(g, RANK, 5), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(randomized_projector(g, RANK, 6), first)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize("kind", ["zero", "rank one", "tiny"])
def test_degenerate_gradients(shape: tuple[int, int], method: str, kind: str) -> None:
    """Fewer directions than r: still orthonormal, finite, and everything there is is kept."""
    one = torch.outer(torch.arange(1.0, shape[0] + 1), torch.arange(1.0, shape[1] + 1))
    g = {"zero": torch.zeros(shape), "rank one": one, "tiny": gradient(shape).float() * 1e-12}[kind]
    q = find_projector(g, RANK, method, seed=3)
    assert q.shape == (min(shape), RANK)
    assert_orthonormal(q)
    if kind == "rank one":
        assert energy(g, q) == pytest.approx(float(g.double().square().sum()), rel=1e-5)
    if kind == "tiny":
        assert energy(g, q) >= 0.99 * energy(g, top(g, RANK))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_equal_singular_values_do_not_turn_an_aligned_basis(shape: tuple[int, int], method: str) -> None:
    """What a decomposition makes of them is rounding's choice: moments would go to other columns with each change of
    the order of sums. The subspace is not."""
    jumps = []
    for seed in range(5):
        left, right = (torch.linalg.qr(gradient((n, n), seed=seed)).Q for n in shape)
        values = torch.where(torch.arange(min(shape)) < RANK, 1.0, 1e-3).double()
        g = (left[:, : min(shape)] * values) @ right[:, : min(shape)].T
        other = g * (1 + 1e-7 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=g.dtype))
        near = torch.linalg.qr(start_basis(min(shape), RANK, seed)).Q
        free, turned = (
            [find_projector(one, RANK, method, seed, start=near, align=align) for one in (g, other)]
            for align in (False, True)
        )
        assert float((turned[0] - turned[1]).abs().max()) < 2e-6
        assert_orthonormal(turned[0])
        jumps.append(float((free[0] - free[1]).abs().max()))
    assert max(jumps) > 0.1


def test_find_projector_is_what_it_is_told() -> None:
    g = gradient(SHAPES[0])
    assert torch.equal(find_projector(g, RANK, "svd", 1), exact_projector(g, RANK).double())
    assert not torch.equal(find_projector(g, RANK, "randomized", 1), exact_projector(g, RANK))


# ---- the gradient inside the subspace


def test_low_rank_gradient_by_hand() -> None:
    tall = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    q = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    expected = torch.tensor([[2.2], [5.0], [7.8]], dtype=torch.float64)
    for g in (tall, tall.T):  # wide: the same, transposed
        r = low_rank_gradient(g, q)
        assert r.dtype == torch.float64
        torch.testing.assert_close(r, expected, rtol=0, atol=1e-15)
    square = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # counts as tall
    torch.testing.assert_close(low_rank_gradient(square, q), expected[:2], rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_back_in_the_full_space_it_is_the_best_approximation(shape: tuple[int, int]) -> None:
    g = gradient(shape)
    q = exact_projector(g, RANK).double()
    r = low_rank_gradient(g, q)
    assert r.shape == (max(shape), RANK)
    back = r @ q.T if is_tall(shape) else q @ r.T
    rest = g - back
    # an orthogonal projection: what is left has no part in the subspace
    assert float((rest @ q if is_tall(shape) else q.T @ rest).abs().max()) < 1e-6
    tail = torch.linalg.svdvals(g)[RANK:].square().sum()
    assert float(rest.square().sum()) == pytest.approx(float(tail), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_whole_rank_gives_the_gradient_back(shape: tuple[int, int], method: str) -> None:
    g = gradient(shape)
    q = find_projector(g, min(shape), method, 0).double()
    r = low_rank_gradient(g, q)
    back = r @ q.T if is_tall(shape) else q @ r.T
    assert float((back - g).norm() / g.norm()) < 1e-5


def test_rotation() -> None:
    old, new = (exact_projector(gradient((24, 40), seed=seed).float(), RANK) for seed in (1, 2))
    coordinates = torch.randn(40, RANK, generator=torch.Generator().manual_seed(0))
    turned = coordinates @ rotation(old, new)
    expected = torch.linalg.lstsq(new, old @ coordinates.T).solution.T  # nearest point of the new subspace
    torch.testing.assert_close(turned, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotation(old, old), torch.eye(RANK), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_galore(shape: tuple[int, int]) -> None:
    from galore_torch.galore_projector import GaLoreProjector

    g = gradient(shape).float()
    theirs = GaLoreProjector(RANK, update_proj_gap=1, scale=0.25, proj_type="std")
    their_r = theirs.project(g, 0)
    q = exact_projector(g, RANK)
    r = low_rank_gradient(g, q)
    if is_tall(shape):
        their_q, their_rows = theirs.ortho_matrix.T, their_r
        back = r @ q.T
    else:
        their_q, their_rows = theirs.ortho_matrix, their_r.T
        back = q @ r.T
    signs = (q * their_q).sum(0).sign()
    torch.testing.assert_close(q * signs, their_q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r * signs, their_rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(0.25 * back, theirs.project_back(their_r), rtol=1e-5, atol=1e-6)


# ---- stacks, and gradients of few directions


def assert_same(a: Tensor, b: Tensor, method: str) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-9 if method == "randomized" else 1e-5)


@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_a_stack_is_its_matrices_one_by_one(shape: tuple[int, int], method: str) -> None:
    stack = torch.stack([gradient(shape, seed=seed).double() for seed in range(3)])
    previous = torch.stack([exact_projector(gradient(shape, seed=seed + 9).double(), RANK) for seed in range(3)])
    for before in (None, previous):
        found = find_projector(stack, RANK, method, [5, 6, 7], before, align=True)
        for index, one in enumerate(found):
            old = None if before is None else before[index]
            assert_same(one, find_projector(stack[index], RANK, method, 5 + index, old, align=True), method)


@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize("directions", [0, 1, RANK - 1])
def test_missing_directions_come_from_the_previous_subspace(directions: int, method: str) -> None:
    """Not from rounding: another order of sums gives the same. What has no gradient keeps its subspace."""
    tokens = torch.randn(directions, 40 + 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = tokens[:, :40].T @ tokens[:, 40:]
    previous = exact_projector(gradient((40, 24), seed=2).double(), RANK)
    q = find_projector(g, RANK, method, 3, previous, align=True)
    assert_orthonormal(q)
    torch.testing.assert_close(g @ q @ q.T, g, rtol=0, atol=1e-7 if method == "randomized" else 1e-5)
    noise = torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 1e-15
    assert_same(find_projector(g * (1 + noise), RANK, method, 3, previous, align=True), q, method)
    # all but the directions of the gradient are in the old subspace
    inside = torch.linalg.svdvals(previous.double().T @ q)
    assert int((inside > 1 - 1e-5).sum()) >= RANK - directions
    if not directions:
        torch.testing.assert_close(q, previous.double(), rtol=0, atol=1e-6)
