"""What the report is made of: the rows that the stages wrote, and a way to find one of them."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hauberk import UNDEFENDED
from hauberk.data.lab import ATTACKED, SUITES
from hauberk.evaluation.judges import ENDS
from tasks.params import is_part
from tasks.report.channels import ALL, CHANNELS, channel_of, pooled, suite_order

Row = Mapping[str, Any]
"""One object of a JSON file, as it was written."""


_HARMLESS = ("accuracy", "over_refusal")
"""What harmless requests pay."""


@dataclass(frozen=True)
class Cell:
    """One measurement and how far it lies from the undefended one."""

    suite: str
    """Or the channel, all of its suites together."""
    metric: str
    value: float | None
    """None where nothing was measured."""
    n: int | None
    low: float | None
    high: float | None
    bounds: tuple[float, float] | None = None
    """What the value would be had all that no judge could tell gone one way, or the other; None
    where a judge could tell everything."""
    change: Row | None = None
    """The row of differences.json, paired by sample."""


@dataclass(frozen=True)
class Deciding:
    """The suites between which the gap lies."""

    attack: str = "text_image"
    """Harmful words beside a picture."""
    words: str | None = "text"
    """Harmful words alone; None where there are none."""


@dataclass(frozen=True)
class Comparison:
    """Everything that the page shows; more models, defenses and suites are only more rows."""

    metrics: Sequence[Row]
    """Rows of metrics.json of every run."""
    differences: Sequence[Row] = ()
    """Rows of differences.json."""
    forms: Sequence[Row] = ()
    """Rows of forms.json."""
    agreement: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    """Those of agreement.json: the two judges by `suites`, by `channels`, and their `confusion`."""
    sweeps: Mapping[tuple[str, str], Row] = field(default_factory=dict)
    """(model, defense) -> its sweep.json; only where a setting was chosen by a sweep."""
    responses: Sequence[Row] = ()
    """Lines of responses.jsonl of every run, each with what the record says of it: `unsafe`,
    `unjudged`, `degenerate`, and with the `scenario` of its sample, where that is known."""
    images: Mapping[str, bytes] = field(default_factory=dict)
    """sample_id -> PNG, JPEG or WebP bytes; only samples with a picture."""
    deciding: Deciding = Deciding()
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Model -> the defense that is put forward for it."""
    detection: Mapping[str, Row] = field(default_factory=dict)
    """CLIP -> its detection.json, and under `rows` its metrics.json."""
    frames: Mapping[str, Row] = field(default_factory=dict)
    """Model -> its training.json, and in base64 PNGs of its `frame` and of an `example` in it."""
    projectors: Mapping[str, Row] = field(default_factory=dict)
    """Model -> its training.json, and under `variants` what each training beside it measured."""
    gaps: Mapping[str, Row] = field(default_factory=dict)
    """Model -> its gap.json, and under `plots` the SVG of each of its plots."""
    served: Mapping[str, Mapping[str, Row]] = field(default_factory=dict)
    """Model that others serve -> its defenses, each with the card of its evaluation."""
    layers: Mapping[str, Row] = field(default_factory=dict)
    """Model -> its layers.json."""
    context: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Title -> names and values for the foot of the page: parameters, versions, hashes."""

    @cached_property
    def models(self) -> list[str]:
        """The models in order of appearance."""
        return _unique(row["model"] for row in self.metrics)

    @cached_property
    def hedged(self) -> set[str]:
        """Suites of requests to hedge, which are neither attacks nor harmless."""
        return {row["suite"] for row in self.responses if row["expected"] == "hedge"}

    def defenses(self, model: str, *, parts: bool = False) -> list[str]:
        """Undefended first, then the defense put forward, then the others as they appear.

        The parts of a defense are measured to explain it, so only what asks for them gets them.
        """
        rows = (row for row in self.metrics if row["model"] == model and row["defense"] != ALL)
        names = _unique(row["defense"] for row in rows)
        first = (UNDEFENDED, self.chosen.get(model))
        parts = parts or model in self.served  # where nothing is taken apart
        whole = [name for name in names if parts or not is_part(name)]
        return sorted(whole, key=lambda name: first.index(name) if name in first else len(first))

    def suites(self, model: str, metric: str | None = None) -> list[str]:
        """Return the suites of a model, all or those with a metric, in their fixed order."""
        names = _unique(
            row["suite"]
            for row in self.metrics
            if row["model"] == model and row["suite"] != ALL and metric in (None, row["metric"])
        )
        return sorted(names, key=self.order)

    def channel_of(self, suite: str) -> str:
        """Where the harm enters in the samples of a suite."""
        return channel_of(suite, self._told)

    def order(self, suite: str) -> tuple[int, int, str]:
        """Sort key of suites: by channel first."""
        return suite_order(suite, self._told)

    def columns(
        self, attacks: Sequence[str], costs: Sequence[tuple[str, str]], parts: Collection[str]
    ) -> tuple[list[str], list[tuple[str, str]]]:
        """Choose what the table of the parts of a defense shows.

        Of the lab the named suites of attacks, and the named suites and metrics of harmless
        requests; of data sets all that the parts were measured on.
        """
        measured = {(r["suite"], r["metric"]) for r in self.metrics if r["defense"] in parts}
        others = sorted({suite for suite, _ in measured} - SUITES.keys(), key=self.order)
        if {*others} <= ATTACKED.keys():
            return list(attacks), list(costs)
        of_lab = any((suite, "unsafe_rate") in measured for suite in attacks)
        return (
            [*(attacks if of_lab else ()), *(s for s in others if (s, "unsafe_rate") in measured)],
            [
                *(costs if of_lab else ()),
                *((s, m) for s in others for m in _HARMLESS if (s, m) in measured),
            ],
        )

    def channels(self, metric: str) -> list[str]:
        """Return the channels with a metric, in their fixed order."""
        names = {row["channel"] for row in self.pooled if row["metric"] == metric}
        return [channel for channel in CHANNELS if channel in names]

    @cached_property
    def pooled(self) -> list[dict[str, Any]]:
        """The rows of channels.json: all suites of a channel together, but those to hedge."""
        rows = [row for row in self.metrics if row["suite"] not in self.hedged]
        return pooled(rows, self._told)

    def cell(self, model: str, defense: str, suite: str, metric: str) -> Cell | None:
        """Find a measurement, or None where no row says anything about it."""
        cell = self._cell(self._by_key, model, defense, suite, metric)
        change = self._changes.get((model, defense, suite, metric))
        return replace(cell, change=change) if cell else None

    def channel(self, model: str, defense: str, channel: str, metric: str) -> Cell | None:
        """Find a measurement of all suites of a channel together."""
        return self._cell(self._by_channel, model, defense, channel, metric)

    @staticmethod
    def _cell(rows: Mapping[tuple[str, ...], Row], *key: str) -> Cell | None:
        if (row := rows.get(key)) is None:
            return None
        value = number(row["value"])
        others = (rows.get((*key[:3], key[3] + end)) for end in ENDS)
        lower, upper = (value if other is None else number(other["value"]) for other in others)
        return Cell(
            suite=key[2],
            metric=key[3],
            value=value,
            n=row.get("n"),
            low=number(row.get("low")),
            high=number(row.get("high")),
            bounds=None if lower is None or upper is None or lower == upper else (lower, upper),
        )

    def utility(
        self, model: str, defense: str, among: Collection[str] | None = None
    ) -> Cell | None:
        """How many benign questions with an image are answered right: what a defense costs.

        ``among`` names suites that may be taken; None for all of them.
        """
        suites = self.suites(model, "accuracy")
        benign = [suite for suite in suites if self.channel_of(suite) == "benign"]
        preferred = ("benign_image", "benign_text", *benign)
        return self._first(model, defense, "accuracy", preferred, among)

    def over_refusal(self, model: str, defense: str) -> Cell | None:
        """How many harmless questions are refused, on the ones that look harmful if there are."""
        suites = self.suites(model, "over_refusal")
        alike = [suite for suite in suites if self.channel_of(suite) == "lookalike"]
        preferred = ("lookalike", "benign_image", *alike)
        return self._first(model, defense, "over_refusal", preferred)

    def response(self, model: str, defense: str, sample: Row) -> Row | None:
        """Find what was answered to the sample of another answer."""
        return self._answers.get((model, defense, sample["sample_id"]))

    def _first(
        self,
        model: str,
        defense: str,
        metric: str,
        preferred: Sequence[str],
        among: Collection[str] | None = None,
    ) -> Cell | None:
        suites = [s for s in self.suites(model, metric) if among is None or s in among]
        for suite in [*(name for name in preferred if name in suites), *suites]:
            cell = self.cell(model, defense, suite, metric)
            if cell is not None:
                return cell
        return None

    @cached_property
    def _told(self) -> dict[str, str]:
        """The channel of every suite that is not the lab's, as its samples tell it."""
        rows = (row for row in self.responses if "channel" in row)
        return {row["suite"]: row["channel"] for row in rows if row["suite"] not in SUITES}

    @cached_property
    def _by_key(self) -> dict[tuple[str, ...], Row]:
        return _index(self.metrics, ("model", "defense", "suite", "metric"), "metrics")

    @cached_property
    def _by_channel(self) -> dict[tuple[str, ...], Row]:
        return _index(self.pooled, ("model", "defense", "channel", "metric"), "channels")

    @cached_property
    def _changes(self) -> dict[tuple[str, ...], Row]:
        return _index(self.differences, ("model", "defense", "suite", "metric"), "differences")

    @cached_property
    def _answers(self) -> dict[tuple[str, ...], Row]:
        return _index(self.responses, ("model", "defense", "sample_id"), "responses")


def number(value: float | None) -> float | None:
    """Read a number of a JSON file; null and NaN both mean that nothing was measured."""
    return None if value is None or math.isnan(value) else float(value)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _index(rows: Sequence[Row], names: Sequence[str], what: str) -> dict[tuple[str, ...], Row]:
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        if key in found:
            raise ValueError(
                f"{what} hold two rows for {key}; one row a measurement is right: "
                "remove the duplicate before the report is rendered."
            )
        found[key] = row
    return found
