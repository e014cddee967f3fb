"""Intervals and tests for proportions, paired and not."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, norm
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

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


def unpaired_difference(treated: ArrayLike, control: ArrayLike) -> Estimate:
    """Compare the proportions of two groups of other samples; (n,) and (m,) booleans in.

    The interval is Newcombe's, made of the two Wilson intervals ("Interval estimation for the
    difference between independent proportions", Statistics in Medicine 1998, method 10).

    Returns
    -------
    Estimate
        Of treated minus control, between -1 and 1; its n counts both groups.

    Raises
    ------
    ValueError
        If one of them is empty.
    """
    first, second = proportion(treated), proportion(control)
    counts = [round(estimate.value * estimate.n) for estimate in (first, second)]
    low, high = confint_proportions_2indep(
        counts[0], first.n, counts[1], second.n, method="newcomb", alpha=1 - CONFIDENCE
    )
    value = first.value - second.value  # at the ends of the scale off by a rounding error
    return Estimate(value, first.n + second.n, min(value, float(low)), max(value, float(high)))


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
