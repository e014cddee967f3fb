"""Numbers as words: one way to write a rate, an interval, a change and a p-value."""

from collections.abc import Iterable

from tasks.report.comparison import Cell, Row, number

MISSING = "not measured"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NARROW NO-BREAK SPACE}"
BREAKLESS = "\N{NO-BREAK SPACE}"

SECONDS = ("seconds", "latency")
"""A metric whose name holds one of these is a time."""
SCALES = {"auroc": ".3f", "judge_kappa": ".2f", "mme_": ".0f"}
"""One that begins so is an area, an agreement beyond chance, or a sum of points; every other one is
a proportion."""


def is_time(metric: str) -> bool:
    """Whether a metric is measured in seconds rather than as a share of the samples."""
    return any(word in metric for word in SECONDS)


def amount(value: float | None, metric: str) -> str:
    """Write a measurement with its unit."""
    if value is None:
        return MISSING
    scale, form, unit = _written(metric)
    return f"{_signed(scale * value, form)}{unit}"


def interval(low: float | None, high: float | None, metric: str) -> str:
    """Write an interval without its unit, or nothing where there is none."""
    if low is None or high is None:
        return ""
    scale, form, _ = _written(metric)
    return f"{_signed(scale * low, form)}{BREAKLESS}to{BREAKLESS}{_signed(scale * high, form)}"


def change(value: float | None, metric: str) -> str:
    """Write a difference with its sign, in points for a share and in seconds for a time."""
    if value is None:
        return MISSING
    if is_time(metric):
        return f"{_signed(value, '+.3g')}{SPACE}s"
    return f"{_signed(100 * value, '+.1f')} points"


def p_value(value: float | None) -> str:
    """Write a p-value; below a thousandth its size means nothing."""
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def tested(row: Row) -> str:
    """Write the p-value of a paired difference, and the adjusted one where that is another."""
    plain, adjusted = number(row.get("p_value")), number(row.get("p_holm"))
    text = p_value(plain)
    if adjusted is None or p_value(adjusted) == text:
        return text
    return f"{text}, adjusted {p_value(adjusted).removeprefix('p ').removeprefix('= ')}"


def bounded(cell: Cell) -> str:
    """Write between what the value lies, whatever the answers were that no judge could tell."""
    return f"bounds {interval(*cell.bounds, cell.metric)}" if cell.bounds else ""


def full(cell: Cell) -> str:
    """Write a measurement with all that belongs to it: value, interval, n, and bounds."""
    text = amount(cell.value, cell.metric)
    bounds = interval(cell.low, cell.high, cell.metric)
    n = f"n{BREAKLESS}{cell.n}" if cell.n else ""
    inside = ", ".join(part for part in (bounds, n, bounded(cell)) if part)
    return f"{text} ({inside})" if inside else text


def change_line(row: Row) -> str:
    """Write a paired difference with its interval and its p-values."""
    metric = row["metric"]
    text = change(number(row["value"]), metric)
    bounds = interval(number(row.get("low")), number(row.get("high")), metric)
    parts = (f"{text} ({bounds})" if bounds else text, tested(row))
    return ", ".join(part for part in parts if part)


def change_parts(row: Row) -> list[str]:
    """Write a paired difference in short lines for the cell of a table."""
    metric = row["metric"]
    value = change(number(row["value"]), metric).removesuffix(" points")
    bounds = interval(number(row.get("low")), number(row.get("high")), metric)
    return [part for part in (f"{value} ({bounds})" if bounds else value, tested(row)) if part]


def listed(names: Iterable[str]) -> str:
    """Write names in a row: "a, b and c"."""
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _written(metric: str) -> tuple[int, str, str]:
    """How a metric is written: times what, with which digits, in which unit."""
    if is_time(metric):
        return 1, ".3g", f"{SPACE}s"
    form = next((form for start, form in SCALES.items() if metric.startswith(start)), None)
    return (100, ".1f", f"{SPACE}%") if form is None else (1, form, "")


def _signed(value: float, form: str) -> str:
    """Format with a real minus sign, and never as minus nothing."""
    text = format(value, form)
    if float(text) == 0:
        text = text.replace("-", "+" if form.startswith("+") else "")
    return text.replace("-", MINUS)
