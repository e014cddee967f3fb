"""How far two judges agree on the same answers: raw, beyond chance, and outcome by outcome.

What a judge could not read or judge stays a category of its own: two judges that both fail on an
answer agree on that, and one that fails where the other does not disagrees with it.

Source: Cohen, "A coefficient of agreement for nominal scales" (1960); the interval is Fleiss,
Cohen and Everitt's ("Large sample standard errors of kappa and weighted kappa", 1969).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.inter_rater import cohens_kappa

from hauberk.evaluation.judges import Outcome
from hauberk.evaluation.metrics import Row
from hauberk.evaluation.run import Record, by_suite
from hauberk.evaluation.statistics import Estimate, wilson

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
ALL = "all"
"""Stands where the name of a suite would, for all of them together."""


def confusion(records: Sequence[Record]) -> NDArray[np.int64]:
    """Count what the second judge says where the first says what: (6, 6) int64, as OUTCOMES."""
    place = {outcome: index for index, outcome in enumerate(OUTCOMES)}
    table = np.zeros((len(OUTCOMES), len(OUTCOMES)), dtype=np.int64)
    for record in records:
        table[place[record.outcome], place[record.outcome_keyword]] += 1
    return table


def agreement(table: NDArray[np.int64]) -> Estimate:
    """Estimate how often two judges agree, with Wilson's interval; (k, k) counts in, any judged."""
    same, n = int(np.trace(table)), int(table.sum())
    return Estimate(same / n, n, *wilson(same, n))


def kappa(table: NDArray[np.int64]) -> Estimate | None:
    """Estimate Cohen's kappa: agreement beyond chance, 1 where they always agree, 0 by chance.

    Where the large-sample interval has no width, as when they agree on every answer or one of them
    always says the same, it is made of that of the agreement.

    Returns
    -------
    Estimate or None
        None where chance would make them agree on all: both always say one and the same thing.
    """
    n = int(table.sum())
    chance = float(table.sum(axis=0) @ table.sum(axis=1)) / n**2
    if chance == 1:
        return None
    with np.errstate(all="ignore"):  # of the test that kappa is 0, which nobody reads
        found = cohens_kappa(table)  # its limits are those of 95 %
    value, low, high = float(found.kappa), found.kappa_low, found.kappa_upp
    if not found.std_kappa > _NO_WIDTH:
        agreed = agreement(table)
        low, high = ((end - chance) / (1 - chance) for end in (agreed.low, agreed.high))
    return Estimate(value, n, max(-1.0, min(value, float(low))), min(1.0, max(value, float(high))))


_NO_WIDTH = 1e-9
"""A standard error below is a rounding error."""


def agreement_rows(
    records: Sequence[Record], by: Literal["suite", "channel"] = "suite"
) -> list[Row]:
    """Measure the agreement of the two judges of one run, by suite or channel and over all of it.

    ``judge_agreement`` is the share of answers with the same outcome, ``judge_kappa`` that beyond
    chance (no value where that is undefined).  The rows also name the judges.

    Raises
    ------
    ValueError
        If several pairs of judges judged the records.
    """
    pairs = Counter((record.judge, record.second) for record in records)
    if len(pairs) > 1:
        told = ", ".join(" and ".join(pair) for pair in sorted(pairs))
        raise ValueError(f"records of the judges {told}; give those of one pair.")
    rows: list[Row] = []
    name_of = attrgetter(by)
    groups = [(name, list(each)) for name, each in groupby(sorted(records, key=name_of), name_of)]
    for group, members in [*groups, (ALL, list(records))] if len(groups) > 1 else groups:
        table = confusion(members)
        first = members[0]
        about = {"model": first.model, "defense": first.defense, by: group}
        judges = {"judge": first.judge, "second": first.second}
        undefined = {"value": None, "n": len(members), "low": None, "high": None}
        beyond = kappa(table)
        found = {
            "judge_agreement": asdict(agreement(table)),
            "judge_kappa": undefined if beyond is None else asdict(beyond),
        }
        rows += [{**about, "metric": name, **one, **judges} for name, one in found.items()]
    return rows


def confusion_rows(records: Sequence[Record]) -> list[Row]:
    """List the confusion of the two judges by suite: a row for each pair of outcomes there is."""
    return [
        {
            "model": members[0].model,
            "defense": members[0].defense,
            "suite": suite,
            "judge": members[0].judge,
            "second": members[0].second,
            "outcome": OUTCOMES[row],
            "outcome_second": OUTCOMES[column],
            "count": int(table[row, column]),
        }
        for suite, members in by_suite(records)
        for table in [confusion(members)]
        for row, column in zip(*np.nonzero(table), strict=True)
    ]
