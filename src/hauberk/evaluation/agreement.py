"""How far two judges agree on the same answers: raw, beyond chance, and outcome by outcome.

What a judge could not read or judge stays a category of its own: two judges that both fail on an
answer agree on that, and one that fails where the other does not disagrees with it.

Source: Cohen, "A coefficient of agreement for nominal scales" (1960).  The interval is of draws
from what the counts leave open: a Dirichlet posterior whose prior weighs one answer (Perks, 1947).
That of large samples (Fleiss, Cohen and Everitt, 1969) has no width where judges agree on all.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hauberk.evaluation.judges import Outcome
from hauberk.evaluation.metrics import Row
from hauberk.evaluation.run import Record, by_suite
from hauberk.evaluation.statistics import Estimate, Floats, wilson

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

    Parameters
    ----------
    table : (k, k) counts, any

    Returns
    -------
    Estimate or None
        None where one of them always says the same: kappa is 0 then whatever the other says, or
        undefined, and tells nothing.
    """
    said = [int(np.count_nonzero(table.sum(axis=axis))) for axis in (0, 1)]
    if min(said) < 2:
        return None
    used = np.flatnonzero(table.sum(axis=0) + table.sum(axis=1))
    counts = table[np.ix_(used, used)].astype(np.float64)
    value = float(_kappas(counts))
    left_open = np.random.default_rng(0).standard_gamma(
        counts + 1 / counts.size, (_DRAWS, *counts.shape)
    )
    low, high = np.quantile(_kappas(left_open), (0.025, 0.975))
    # Of few answers that agree on all or nothing, the estimate is at an end of what is possible.
    return Estimate(value, int(table.sum()), min(value, float(low)), max(value, float(high)))


def _kappas(tables: Floats) -> Floats:
    """Compute kappa of tables of weights (..., k, k) on any scale."""
    total = tables.sum(axis=(-2, -1))
    agreed = total * np.trace(tables, axis1=-2, axis2=-1)
    chance = (tables.sum(axis=-1) * tables.sum(axis=-2)).sum(axis=-1)
    found: Floats = (agreed - chance) / (total**2 - chance)
    return found


_DRAWS = 4000
"""Of tables: the ends of an interval move by a hundredth of its width, always alike."""


def agreement_rows(
    records: Sequence[Record], by: Literal["suite", "channel"] = "suite"
) -> list[Row]:
    """Measure the agreement of the two judges of one run, by suite or channel and over all of it.

    What an endpoint declared itself no judge was asked.

    ``judge_agreement`` is the share of answers with the same outcome, ``judge_kappa`` that beyond
    chance (no value where one judge always says the same).  The rows also name the judges.

    Raises
    ------
    ValueError
        If several pairs of judges judged the records.
    """
    records = [record for record in records if not record.declared]
    pairs = Counter((record.judge, record.second) for record in records)
    if len(pairs) > 1:
        told = ", ".join(" and ".join(pair) for pair in sorted(pairs))
        raise ValueError(f"records of the judges {told}; give those of one pair.")
    rows: list[Row] = []
    name_of = attrgetter(by)
    groups = [(name, list(each)) for name, each in groupby(sorted(records, key=name_of), name_of)]
    for group, members in [*groups, (ALL, records)] if len(groups) > 1 else groups:
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
