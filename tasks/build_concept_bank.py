"""Stage build_concept_bank: concepts in words -> features of a CLIP, with its threshold.

in   the CLIP; for the threshold harmless pictures: of the lab's calibration pools, or for concepts
     of the real world a folder of the user's own
out  artifacts/CLIP/concept_bank/bundle/   concepts.safetensors, (C, N, d) and (R, N, d) float32;
     card.json with names, templates, and the setting of the transport and of the printed one on the
     same patches, each with its threshold
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from tasks.params import BankParams, Params
from tasks.stage import clip_folder, load_clip, main

_READ = 16
"""Pictures of the user's that are in memory together."""


@dataclass(frozen=True)
class Scored:
    """The patches of harmless pictures."""

    scores: Mapping[str, Any]
    """By setting, (pictures, M)."""
    harmless: Any
    """Which patches are, bool (pictures, M): some harmless requests show something toxic."""
    said: Mapping[str, Any]
    """What the card says of the pictures."""
    data: list[dict[str, str]] = field(default_factory=list)


def run(params: Params, clip_name: str) -> Path:
    """Encode the concepts, set the thresholds, write the bundle."""
    from hauberk.bundle import binding_of
    from hauberk.concepts import build_bank
    from hauberk.data.concepts import REAL, lab_concepts
    from hauberk.defenses.patch_transport import (
        AS_PRINTED,
        PatchTransport,
        TransportSetting,
        calibrate_threshold,
        plain,
    )
    from hauberk.errors import BadParams

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
    ours = TransportSetting(**{**asdict(told.transport), "scales": tuple(told.transport.scales)})
    printed = replace(AS_PRINTED, grid=ours.grid, fill=ours.fill)
    settings = {"transport": ours, "as_printed": printed}
    detector = PatchTransport(clip, processor, bank, ours)
    scored = _own(told, detector, settings) if told.benign_pictures else _drawn(
        params.seed, told, detector, settings
    )  # fmt: skip
    tuned: dict[str, Any] = {}
    masked: dict[str, float] = {}
    for name, setting in settings.items():
        scores = scored.scores[name]
        threshold = calibrate_threshold(scores[scored.harmless], told.masked_share)
        if threshold == -inf:
            raise BadParams(
                f"concept_banks.{clip_name}: of {len(scores)} harmless pictures no threshold masks "
                f"a patch and at most {told.masked_share:g} of the harmless ones; give more "
                "pictures or a larger masked_share."
            )
        at_it = detector.with_setting(**{**vars(setting), "threshold": threshold})
        chosen, _ = at_it.chosen(scores)
        tuned[name] = plain(at_it.setting)
        masked[f"calibration_masked_{name}"] = float(chosen[scored.harmless].double().mean())
    return bank.save(
        clip_folder(clip_name, "bundle"),
        binding_of(clip, processor),
        data=scored.data,
        parameters=tuned | {"calibrated_on": {**scored.said, "masked_share": told.masked_share}},
        measurements=masked,
    )


def _drawn(seed: int, told: BankParams, detector: Any, settings: Mapping[str, Any]) -> Scored:
    """Score scenes of the lab, where it is known which patches are harmless."""
    import torch

    from hauberk.data.lab import REVISION
    from hauberk.evaluation.detection import BENIGN, benign_subjects, labels_of

    assert told.benign_scenes is not None  # checked with the other parameters
    subjects = benign_subjects(pool="calibration", size=told.benign_scenes, seed=seed)
    labels = [labels_of(subject, detector.setting.grid).tolist() for subject in subjects]
    said = {
        "pool": "calibration",
        "suites": list(BENIGN),
        "scenes": len(subjects),
        "seed": seed,
        "revision": REVISION,
    }
    scores = _scores(detector, settings, [subject.picture for subject in subjects])
    return Scored(scores, torch.tensor(labels) == 0, said)


def _own(told: BankParams, detector: Any, settings: Mapping[str, Any]) -> Scored:
    """Score the user's pictures, of which every patch is harmless."""
    import torch

    from hauberk.data.pictures import folder_hash, picture_files, read_picture

    assert told.benign_pictures is not None
    folder = Path(told.benign_pictures)
    files = picture_files(folder)
    parts = [
        _scores(detector, settings, [read_picture(file) for file in files[start : start + _READ]])
        for start in range(0, len(files), _READ)
    ]
    scores = {name: torch.cat([part[name] for part in parts]) for name in settings}
    every = torch.ones_like(scores["transport"], dtype=torch.bool)
    data = [{"id": told.benign_pictures, "sha256": folder_hash(folder, files)}]
    said = {"folder": told.benign_pictures, "pictures": len(files)}
    return Scored(scores, every, said, data)


def _scores(detector: Any, settings: Mapping[str, Any], pictures: list[Any]) -> dict[str, Any]:
    """Score pictures under every setting; each is looked at once, and forgotten after it."""
    from hauberk.defenses.patch_transport import Remembering

    looked = Remembering.of(detector)
    return {
        name: looked.with_setting(**vars(setting)).scores(pictures).cpu()
        for name, setting in settings.items()
    }


if __name__ == "__main__":
    main("build_concept_bank", run, "clip")
