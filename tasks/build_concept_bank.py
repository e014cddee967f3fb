"""Stage build_concept_bank: concepts in words -> features of a CLIP, with its threshold.

in   the CLIP; for the threshold harmless pictures of the lab's calibration pools
out  artifacts/CLIP/concept_bank/bundle/   concepts.safetensors, (C, N, d) and (R, N, d) float32;
     card.json with names, templates, and the setting of the transport and of the printed one on the
     same patches, each with its threshold
"""

from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

from tasks.params import Params
from tasks.stage import clip_folder, load_clip, main


def run(params: Params, clip_name: str) -> Path:
    """Encode the concepts, set the thresholds, write the bundle."""
    from hauberk.bundle import binding_of
    from hauberk.concepts import build_bank
    from hauberk.data.concepts import REAL, lab_concepts
    from hauberk.data.lab import REVISION
    from hauberk.defenses.patch_transport import (
        AS_PRINTED,
        PatchTransport,
        Remembering,
        TransportSetting,
        plain,
    )
    from hauberk.errors import BadParams
    from hauberk.evaluation.detection import BENIGN, benign_subjects, calibrated, masked_share

    clip, processor = load_clip(params, clip_name)
    told = params.concept_banks[clip_name]
    concepts = lab_concepts() if told.concepts == "lab" else REAL
    bank = build_bank(
        clip,
        processor,
        categories=concepts.categories,
        templates=concepts.templates,
        reference=concepts.reference,
    )
    benign = benign_subjects(pool="calibration", size=told.benign_scenes, seed=params.seed)
    ours = TransportSetting(**{**asdict(told.transport), "scales": tuple(told.transport.scales)})
    settings: dict[str, Any] = {}
    masked: dict[str, float] = {}
    printed = replace(AS_PRINTED, grid=ours.grid, fill=ours.fill)
    detector = Remembering.of(PatchTransport(clip, processor, bank, ours))
    for name, setting in {"transport": ours, "as_printed": printed}.items():
        untuned = detector.with_setting(**vars(setting))
        tuned = calibrated(untuned, benign, told.masked_share)
        if tuned.setting.threshold == -inf:
            raise BadParams(
                f"concept_banks.{clip_name}: of {told.benign_scenes} benign_scenes no threshold "
                f"masks a patch and at most {told.masked_share:g} of the harmless ones; give more "
                "scenes or a larger masked_share."
            )
        settings[name] = plain(tuned.setting)
        masked[f"calibration_masked_{name}"] = masked_share(tuned, benign)
    return bank.save(
        clip_folder(clip_name, "bundle"),
        binding_of(clip, processor),
        parameters=settings
        | {
            "calibrated_on": {
                "pool": "calibration",
                "suites": list(BENIGN),
                "scenes": len(benign),
                "seed": params.seed,
                "revision": REVISION,
                "masked_share": told.masked_share,
            }
        },
        measurements=masked,
    )


if __name__ == "__main__":
    main("build_concept_bank", run, "clip")
