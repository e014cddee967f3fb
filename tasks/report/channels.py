"""Where the harm enters: the channels, the suites of each, and all of its samples together."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

from hauberk.data.lab import SUITES
from hauberk.data.samples import Channel

CHANNELS: tuple[str, ...] = (*get_args(Channel), "other")
"""In the order in which they are shown."""
ALL = "all"
"""Stands for a suite where something is measured of all of them together."""
_SUITES = list(SUITES)
_NOTHING: Mapping[str, str] = MappingProxyType({})
Rows = Sequence[Mapping[str, Any]]


def channel_of(suite: str, told: Mapping[str, str] = _NOTHING) -> str:
    """Return the channel of a suite: as it is ``told``, as the lab draws it, or other.

    One that is made by an attack has its channel's name.
    """
    if suite in told:
        return told[suite]
    if suite in SUITES:
        return SUITES[suite].channel
    return suite if suite in CHANNELS else "other"


def mirrors(suite: str) -> str:
    """Name the benchmark that a suite mirrors; nothing where none is known."""
    return SUITES[suite].mirrors if suite in SUITES else ""


def suite_order(suite: str, told: Mapping[str, str] = _NOTHING) -> tuple[int, int, str]:
    """Sort key: by channel, then as the suites were defined, then by name."""
    place = _SUITES.index(suite) if suite in SUITES else len(_SUITES)
    return (CHANNELS.index(channel_of(suite, told)), place, suite)


def pooled(rows: Rows, told: Mapping[str, str] = _NOTHING) -> list[dict[str, Any]]:
    """Measure channels: a row for every model, defense, channel and metric.

    Every sample of a channel counts the same, whatever its suite; a share carries the Wilson
    interval of all of them, a time is the mean over answers.  Rows without a value are left out,
    and so are a corrected rate and a score of a whole suite, which are no counts of samples, and
    what is of all suites.
    """
    from hauberk.evaluation.metrics import KEYWORD_CORRECTED, LABELLED
    from hauberk.evaluation.statistics import wilson
    from hauberk.evaluation.utility import TOGETHER

    members: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: suite_order(row["suite"], told)):
        value, n = row["value"], row.get("n")
        metric = row["metric"]
        if row["suite"] == ALL or metric in (KEYWORD_CORRECTED, *TOGETHER):
            continue
        if metric.endswith(LABELLED):
            continue
        if value is not None and value == value and n:
            key = (row["model"], row["defense"], channel_of(row["suite"], told), row["metric"])
            members.setdefault(key, []).append(row)
    found = []
    for (model, defense, channel, metric), parts in members.items():
        n = sum(row["n"] for row in parts)
        total = sum(row["value"] * row["n"] for row in parts)
        counted = all(row.get("low") is not None for row in parts)
        low, high = wilson(round(total), n) if counted else (None, None)
        found.append(
            {
                "model": model, "defense": defense, "channel": channel, "metric": metric,
                "value": total / n, "n": n, "low": low, "high": high,
                "suites": [row["suite"] for row in parts],
            }
        )  # fmt: skip
    return found
