"""Stage ablate_safety_prompt: what parts of DAVSP do alone, and DAVSP together with others.

in   artifacts/MODEL/davsp/bundle, artifacts/MODEL/guardalign/bundle, artifacts/MODEL/cmrm/bundle,
     the CLIP, artifacts/data/test/*, artifacts/MODEL/adversarial, the model
out  artifacts/MODEL/davsp/parts/   responses.jsonl, metrics.json, card.json

The rows are those of :data:`tasks.params.PROMPT_PARTS`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.params import DAVSP, GUARDALIGN, PROMPT_PARTS, Params
from tasks.parts import measure_parts
from tasks.stage import (
    bundle_folder,
    load_model,
    main,
    parts_folder,
    read_json,
    tested_files,
    writing,
)

CMRM = "cmrm"
"""The defense of params.yaml that DAVSP is stacked with."""


def run(params: Params, model_name: str) -> Path:
    """Answer and judge the first test samples of each suite under every part."""
    from hauberk.bundle import binding_of, versions
    from hauberk.data.samples import read_suite
    from hauberk.defenses import load

    model, processor = load_model(params, model_name)
    bundles = {name: bundle_folder(model_name, name) for name in (DAVSP, GUARDALIGN, CMRM)}
    loaded = {name: load(folder, model, processor) for name, folder in bundles.items()}
    files = tested_files(model_name, params.davsp.parts_on)
    samples = [sample for file in files for sample in read_suite(file)[: params.budget.parts]]
    parts = {}
    if params.explains(model_name):
        parts = parts_of(loaded[DAVSP], loaded[GUARDALIGN], loaded[CMRM])
    found = measure_parts(params, model_name, (model, processor), samples, parts)
    card = {
        "model": model_name,
        "binding": asdict(binding_of(model, processor)),
        "bundles": {
            name: read_json(folder / "card.json")["card_sha256"] for name, folder in bundles.items()
        },
        "generation": params.evaluate.told,
        "versions": versions(),
        **found.card,
    }
    folder = parts_folder(model_name, DAVSP)
    with writing(folder, card) as partial:
        found.write(partial)
    return folder


def parts_of(prompt: Any, guard: Any, shift: Any) -> dict[str, Any]:
    """Take DAVSP apart, and put it behind a mask and before a shift.

    A mask comes first, because a CLIP is to see the picture as it was sent; of GuardAlign the mask
    alone, since DAVSP has a prefix of its own.
    """
    from hauberk.defenses import Stack

    made = {
        "davsp_border_only": prompt.with_prefix(""),
        "guardalign+davsp": Stack([guard.with_prefix(None), prompt]),
        "davsp+cmrm": Stack([prompt, shift]),
    }
    if prompt.prefix:
        made["davsp_prefix_only"] = prompt.without_frame()
    return {name: made[name] for name in PROMPT_PARTS if name in made}


if __name__ == "__main__":
    main("ablate_safety_prompt", run, "model")
