"""Intervals and tests for proportions, paired and not, and what a judge's errors do to them."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, bootstrap, mannwhitneyu, norm, t
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
    bootstrap_low: float
    """See :func:`paired_bootstrap`."""
    bootstrap_high: float
    p_value: float
    """McNemar's exact test, two-sided."""
    more: int
    """Samples that are positive only when treated."""
    fewer: int
    """Samples that are positive only in the control."""


@dataclass(frozen=True)
class NonInferiority:
    """Whether a treatment costs less than a margin: "at most 2 points of accuracy"."""

    difference: PairedDifference
    margin: float
    p_value: float
    """One-sided, of "the cost is the margin or more"."""

    @property
    def shown(self) -> bool:
        """Whether the data show it; an open question is no proof of harm, and none of safety."""
        return self.p_value < (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class Accuracy:
    """How often a judge is right on n responses whose truth is known.

    Attributes
    ----------
    sensitivity, specificity
        Share of the truly positive (negative) responses that it calls positive (negative).
    positives, negatives
        How many of each it was measured on, or as many as weighted ones are worth; None: known
        exactly.
    """

    sensitivity: float
    specificity: float
    positives: float | None = None
    negatives: float | None = None


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


def wilson(count: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of ``count`` out of ``n``, n > 0: its low and its high end.

    Numbers that are no integers come from weights: n is then the effective size of a sample.
    """
    low, high = proportion_confint(count, n, alpha=1 - CONFIDENCE, method="wilson")
    value = count / n  # at 0 and n the ends are off by a rounding error
    return min(value, float(low)), max(value, float(high))


def mean(values: ArrayLike) -> Estimate:
    """Estimate a mean with Student's t interval; (n,) numbers of independent samples in.

    Raises
    ------
    ValueError
        If there are fewer than two, which say nothing of their spread.
    """
    numbers = np.asarray(values, dtype=float)
    if numbers.size < 2:
        raise ValueError(f"{numbers.size} numbers have no interval; give 2 or more.")
    value, n = float(numbers.mean()), int(numbers.size)
    reach = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1) * numbers.std(ddof=1) / math.sqrt(n))
    return Estimate(value, n, value - reach, value + reach)


Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From sums over samples, (..., k) float64, to a number for each: (...) float64."""
RESAMPLES = 2000
"""Enough for the 2.5 % tails: 50 resamples lie in each."""


def clusters(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    """Number the groups of n samples from 0 in the order of their names: (n,) int64."""
    order = {group: place for place, group in enumerate(sorted(set(groups), key=str))}
    return np.array([order[group] for group in groups], dtype=np.int64)


def cluster_sums(values: ArrayLike, groups: Sequence[Hashable]) -> Floats:
    """Add up what is known of each sample over its group; (n, k) in, (groups, k) float64 out."""
    table = np.asarray(values, dtype=float)
    sums = np.zeros((len(set(groups)), table.shape[1]))
    np.add.at(sums, clusters(groups), table)
    return sums


def resampled(
    sums: Floats, statistic: Statistic, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of sums, whole clusters resampled.

    Samples that share a picture are no independent ones: they are drawn together or not at all.
    Where all resamples agree, or there is one cluster, the bootstrap knows nothing; the interval
    is then Wilson's for as many samples as there are clusters, stretched over the bounds.

    Parameters
    ----------
    sums : (clusters, k) float64, such as :func:`cluster_sums` makes; the same rows in another
        order give another interval, by the noise of the bootstrap
    statistic : computes the number from sums over clusters
    bounds : between which the statistic lies
    """
    value, n = float(statistic(sums.sum(axis=0))), len(sums)
    low, high = value, value
    if n > 1:
        found = bootstrap(
            (np.arange(n),), lambda index, axis: statistic(sums[index].sum(axis=-2)),
            vectorized=True, batch=max(1, 2_000_000 // sums.size), n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0),
        )  # fmt: skip
        ends = found.confidence_interval
        low, high = min(value, float(ends.low)), max(value, float(ends.high))
    if high - low < _EDGE:
        least, most = bounds
        share = (value - least) / (most - least)
        low, high = (least + (most - least) * end for end in wilson(share * n, n))
    return low, high


def clustered_mean(
    scores: ArrayLike, groups: Sequence[Hashable], out_of: ArrayLike = 1.0
) -> Estimate:
    """Estimate what share of the points was got, of samples that come in groups.

    A proportion of independent samples, or of groups of one size that are all or nothing, has
    Wilson's interval, the groups being counted.  Anything else has that of :func:`resampled`.

    Parameters
    ----------
    scores : (n,) numbers, none below 0
    groups : (n,) names; samples of one name are resampled together
    out_of : (n,) numbers above 0, or one for all: what each score counts against

    Raises
    ------
    ValueError
        If there is nothing to average.
    """
    got = np.asarray(scores, dtype=float)
    if not got.size:
        raise ValueError("a mean of no samples is undefined; check the suite's size.")
    points = np.broadcast_to(np.asarray(out_of, dtype=float), got.shape)
    sums = cluster_sums(np.stack([got, points], axis=1), groups)
    value, n = float(got.sum() / points.sum()), int(got.size)
    whole = np.isin(sums[:, 0], (0.0, sums[0, 1])) & (sums[:, 1] == sums[0, 1])
    if whole.all() and np.isin(got, (0.0, 1.0)).all() and (points == 1).all():
        return Estimate(value, n, *wilson(value * len(sums), len(sums)))
    most = max(1.0, float((got / points).max()))
    ends = resampled(sums, lambda total: total[..., 0] / total[..., 1], (0.0, most))
    return Estimate(value, n, *ends)


def paired_mean_difference(
    treated: ArrayLike, control: ArrayLike, groups: Sequence[Hashable], margin: float | None = None
) -> tuple[PairedDifference, float | None]:
    """Compare the means of scores on the same samples, which come in groups.

    The counterpart of :func:`paired_difference` for scores that are no yes or no, or whose
    samples share pictures.  The interval is Student's, with the variance between groups that a
    ratio of sums has (Cochran, "Sampling Techniques", 1977, ch. 6), and the test inverts it.
    Where no group changes it is that of :func:`paired_difference` for as many samples as there are
    groups, which agree; where all change alike it is Wilson's for as many, stretched over -1 to 1.

    Returns
    -------
    difference : PairedDifference
        ``more`` and ``fewer`` count the samples whose score is higher, or lower, when treated.
    p_noninferior : float or None
        One-sided, of "the loss is ``margin`` or more"; None without a margin.

    Raises
    ------
    ValueError
        If the two sides differ in length or are empty.
    """
    first, second = np.asarray(treated, dtype=float), np.asarray(control, dtype=float)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"pairs needed: {first.size} treated and {second.size} control samples.")
    change = first - second
    n, value = int(change.size), float(change.mean())
    more, fewer = int((change > 0).sum()), int((change < 0).sum())
    sums = cluster_sums(np.stack([change, np.ones_like(change)], axis=1), groups)
    count = len(sums)
    spread = sums[:, 0] - value * sums[:, 1]
    error = math.sqrt(count / max(count - 1, 1) * float(spread @ spread)) / n
    if error < _EDGE:
        return _alike(value, n, (more, fewer), count, margin)
    law: Any = t(count - 1)
    reach = float(law.ppf(0.5 + CONFIDENCE / 2)) * error
    ends = resampled(sums, lambda total: total[..., 0] / total[..., 1], (-1.0, 1.0))
    p_value = float(2 * law.sf(abs(value) / error))
    difference = PairedDifference(
        value, n, value - reach, value + reach, *ends, p_value, more, fewer
    )
    return difference, None if margin is None else float(law.sf((value + margin) / error))


def _alike(
    value: float, n: int, changed: tuple[int, int], count: int, margin: float | None
) -> tuple[PairedDifference, float | None]:
    """Compare where each of ``count`` groups changes by ``value``: only their number is known."""
    if value == 0:
        same = np.ones(count, dtype=bool)
        agreeing = replace(paired_difference(same, same), n=n)
        return agreeing, noninferiority(same, same, margin).p_value if margin else None
    share = min(1.0, (1 + value) / 2)
    low, high = (2 * end - 1 for end in wilson(share * count, count))

    def excess(true: float) -> float:
        """The score statistic, which Wilson's interval inverts, of a difference ``true``."""
        return (value - true) / math.sqrt((1 - true**2) / count)

    p_value = float(2 * norm.sf(abs(excess(0))))
    ends = (min(value, low), max(value, high))
    difference = PairedDifference(value, n, *ends, *ends, p_value, *changed)
    return difference, float(norm.sf(excess(-margin))) if margin else None


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

    The test is McNemar's, exact.  The interval is that of the score test (Tango, "Equivalence test
    and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 1998), which keeps its coverage where few pairs are discordant, or
    none: a hundred pairs that agree do not exclude a loss of 2 points.  The bootstrap's stands
    beside it.

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
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    ends = observed, observed
    if fewer < n:
        low = brentq(lambda true: _score(more, fewer, n, true) - z, -1 + _EDGE, observed)
        ends = min(low, observed), observed
    if more < n:
        high = brentq(lambda true: _score(more, fewer, n, true) + z, observed, 1 - _EDGE)
        ends = ends[0], max(high, observed)
    resampled = paired_bootstrap(more, fewer, n)
    return PairedDifference(observed, n, *ends, *resampled, float(p_value), more, fewer)


_EDGE = 1e-12
"""How near a difference may come to -1 and 1, where the score statistic has no variance."""


def _score(more: int, fewer: int, n: int, true: float) -> float:
    """Tango's score statistic (eq. 13) of the hypothesis that the difference is ``true``."""
    a, b = 2 * n, -more - fewer + (2 * n - more + fewer) * true
    # The likeliest share of pairs that are positive only in the control, if it is.
    share = (math.sqrt(max(b * b + 4 * a * fewer * true * (1 - true), 0.0)) - b) / (2 * a)
    variance = n * (2 * share + true * (1 - true))
    distance = more - fewer - n * true
    if variance <= 0:  # no pair is discordant and none should be
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def paired_bootstrap(more: int, fewer: int, n: int) -> tuple[float, float]:
    """Percentile bootstrap interval of a paired difference of proportions.

    Pairs are resampled with replacement.  A pair adds 1 (it is one of ``more``), -1 (of ``fewer``)
    or 0 to the difference, so that a resample is a draw from the multinomial distribution of the
    2 x 2 table, and the distribution of its sum is that of one pair, convolved n times.  That is
    computed here: what ``scipy.stats.bootstrap(paired=True, method="percentile")`` approaches as
    its resamples grow, without a seed.

    It supposes nothing of the distribution, but is too narrow where few pairs are discordant, and
    of no width where none is: decisions rest on the interval of :func:`paired_difference`.
    """
    pair = np.zeros(2 * n + 1)  # of a sum s at s, negative ones from the end
    pair[[0, 1, -1]] = np.array([n - more - fewer, more, fewer]) / n
    chance = np.fft.fftshift(np.fft.ifft(np.fft.fft(pair) ** n).real)  # of -n, ..., n
    tail = (1 - CONFIDENCE) / 2
    below, above = (int(np.argmax(side.cumsum() >= tail)) for side in (chance, chance[::-1]))
    return below / n - 1, 1 - above / n


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of one family of tests, in their order.

    Holm's step-down method ("A simple sequentially rejective multiple test procedure", 1979): what
    stays below 5 % holds with at most 5 % chance of one false claim in the family, whatever the
    tests have to do with each other.  (statsmodels' ``multipletests`` collects garbage in every
    call, which takes longer than all of a report's tests.)
    """
    given = np.asarray(p_values, dtype=float)
    order = np.argsort(given, kind="stable")
    steps = np.maximum.accumulate(given[order] * np.arange(given.size, 0, -1))
    adjusted = np.empty_like(given)
    adjusted[order] = steps.clip(max=1.0)
    return [float(p) for p in adjusted]


def noninferiority(treated: ArrayLike, control: ArrayLike, margin: float) -> NonInferiority:
    """Test on the same samples whether treating loses less than ``margin`` of a proportion.

    The test inverts the interval of :func:`paired_difference`, so that the two never disagree:
    non-inferiority is shown at one-sided 2.5 % when the 95 % interval lies above ``-margin``.

    Raises
    ------
    ValueError
        If the margin is not between 0 and 1, or the samples are not paired.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin} must lie between 0 and 1: a share that may be lost.")
    difference = paired_difference(treated, control)
    score = _score(difference.more, difference.fewer, difference.n, -margin)
    return NonInferiority(difference, margin, float(norm.sf(score)))


def pairs_needed(
    margin: float, *, discordant: float, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Samples for a paired non-inferiority test that finds no loss where there is none.

    ``discordant`` is the share of samples that the treatment changes either way.  Normal
    approximation, one-sided ``alpha``: n = (z_alpha + z_power)^2 discordant / margin^2, but never
    fewer than would show it if no pair were discordant.  :func:`noninferiority` tests at 2.5 %.

    >>> pairs_needed(0.02, discordant=0.05)
    773
    >>> pairs_needed(0.02, discordant=0.05, alpha=0.025)
    982

    Raises
    ------
    ValueError
        If a share does not lie between 0 and 1.
    """
    for name, share in {
        "margin": margin, "discordant": discordant, "power": power, "alpha": alpha
    }.items():  # fmt: skip
        if not 0 < share < 1:
            raise ValueError(f"{name} {share} must lie between 0 and 1.")
    z = float(norm.ppf(1 - alpha))
    reach = z + float(norm.ppf(power))
    return math.ceil(max(reach**2 * discordant / margin**2, z**2 * (1 - margin) / margin))


def corrected_proportion(positive: ArrayLike, judge: Accuracy) -> Estimate:
    """Correct a rate for the errors of the judge that counted it.

    The value is Rogan and Gladen's ("Estimating prevalence from the results of a screening
    test", 1978), cut to [0, 1]; the interval is Lang and Reiczigel's ("Confidence limits for
    prevalence of disease adjusted for estimated sensitivity and specificity", 2014), which
    carries the uncertainty of the judge's accuracy as well as that of the sample.

    Raises
    ------
    ValueError
        If there is nothing to count, or the judge is no better than chance.
    """
    flags = np.asarray(positive, dtype=bool)
    n, observed = int(flags.size), proportion(flags).value
    youden = judge.sensitivity + judge.specificity - 1
    if youden <= 0:
        raise ValueError(
            f"a judge of sensitivity {judge.sensitivity} and specificity {judge.specificity} is "
            "no better than chance; no rate can be recovered from it. Use another judge."
        )
    value = min(1.0, max(0.0, (observed + judge.specificity - 1) / youden))
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    sensitivity, of_sensitivity = _shrunk(judge.sensitivity, judge.positives)
    specificity, of_specificity = _shrunk(judge.specificity, judge.negatives)
    share = (observed * n + z**2 / 2) / (n + z**2)
    youden = sensitivity + specificity - 1
    if youden < _INFORMATIVE:
        return Estimate(value, n, 0.0, 1.0)  # measured on so few, it may well be guessing
    center = (share + specificity - 1) / youden
    variance = (
        share * (1 - share) / (n + z**2)
        + center**2 * of_sensitivity
        + (1 - center) ** 2 * of_specificity
    ) / youden**2
    center += 2 * z**2 * (center * of_sensitivity - (1 - center) * of_specificity)
    low, high = (center + sign * z * math.sqrt(variance) for sign in (-1, 1))
    return Estimate(value, n, max(0.0, min(value, low)), min(1.0, max(value, high)))


_INFORMATIVE = 1e-9
"""The least of sensitivity + specificity - 1 that an interval is made with."""


def _shrunk(share: float, n: float | None) -> tuple[float, float]:
    """A share after adding one success and one failure, and its variance."""
    if n is None:
        return share, 0.0
    value = (share * n + 1) / (n + 2)
    return value, value * (1 - value) / (n + 2)


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
