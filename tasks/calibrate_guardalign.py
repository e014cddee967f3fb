"""Stage calibrate_guardalign: concept bank, calibration suites -> a GuardAlign bundle of a model.

in   artifacts/CLIP/concept_bank/bundle, the CLIP, artifacts/data/calibration/*,
     artifacts/MODEL/adversarial, the model
out  artifacts/MODEL/guardalign/bundle/   concepts.safetensors, sweep.json (every variant that was
     tried, the rule, the prefix's share of the attention by layer in the requests that get it),
     card.json
     artifacts/guards/MODEL/   the same bundle, where what guards served models looks for it

Which patches are masked depends neither on the prefix nor on the fill, so every picture is looked
at once.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.judging import judge_at
from tasks.params import GUARDALIGN, Params
from tasks.stage import (
    GUARDS,
    bundle_folder,
    clip_folder,
    load_clip,
    load_model,
    main,
    read_json,
    spread,
    suite_file,
    suites_of,
)

_LOOKED_AT = 48
"""Requests that the prefix's share of the attention is averaged over, of those that get the prefix,
spread over the suites."""


def run(params: Params, model_name: str) -> Path:
    """Choose the variant on the calibration split, write the bundle."""
    from tqdm import tqdm

    from hauberk.bundle import binding_of
    from hauberk.concepts import ConceptBank
    from hauberk.data.samples import read_suite
    from hauberk.defenses.guardalign import GuardAlign
    from hauberk.defenses.patch_transport import PatchTransport, Remembering, setting_from
    from hauberk.defenses.prefix_attention import PrefixAttention
    from hauberk.evaluation.selection import measure, sweep
    from hauberk.files import file_hash, replacing

    told = params.guardalign
    model, processor = load_model(params, model_name)
    clip, images = load_clip(params, told.clip)
    bank_folder = clip_folder(told.clip, "bundle")
    bank = ConceptBank.load(bank_folder, clip, images)
    card = read_json(bank_folder / "card.json")
    setting = setting_from(card["parameters"]["transport"])
    transport = Remembering.of(PatchTransport(clip, images, bank, setting))
    suites = suites_of(model_name, told.calibrate_on)
    files = {suite: suite_file(model_name, "calibration", suite) for suite in suites}
    samples = [sample for file in files.values() for sample in read_suite(file)]
    settings = _settings(told.variants)
    bar = tqdm(total=2 + len(settings), desc=f"{model_name}: variants of {GUARDALIGN}")
    requests = [sample.request for sample in samples]
    judge = judge_at(params, "first")
    seen: dict[str, Any] = {
        fill: _Once.looking_at(transport.with_setting(fill=fill), requests)
        for fill in sorted({setting.fill for setting in settings})
    }
    bar.update()

    def measured(setting: Any) -> Any:
        defense, generation = None, params.evaluate
        if setting is not None:
            prefix = PrefixAttention(setting.prefix, processor)
            defense = GuardAlign(seen[setting.fill].gated(setting.gate), prefix)
        rates = measure(
            model,
            processor,
            samples,
            defense,
            judge,
            batch_size=generation.batch_size,
            max_new_tokens=generation.max_new_tokens,
        )
        bar.update()
        return rates

    result = sweep(settings, measured(None), measured)
    bar.close()
    setting, rates = result.tried[result.chosen]
    armoured = seen[setting.fill].gated(setting.gate).reached(requests)
    shares = _shares(model, processor, spread(armoured, _LOOKED_AT), setting.prefix)
    document = result.document() | {"shares": shares}
    guard = GuardAlign(
        transport.with_setting(gate=setting.gate, fill=setting.fill),
        PrefixAttention(setting.prefix, processor),
        bank_hash=card["card_sha256"],
    )
    folder = guard.save(
        bundle_folder(model_name, GUARDALIGN),
        binding_of(model, processor),
        data=[
            {"id": f"calibration/{suite}", "sha256": file_hash(file)}
            for suite, file in files.items()
        ],
        measurements={
            f"calibration_{metric}": rates.pooled()[metric]
            for metric in ("unsafe_rate", "accuracy", "over_refusal")
        },
        extra_files={"sweep.json": json.dumps(document, indent=1, sort_keys=True) + "\n"},
    )
    with replacing(GUARDS / model_name) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
    return folder


def _settings(variants: Any) -> list[Any]:
    from hauberk.defenses.prefix_attention import PrefixSetting
    from hauberk.evaluation.selection import GuardSetting

    settings = []
    for variant in variants:
        fields = asdict(variant)
        gate, fill = fields.pop("gate"), fields.pop("fill")
        fields["layers"] = None if variant.layers is None else tuple(variant.layers)
        settings.append(GuardSetting(PrefixSetting(**fields), gate, fill))
    return settings


class _Once:
    """A transport that has looked at some requests already; settings of it differ in the gate."""

    def __init__(self, transport: Any, masked: dict[Any, Any]) -> None:
        self.transport, self.opens_gate, self.masked = transport, transport.opens_gate, masked

    @classmethod
    def looking_at(cls, transport: Any, requests: list[Any]) -> "_Once":
        after = transport.rewrite_all(requests)
        return cls(transport, dict(zip(map(_key, requests), after, strict=True)))

    def gated(self, gate: str) -> "_Once":
        return _Once(self.transport.with_setting(gate=gate), self.masked)

    def rewrite_all(self, requests: list[Any]) -> list[Any]:
        after = [self.masked[_key(request)] for request in requests]
        return [
            request
            if all(new is old for new, old in zip(other.images, request.images, strict=True))
            else other
            for request, other in zip(requests, after, strict=True)
        ]

    def reached(self, requests: list[Any]) -> list[Any]:
        """The requests that the gate lets what else there is reach, as they are masked."""
        pairs = zip(requests, self.rewrite_all(requests), strict=True)
        return [after for before, after in pairs if self.opens_gate(before, after)]


def _key(request: Any) -> tuple[Any, ...]:
    return request.text, *map(id, request.images)


def _shares(model: Any, processor: Any, requests: list[Any], prefix: Any) -> list[dict[str, Any]]:
    """The share of the attention that lies on the prefix, by layer, with calibration and without.

    Both while the same answers are read, those of the prefix without calibration; means over
    requests, pictures masked, with intervals.  A layer without causal self-attention has none, and
    where fewer than two requests get the prefix no layer has.
    """
    from hauberk.defenses.prefix_attention import PrefixAttention, prefix_share
    from hauberk.requests import respond

    if len(requests) < 2:
        return []
    plain = PrefixAttention(prefix, processor).with_gamma(0.0)
    said = [answer.text for answer in respond(model, processor, requests, plain)]
    if prefix.placement == "answer":
        said = [text.removeprefix(prefix.text) for text in said]
    answers = [text or "." for text in said]
    shares = {
        name: prefix_share(model, processor, requests, each, answers=answers)
        for name, each in (("plain", plain), ("calibrated", plain.with_gamma(prefix.gamma)))
    }
    return [
        {"layer": layer}
        | {name: _estimated(found[:, layer].tolist()) for name, found in shares.items()}
        for layer in range(shares["plain"].shape[1])
    ]


def _estimated(shares: list[float]) -> dict[str, float] | None:
    from math import isnan

    from hauberk.evaluation.statistics import mean

    return None if any(map(isnan, shares)) else asdict(mean(shares))


if __name__ == "__main__":
    main("calibrate_guardalign", run, "model")
