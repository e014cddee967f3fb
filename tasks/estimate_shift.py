"""Stage estimate_shift: anchor and calibration suites -> a CMRM bundle of one model.

in   artifacts/data/anchor/*, artifacts/data/calibration/*, artifacts/MODEL/adversarial, the model
out  artifacts/MODEL/DEFENSE/bundle/   shift.safetensors (layers, hidden size) float32,
     sweep.json (every setting that was tried, the rule, displacement by layer), card.json
"""

import json
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from tasks.judging import judge_at
from tasks.params import Params, ShiftParams
from tasks.stage import bundle_folder, load_model, main, spread, suite_file, suites_of

_REMEMBERED = 2**30
"""Bytes of shifts of calibration prompts that are kept at most: 2,000 of a model of 7B."""
_DISPLACED = 48
"""Requests that the displacement by layer is averaged over, spread over the suites."""


def run(params: Params, model_name: str, defense_name: str) -> Path:
    """Fit the vectors, choose variant and alpha on calibration, write the bundle."""
    from tqdm import tqdm

    from hauberk.analysis.twins import TwinStates
    from hauberk.bundle import binding_of
    from hauberk.data.samples import read_suite
    from hauberk.defenses.shift import Shift, estimate_shift, sample_shifts
    from hauberk.errors import BadParams
    from hauberk.evaluation.selection import displacement_rows, measure, sweep
    from hauberk.requests import EncoderCache

    chosen = params.defenses.get(defense_name)
    if chosen is None:
        raise BadParams(
            f"defenses.{defense_name}: unknown; known are {', '.join(params.defenses)}."
        )
    model, processor = load_model(params, model_name)
    anchors = _read(read_suite, model_name, "anchor", chosen.anchors)
    chosen = replace(chosen, calibrate_on=suites_of(model_name, chosen.calibrate_on))
    calibration = _read(read_suite, model_name, "calibration", chosen.calibrate_on)
    generation = {
        "batch_size": params.evaluate.batch_size,
        "max_new_tokens": params.evaluate.max_new_tokens,
        "cache": EncoderCache(model, processor),
        "judge": judge_at(params, "first"),
    }
    settings = _settings(params, chosen)
    blanks = sorted({setting.blank for setting in settings})
    requests = [sample.request for sample in anchors]
    shifts = {blank: sample_shifts(model, processor, requests, blank=blank) for blank in blanks}

    @cache
    def twins(blank: str) -> TwinStates:
        return TwinStates(model, processor, blank, remember=_REMEMBERED)

    def defense_of(setting: Any) -> Shift:
        vectors = estimate_shift(shifts[setting.blank], setting.estimator)
        sampled = twins(setting.blank) if setting.level == "sample" else None
        return Shift(vectors, setting, processor, sampled)

    bar = tqdm(total=1 + len(settings), desc=f"{model_name}: settings of {defense_name}")

    def measured(defense: Shift | None) -> Any:
        rates = measure(model, processor, calibration, defense, **generation)
        bar.update()
        return rates

    result = sweep(settings, measured(None), lambda setting: measured(defense_of(setting)))
    bar.close()
    setting, rates = result.tried[result.chosen]
    defense = defense_of(setting)
    pictured = [sample.request for sample in calibration if sample.image is not None]
    displaced = spread(pictured, _DISPLACED)
    document = result.document() | {
        "layers": displacement_rows(model, processor, displaced, defense)
    }
    return defense.save(
        bundle_folder(model_name, defense_name),
        binding_of(model, processor),
        data=_data_of(model_name, chosen),
        measurements={
            f"calibration_{metric}": rates.pooled()[metric]
            for metric in ("unsafe_rate", "accuracy", "over_refusal")
        },
        extra_files={"sweep.json": json.dumps(document, indent=1, sort_keys=True) + "\n"},
    )


def _settings(params: Params, chosen: ShiftParams) -> list[Any]:
    from dataclasses import asdict

    from hauberk.defenses.shift import ShiftSetting

    alphas = chosen.alphas or params.budget.alphas
    settings = []
    for variant, alpha in product(chosen.variants, alphas):
        fields = asdict(variant)
        fields["layers"] = None if variant.layers is None else tuple(variant.layers)
        settings.append(ShiftSetting(**fields, alpha=alpha))
    return settings


def _read(read_suite: Any, model: str, split: str, suites: list[str]) -> list[Any]:
    return [sample for suite in suites for sample in read_suite(suite_file(model, split, suite))]


def _data_of(model: str, chosen: ShiftParams) -> list[dict[str, str]]:
    from hauberk.files import file_hash

    named = [
        *(("anchor", suite) for suite in chosen.anchors),
        *(("calibration", suite) for suite in chosen.calibrate_on),
    ]
    return [
        {"id": f"{split}/{suite}", "sha256": file_hash(suite_file(model, split, suite))}
        for split, suite in named
    ]


if __name__ == "__main__":
    main("estimate_shift", run, "model", "defense")
