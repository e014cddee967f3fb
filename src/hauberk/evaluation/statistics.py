"""Intervals and tests for proportions, paired and not, and for the area under a ROC curve."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import binomtest, mannwhitneyu, norm
from statsmodels.stats.proportion import proportion_confint

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its sample size and its 95 % interval."""

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Treated minus control on the same samples."""

    value: float
    n: int
    low: float
    high: float
    p_value: float
    """McNemar's exact test, two-sided."""
    more: int
    """Samples that are positive only when treated."""
    fewer: int
    """Samples that are positive only in the control."""


def proportion(positive: ArrayLike) -> Estimate:
    """Estimate a proportion with Wilson's score interval; (n,) booleans in.

    Raises
    ------
    ValueError
        If there is nothing to count.
    """
    flags = np.asarray(positive, dtype=bool)
    if not flags.size:
        raise ValueError("a proportion of no samples is undefined; check the suite's size.")
    count, n = int(flags.sum()), int(flags.size)
    return Estimate(count / n, n, *wilson(count, n))


def wilson(count: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of ``count`` out of ``n``, n > 0: its low and its high end."""
    low, high = proportion_confint(count, n, alpha=1 - CONFIDENCE, method="wilson")
    value = count / n  # at 0 and n the ends are off by a rounding error
    return min(value, float(low)), max(value, float(high))


def paired_difference(treated: ArrayLike, control: ArrayLike) -> PairedDifference:
    """Compare two proportions on the same samples.

    The test is McNemar's, exact.  The interval is Wald's after adding 1/2 to every cell of the
    2 x 2 table (Agresti and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 2005), which keeps its coverage when discordant pairs
    are few; it is widened, if need be, to hold the observed difference.

    Raises
    ------
    ValueError
        If the two sides differ in length or are empty.
    """
    first, second = np.asarray(treated, dtype=bool), np.asarray(control, dtype=bool)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"pairs needed: {first.size} treated and {second.size} control samples.")
    more, fewer = int((first & ~second).sum()), int((~first & second).sum())
    n = int(first.size)
    observed = (more - fewer) / n
    p_value = binomtest(more, more + fewer).pvalue if more + fewer else 1.0
    total = n + 2
    b, c = (more + 0.5) / total, (fewer + 0.5) / total
    center = b - c
    reach = float(norm.ppf(0.5 + CONFIDENCE / 2)) * np.sqrt((b + c - center**2) / total)
    low, high = min(observed, center - reach), max(observed, center + reach)
    return PairedDifference(
        observed, n, max(-1.0, float(low)), min(1.0, float(high)), float(p_value), more, fewer
    )


def area_under_roc(positive: ArrayLike, negative: ArrayLike) -> Estimate:
    """Estimate how often a positive scores above a negative; (m,) and (n,) numbers in.

    Ties count half; ``n`` is m + n.  The interval is the counterpart of Wilson's (Newcombe,
    "Confidence intervals for an effect size measure based on the Mann-Whitney statistic", part 2,
    Statistics in Medicine 2006, method 5), which does not vanish where all pairs are right.

    Raises
    ------
    ValueError
        If one of the sides is empty.
    """
    above, below = np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    if not (above.size and below.size):
        raise ValueError(
            f"scores of both sides needed: {above.size} positive and {below.size} negative ones."
        )
    pairs, each = above.size * below.size, (above.size + below.size) / 2 - 1
    value = float(mannwhitneyu(above, below).statistic) / pairs
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))

    def beyond(area: float) -> float:
        spread = 1 + each * ((1 - area) / (2 - area) + area / (1 + area))
        return float((value - area) ** 2 - z**2 * area * (1 - area) * spread / pairs)

    apart = 1e-9  # at 0 and 1 the value itself solves the equation
    low = brentq(beyond, 0.0, value - apart) if value > apart else 0.0
    high = brentq(beyond, value + apart, 1.0) if value < 1 - apart else 1.0
    return Estimate(value, above.size + below.size, float(low), float(high))
