"""Defenses that are measured on some suites alone, to explain another: one answer loop for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.judging import check_keys, judged
from tasks.params import Params
from tasks.stage import spread, write_json


@dataclass(frozen=True)
class Parts:
    """What some parts answered."""

    records: list[Any] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    """Of metrics.json."""
    checked_alone: int = 0
    """Answers of every part that were generated again with batch size 1."""
    differing_alone: dict[str, list[str]] = field(default_factory=dict)
    """By part: the samples whose answer was another one then."""

    @property
    def card(self) -> dict[str, Any]:
        """What a card says of them."""
        return {
            "parts": list(self.differing_alone),
            "responses": len(self.records),
            "checked_alone": self.checked_alone,
            "differing_alone": self.differing_alone,
        }

    def write(self, folder: Path) -> None:
        """Write responses.jsonl and metrics.json."""
        from hauberk.evaluation.run import write_records

        write_records(self.records, folder / "responses.jsonl")
        write_json(self.rows, folder / "metrics.json")


def measure_parts(
    params: Params,
    model_name: str,
    loaded: tuple[Any, Any],
    samples: Sequence[Any],
    parts: Mapping[str, Any],
) -> Parts:
    """Answer and judge samples under every part, and some of them again alone."""
    from tqdm import tqdm

    from hauberk.evaluation.metrics import metric_rows
    from hauberk.evaluation.run import differing_alone, judge_response
    from hauberk.requests import respond

    check_keys(params)
    limit = params.evaluate.max_new_tokens
    again = spread(samples, max(1, params.evaluate.checked_alone // max(1, len(parts))))
    found = Parts(checked_alone=len(again))
    requests = [sample.request for sample in samples]
    runs: dict[str, list[Any]] = {}
    for name, part in tqdm(parts.items(), desc=f"{model_name}: parts"):
        responses = respond(
            *loaded, requests, part, max_new_tokens=limit, batch_size=params.evaluate.batch_size
        )
        runs[name] = [
            judge_response(sample, response, model=model_name, defense=name)
            for sample, response in zip(samples, responses, strict=True)
        ]
        found.differing_alone[name] = differing_alone(
            *loaded, again, runs[name], part, max_new_tokens=limit
        )
    for records in judged(params, runs, samples).values():
        found.records.extend(records)
        found.rows.extend(metric_rows(records))
    return found
