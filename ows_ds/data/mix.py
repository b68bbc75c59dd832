"""Sources of rows and their weights -> which rows an epoch has, in which order."""

from collections.abc import Sequence

import numpy


def generator(*words: int) -> numpy.random.Generator:
    """A random stream that depends on ``words`` alone."""
    return numpy.random.Generator(numpy.random.PCG64(numpy.random.SeedSequence(list(words))))


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` in integers proportional to ``weights``; what rounding down leaves goes to the largest remainders, of
    equal ones to the first."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))[: total - sum(parts)]:
        parts[i] += 1
    return parts


def epoch(sizes: Sequence[int], weights: Sequence[float], seed: int, number: int) -> numpy.ndarray:
    """Indices of the rows of epoch ``number`` (from 0), in order: int64, as many as all sources have together.

    sizes: rows of each source, which lie one after the other. A source repeats in an order of its own, independent of
    epochs: where its share of an epoch is smaller than the source, the next epoch continues with the next rows.
    """
    found, start = [], 0
    for source, (size, share) in enumerate(zip(sizes, shares(sum(sizes), weights), strict=True)):
        at, last = number * share, (number + 1) * share
        while at < last:
            turn, place = divmod(at, size)
            order = generator(seed, source, turn, 1).permutation(size)[place : place + last - at]
            found.append(order + start)
            at += len(order)
        start += size
    rows = numpy.concatenate(found)
    return rows[generator(seed, number).permutation(len(rows))]
