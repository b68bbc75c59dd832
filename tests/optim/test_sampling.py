"""Probabilities with exact expectation, and draws that have exactly these probabilities."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ows_ds.errors import UserError
from ows_ds.importance.probabilities import METRIC_OF, importance, probabilities
from ows_ds.optim.sampling import AdaptiveSampler, LayerSet, Sampler

# D of LLaMA2-7B at tau 13, in percent, layer 0 first
LLAMA2 = [
    0.268, 0.295, 0.127, 0.114, 0.099, 0.088, 0.088, 0.084, 0.080, 0.072, 0.071, 0.070, 0.063, 0.059, 0.055, 0.054,
    0.047, 0.039, 0.034, 0.034, 0.032, 0.028, 0.028, 0.023, 0.025, 0.021, 0.024, 0.018, 0.018, 0.021, 0.024, 0.082,
]  # fmt: skip
DRAWS = 10_000


# ---- importance


@pytest.mark.parametrize(
    ("kind", "ratios", "expected"),
    [
        ("outlier", [0.5, 0.25, 2.0], [0.5, 0.25, 2.0]),
        ("reverse", [0.5, 0.25, 2.0], [1.5, 1.75, 0.0]),
        ("uniform", None, [1, 1, 1]),
        ("gradient", None, [1, 1, 1]),
        ("decreasing", None, [3, 2, 1]),
        ("rm", [0.5, 0.25, 2.0], [0.5, 0.25, 2.0]),
        ("bi", [0.5, 0.0, 2.0], [0.5, 0.0, 2.0]),
        ("alpha", [2.0, 4.0, 1.25], [0.5, 0.25, 0.8]),  # the heaviest tail is sampled most
    ],
)
def test_importance(kind: str, ratios: list[float] | None, expected: list[float]) -> None:
    assert importance(kind, 3, ratios) == expected
    assert (kind in METRIC_OF) == (ratios is not None)


def test_an_alpha_of_0_is_refused() -> None:
    with pytest.raises(UserError, match="above 0") as caught:
        importance("alpha", 2, [2.0, 0.0])
    assert caught.value.key == "sampling.scores"


# ---- probabilities


@pytest.mark.parametrize(
    ("ratios", "gamma", "expected"),
    [
        ([1, 2, 3, 2], 2, [0.25, 0.5, 0.75, 0.5]),  # nothing to clip
        ([3, 0, 1], 0.5, [0.375, 0, 0.125]),  # less than one layer; none of a layer without outliers
        ([1, 2, 1], 2, [0.5, 1, 0.5]),  # one exactly at 1
        ([1, 1, 6], 2, [0.5, 0.5, 1]),  # one round: the plain formula gives 0.25 0.25 1.5
        ([1, 1, 4, 16], 3, [0.5, 0.5, 1, 1]),  # two rounds: 16 first, then 4 of what is left
        ([216, 1, 36, 1, 6], 4, [1, 0.5, 1, 0.5, 1]),  # three
        ([0, 5, 0, 7], 2, [0, 1, 0, 1]),
        ([0.1, 0.2, 0.3], 3, [1, 1, 1]),
    ],
)
def test_by_hand(ratios: list[float], gamma: float, expected: list[float]) -> None:
    assert probabilities(ratios, gamma) == pytest.approx(expected, abs=1e-15)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], float]:
    ratios = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=1, max_size=80))
    ratios[draw(st.integers(0, len(ratios) - 1))] = draw(st.floats(1e-9, 1.0))
    able = sum(ratio > 0 for ratio in ratios)
    gamma = draw(st.one_of(st.integers(1, able).map(float), st.floats(1e-3, able)))
    return ratios, gamma


@settings(deadline=None)
@given(cases())
def test_expected_number_is_gamma_and_order_is_kept(case: tuple[list[float], float]) -> None:
    ratios, gamma = case
    p = probabilities(ratios, gamma)
    assert math.fsum(p) == pytest.approx(gamma, abs=1e-12)
    assert all(0 <= each <= 1 for each in p)
    assert [each > 0 for each in p] == [ratio > 0 for ratio in ratios]
    by_ratio = [each for _, each in sorted(zip(ratios, p, strict=True))]
    assert by_ratio == sorted(by_ratio)
    # what is not clipped stays in proportion
    free = [(each, ratio) for each, ratio in zip(p, ratios, strict=True) if 0 < each < 1]
    assert all(each * free[0][1] == pytest.approx(free[0][0] * ratio, rel=1e-12) for each, ratio in free)


def test_parts_of_layers_count_by_their_size() -> None:
    """2 of 4 layers, one of them in three parts: as many weights are drawn; a part counts for less than a layer."""
    sizes = [0.25, 0.5, 0.25, 1, 1, 1]
    p = probabilities([2, 2, 2, 1, 1, 0], 2, sizes=sizes)
    assert p == pytest.approx([1, 1, 1, 0.5, 0.5, 0])
    p = probabilities([1, 2, 1, 1, 1, 1], 1, sizes=sizes)
    assert math.fsum(each * size for each, size in zip(p, sizes, strict=True)) == pytest.approx(1)
    assert p[1] == pytest.approx(2 * p[3])
    with pytest.raises(UserError, match="at most 3, the number of layers with an importance above 0"):
        probabilities([2, 2, 2, 1, 1, 0], 3.5, sizes=sizes)


def test_llama2_is_clipped_at_12_and_not_at_5() -> None:
    assert max(probabilities(LLAMA2, 5)) == pytest.approx(5 * 0.295 / 2.185)
    assert [l for l, p in enumerate(probabilities(LLAMA2, 12)) if p == 1] == [0, 1]  # noqa: E741
    assert math.fsum(probabilities(LLAMA2, 12)) == pytest.approx(12, abs=1e-12)


@pytest.mark.parametrize(
    ("ratios", "gamma", "key", "value", "says"),
    [
        ([0.0, 0.0, 0.0], 1, "sampling.tau", 13.0, "smaller threshold"),
        ([0.1, 0.2, 0.3], 4, "sampling.gamma", 4, "at most 3, the number of layers"),
        ([0.1, 0.2, 0.3], 0, "sampling.gamma", 0, "more than 0"),
        ([0.1, 0.2, 0.3], -1, "sampling.gamma", -1, "more than 0"),
        ([0.1, 0.2, 0.3], math.nan, "sampling.gamma", None, "more than 0"),
        ([0.1, 0.0, 0.3], 3, "sampling.gamma", 3, "at most 2, the number of layers with an importance above 0"),
        ([0.1, 0.0, 0.3], 2.5, "sampling.gamma", 2.5, "at most 2, the number of layers with an importance above 0"),
    ],
)
def test_what_is_refused(ratios: list[float], gamma: float, key: str, value: float | None, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        probabilities(ratios, gamma, 13.0)
    assert caught.value.key == key
    assert value is None or caught.value.value == value


# ---- draws

DISTRIBUTIONS = {
    "LLaMA2-7B, gamma 5": probabilities(LLAMA2, 5),
    "LLaMA2-7B, gamma 12, two layers certain": probabilities(LLAMA2, 12),
    "skewed, one certain, one never": probabilities([1, 40, 0.01, 0, 3, 2], 3),
    "one of many": probabilities([1] * 31 + [500], 1),
}


@pytest.mark.parametrize("scheme", ["bernoulli", "fixed"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_shares_are_the_probabilities(name: str, scheme: str) -> None:
    p = DISTRIBUTIONS[name]
    sampler = Sampler(p, scheme, seed=7)
    sets = [sampler.draw() for _ in range(DRAWS)]
    counts = Counter(layer for drawn in sets for layer in drawn)
    for layer, probability in enumerate(p):
        error = math.sqrt(probability * (1 - probability) / DRAWS)
        assert abs(counts[layer] / DRAWS - probability) <= 4 * error, layer  # error 0: always, or never
    assert all(drawn == tuple(sorted(set(drawn))) for drawn in sets)

    gamma = round(sum(p))
    if scheme == "fixed":
        assert {len(drawn) for drawn in sets} == {gamma}
    else:
        error = math.sqrt(sum(each * (1 - each) for each in p) / DRAWS)
        assert abs(sum(map(len, sets)) / DRAWS - gamma) <= 4 * error
        assert len({len(drawn) for drawn in sets}) > 1


def test_bernoulli_layers_are_independent_of_each_other_and_of_the_last_draw() -> None:
    p = probabilities([1, 2, 3, 2], 2)
    sampler = Sampler(p, "bernoulli", seed=1)
    drawn = np.zeros((DRAWS, 4))
    for row in drawn:
        row[list(sampler.draw())] = 1
    for first, second in ((drawn, drawn), (drawn[:-1], drawn[1:])):
        together = first.T @ second / len(first)
        for i in range(4):
            for j in range(4):
                if first is second and i == j:
                    continue
                both = p[i] * p[j]
                assert abs(together[i, j] - both) <= 4 * math.sqrt(both * (1 - both) / len(first))


def test_fixed_pairs_are_mixed() -> None:
    """Equal layers meet in every combination: the order is random, not that of the model."""
    sampler = Sampler([0.5] * 4, "fixed", seed=3)
    counts = Counter(sampler.draw() for _ in range(DRAWS))
    assert set(counts) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    assert all(abs(n / DRAWS - 1 / 6) <= 4 * math.sqrt(1 / 6 * 5 / 6 / DRAWS) for n in counts.values())


def test_fixed_needs_a_whole_number() -> None:
    with pytest.raises(UserError, match="expected a whole number") as caught:
        Sampler(probabilities(LLAMA2, 2.5), "fixed", 0)
    assert caught.value.key == "sampling.gamma"
    assert len(Sampler(probabilities(LLAMA2, 2.5), "bernoulli", 0).draw()) <= 32


def draws(sampler: Sampler, number: int) -> list[LayerSet]:
    return [sampler.draw() for _ in range(number)]


@pytest.mark.parametrize("scheme", ["bernoulli", "fixed"])
def test_stream(scheme: str) -> None:
    p = probabilities(LLAMA2, 5)
    sampler = Sampler(p, scheme, seed=11)
    first = draws(sampler, 20)
    state = json.loads(json.dumps(sampler.state_dict()))
    later = draws(sampler, 20)
    assert first != later

    np.random.seed(0)  # the program's other random numbers are none of its business
    assert draws(Sampler(p, scheme, seed=11), 40) == first + later
    assert draws(Sampler(p, scheme, seed=12), 20) != first

    other = Sampler(p, scheme, seed=0)
    other.load_state_dict(state)
    assert draws(other, 20) == later
    assert sampler.state_dict() == other.state_dict() != state


def test_a_set_may_be_empty() -> None:
    sampler = Sampler(probabilities([1, 1], 0.5), "bernoulli", seed=0)
    counts = Counter(draws(sampler, 1000))
    assert abs(counts[()] / 1000 - 0.75**2) <= 4 * math.sqrt(0.75**2 * (1 - 0.75**2) / 1000)
    assert set(counts) == {(), (0,), (1,), (0, 1)}


# ---- draws that adapt


def adaptive(n_layers: int, gamma: float, scheme: str, seed: int = 0) -> AdaptiveSampler:
    return AdaptiveSampler([1.0] * n_layers, gamma, scheme, seed, decay=0.5, floor=0.2)


def test_probabilities_follow_the_gradients_above_a_floor() -> None:
    sampler = adaptive(4, 1, "bernoulli")
    assert sampler.probabilities == [0.25] * 4
    sampler.observe({0: 3.0, 2: 1.0})  # the others take the mean, 2
    assert sampler.probabilities == pytest.approx([0.2 / 4 + 0.8 * part / 8 for part in (3, 2, 1, 2)])
    sampler.observe({0: 1.0, 3: 0.0})  # 0's mean is 2 now, and 1's that of 2, 1 and 0
    assert sampler.probabilities == pytest.approx([0.2 / 4 + 0.8 * part / 4 for part in (2, 1, 1, 0)])
    sampler.observe({layer: 0.0 for layer in range(4)})
    assert min(sampler.probabilities) == pytest.approx(0.2 / 4)


def test_rounding_of_gradients_does_not_change_probabilities() -> None:
    one, other = (adaptive(3, 2, "fixed") for _ in range(2))
    for sampler, error in ((one, 0.0), (other, 1e-12)):
        sampler.observe({0: 0.1 * (1 + error), 1: 0.7 * (1 - error)})
    assert one.probabilities == other.probabilities


@pytest.mark.parametrize("scheme", ["bernoulli", "fixed"])
def test_shares_are_the_mean_of_changing_probabilities(scheme: str) -> None:
    """And a sampler that is resumed in between draws what it would have drawn."""
    sampler, random, sums = adaptive(6, 2, scheme, seed=5), np.random.default_rng(1), np.zeros((2, 6))
    counts, p = np.zeros(6), np.asarray(sampler.probabilities)
    for number in range(DRAWS):
        if number == DRAWS // 2:
            state = json.loads(json.dumps(sampler.state_dict()))
            sampler = adaptive(6, 2, scheme, seed=9)
            sampler.load_state_dict(state)
            assert sampler.probabilities == list(p)
        drawn = list(sampler.draw())
        counts[drawn] += 1
        sums += [p, p * (1 - p)]
        sampler.observe({layer: float(random.exponential(layer + 1)) for layer in drawn})
        p = np.asarray(sampler.probabilities)
    assert (np.abs(counts - sums[0]) <= 4 * np.sqrt(sums[1])).all()
    assert sums[0][5] > 1.5 * sums[0][0]
