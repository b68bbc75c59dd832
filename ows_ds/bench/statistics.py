"""Mean, standard deviation and the independent samples t-test (the paper's Tables 12 and 13). Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def describe(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1), each None where there is none.

    values: one a seed; None for a run without a finite result, beside which there is no mean.
    """
    known = _known(values)
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def t_test(values: Sequence[float | None], baseline: Sequence[float | None]) -> tuple[float | None, float | None]:
    """t and two-sided p of Student's t-test on independent samples with equal variances; t > 0: ``values`` are larger.

    (None, None) where a side has fewer than two values, or none vary, so that t is not a number.
    """
    from scipy import stats

    a, b = _known(values), _known(baseline)
    if min(len(a), len(b)) < 2 or len({*a}) == len({*b}) == 1:
        return None, None
    result = stats.ttest_ind(a, b, equal_var=True)
    t, p = float(result.statistic), float(result.pvalue)
    return (t, p) if math.isfinite(t) and math.isfinite(p) else (None, None)


def _known(values: Sequence[float | None]) -> list[float]:
    """The values, or none of them where one is missing."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []
