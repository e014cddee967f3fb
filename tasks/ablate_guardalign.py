"""Stage ablate_guardalign: what each part of GuardAlign does alone, on some suites of a model.

in   artifacts/MODEL/guardalign/bundle, artifacts/CLIP/concept_bank/bundle, the CLIP,
     artifacts/data/test/*, artifacts/MODEL/adversarial, the model
out  artifacts/MODEL/guardalign/parts/   responses.jsonl, metrics.json, card.json

The rows are those of :data:`tasks.params.PARTS`.  Two of them are no parts: the literal reading of
the paper, and pictures of which everything is masked: no masking can hide more of them.  A part
acts on the requests that it acts on in the whole: where the gate keeps the prefix to requests of
which something is masked, the prefix alone goes to no other.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

from tasks.params import GUARDALIGN, PARTS, Params
from tasks.parts import measure_parts
from tasks.stage import (
    bundle_folder,
    clip_folder,
    load_model,
    main,
    parts_folder,
    read_json,
    tested_files,
    writing,
)


def run(params: Params, model_name: str) -> Path:
    """Answer and judge the first test samples of each suite under every part."""
    from hauberk.bundle import binding_of, versions
    from hauberk.data.samples import read_suite
    from hauberk.defenses import load
    from hauberk.defenses.patch_transport import Remembering

    told = params.guardalign
    model, processor = load_model(params, model_name)
    bundle = bundle_folder(model_name, GUARDALIGN)
    guard = load(bundle, model, processor)
    guard = guard.with_transport(Remembering.of(guard.transport))  # all parts see the same pictures
    bank = read_json(clip_folder(told.clip, "bundle") / "card.json")["parameters"]
    files = tested_files(model_name, told.parts_on)
    samples = [sample for file in files for sample in read_suite(file)[: params.budget.parts]]
    parts = parts_of(guard, bank["as_printed"]) if params.explains(model_name) else {}
    found = measure_parts(params, model_name, (model, processor), samples, parts)
    card = {
        "model": model_name,
        "binding": asdict(binding_of(model, processor)),
        "bundle": read_json(bundle / "card.json")["card_sha256"],
        "generation": params.evaluate.told,
        "versions": versions(),
        **found.card,
    }
    with writing(parts_folder(model_name), card) as partial:
        found.write(partial)
    return parts_folder(model_name)


def parts_of(guard: Any, as_printed: Mapping[str, Any]) -> dict[str, Any]:
    """Take a GuardAlign apart: name -> defense, those of :data:`tasks.params.PARTS`.

    ``as_printed`` is the printed score with the threshold that masks as much of harmless patches as
    ours does: the paper's 0.42 means something at one number of patches and categories alone.  With
    it goes the paper's prefix, calibrated by Eq. 14 as it is printed, for every request.
    """
    from hauberk.defenses.patch_transport import setting_from
    from hauberk.defenses.prefix_attention import PrefixAttention, PrefixSetting

    transport, prefix = guard.transport, guard.prefix
    literal = PrefixAttention(PrefixSetting(mode="literal"), prefix.processor)
    printed = setting_from(as_printed)  # with the paper's gate, which is always on
    made = {
        "transport_only": guard.with_prefix(None),
        "prefix_only": _PrefixAlone(guard.with_prefix(prefix.with_gamma(0.0))),
        "prefix_calibrated": _PrefixAlone(guard),
        "guardalign_literal": guard.with_prefix(literal).with_transport(
            transport.with_setting(**vars(printed))
        ),
        "all_masked": guard.with_prefix(None).with_transport(
            transport.with_setting(threshold=inf, max_share=1.0)
        ),
    }
    return {name: made[name] for name in PARTS}


class _PrefixAlone:
    """The prefix of a GuardAlign for the requests that get it there, with no picture masked."""

    method = GUARDALIGN

    def __init__(self, guard: Any) -> None:
        self.transport, self.prefix = guard.transport, guard.with_transport(None)

    def rewrite(self, request: Any) -> Any:
        return self.rewrite_all([request])[0]

    def rewrite_all(self, requests: Any) -> list[Any]:
        masked = self.transport.rewrite_all(requests)
        return [
            self.prefix.rewrite(before) if self.transport.opens_gate(before, after) else before
            for before, after in zip(requests, masked, strict=True)
        ]

    def applied(self, model: Any) -> AbstractContextManager[None]:
        return self.prefix.applied(model)


if __name__ == "__main__":
    main("ablate_guardalign", run, "model")
