"""Timing two ways of doing the same thing side by side."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


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


def flops(step: Callable[[], object]) -> float:
    """Count what is multiplied and added in a step, each attention as two products of matrices.

    The scores that the kernel computes anew on its way back are not counted.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        return 2 * int(sdpa_flop_count(query, key, value))

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {on_cpu: forward, back_on_cpu: backward}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        step()
    return float(counter.get_total_flops())
