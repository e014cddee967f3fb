"""Timing two ways of doing the same thing side by side."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """One line of the table.

    ``value`` is slow / fast for a speed-up (aim: at least) and ours / baseline for a cost (aim:
    at most, or none: then it is only told).
    """

    what: str
    baseline: str
    shape: str
    baseline_cost: float
    our_cost: float
    unit: str
    value: float
    aim: str
    met: bool | None
    """None where nothing is aimed at."""


def interleaved(ways: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Time each way ``repeats`` times in turn, after one warm-up; return the medians in seconds.

    In turn, so that what else the machine does falls on all of them alike.
    """
    for way in ways:
        way()
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for kept, way in zip(seconds, ways, strict=True):
            started = time.perf_counter()
            way()
            kept.append(time.perf_counter() - started)
    return [statistics.median(kept) for kept in seconds]


def speed_up(
    what: str, baseline: str, shape: str, slow: float, fast: float, at_least: float
) -> Ratio:
    """How many times faster ours is."""
    value = slow / fast
    aim = f">= {at_least:g}"
    return Ratio(what, baseline, shape, slow, fast, "s", value, aim, value >= at_least)


def cost(
    what: str,
    baseline: str,
    shape: str,
    plain: float,
    ours: float,
    at_most: float | None,
    unit: str = "s",
) -> Ratio:
    """How much more ours takes than doing without, or which part of a whole it is."""
    value = ours / plain
    aim = "none" if at_most is None else f"<= {at_most:g}"
    met = None if at_most is None else value <= at_most
    return Ratio(what, baseline, shape, plain, ours, unit, value, aim, met)
