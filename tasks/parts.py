"""Defenses that are measured on some suites alone, to explain another: one answer loop for all."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.params import Params


def measure_parts(
    params: Params,
    model_name: str,
    loaded: tuple[Any, Any],
    samples: Sequence[Any],
    parts: Mapping[str, Any],
) -> tuple[list[Any], list[Any]]:
    """Answer and judge samples under every part; return records and rows of metrics."""
    from tqdm import tqdm

    from hauberk.evaluation.metrics import metric_rows
    from hauberk.evaluation.run import judge_response
    from hauberk.requests import respond

    records, rows = [], []
    requests = [sample.request for sample in samples]
    for name, part in tqdm(parts.items(), desc=f"{model_name}: parts"):
        responses = respond(
            *loaded,
            requests,
            part,
            max_new_tokens=params.evaluate.max_new_tokens,
            batch_size=params.evaluate.batch_size,
        )
        judged = [
            judge_response(sample, response, model=model_name, defense=name)
            for sample, response in zip(samples, responses, strict=True)
        ]
        records += judged
        rows += metric_rows(judged)
    return records, rows
