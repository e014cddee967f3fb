"""Stage measure_detection: how well a concept bank finds what is unsafe in pictures.

in   artifacts/CLIP/concept_bank/bundle, the CLIP; scenes of the lab's test pools, where the places
     of toxic things and words are known, and of its calibration pools for the sweep
out  artifacts/CLIP/concept_bank/evaluation/   metrics.json, detection.json (scores of patches that
     hold something toxic and of others, examples), grids.json (a sweep over the number of patches
     and over readings of the transport), card.json; for concepts of the real world nothing is
     measured, and detection.json says why
"""

from base64 import b64encode
from io import BytesIO
from math import inf
from pathlib import Path
from typing import Any

from tasks.params import Params
from tasks.stage import BANK, clip_folder, load_clip, main, read_json, write_json, writing

_EXAMPLES = ("image_clutter", "image", "sd_typo", "typographic")
"""Suites of which pictures are shown, two of each: the first ones, so that nobody chose them."""
NOT_MEASURED = "needs pictures whose unsafe places are known, as in the lab"


def run(params: Params, clip_name: str) -> Path:
    """Rank and mask the patches of test scenes; write rows, scores and examples."""
    from dataclasses import asdict, replace

    from hauberk.concepts import ConceptBank
    from hauberk.defenses.patch_transport import PatchTransport, Remembering, setting_from
    from hauberk.errors import BadParams
    from hauberk.evaluation.detection import (
        RANKED,
        Scenes,
        benign_subjects,
        detection_table,
        scores_by_truth,
        sweep_grids,
    )

    folder = clip_folder(clip_name, "evaluation")
    if params.concept_banks[clip_name].concepts != "lab":
        with writing(folder, {"clip": clip_name}) as partial:
            for name in ("metrics", "grids"):
                write_json([], partial / f"{name}.json")
            write_json({"not_measured": NOT_MEASURED}, partial / "detection.json")
        return folder
    clip, processor = load_clip(params, clip_name)
    bundle = clip_folder(clip_name, "bundle")
    bank = ConceptBank.load(bundle, clip, processor)
    told = read_json(bundle / "card.json")
    setting = setting_from(told["parameters"]["transport"])
    detector = Remembering.of(PatchTransport(clip, processor, bank, setting))
    scenes = Scenes.drawn(pool="test", size=params.budget.detection, seed=params.seed)
    rows = []
    for name, estimate in detection_table(detector, scenes).items():
        metric, _, suite = name.partition("@")
        of = {"model": clip_name, "defense": BANK, "suite": suite or RANKED, "metric": metric}
        rows.append({**of, **asdict(estimate)})
    grids, share = params.budget.grids, params.concept_banks[clip_name].masked_share
    few = {"pool": "calibration", "seed": params.seed}  # of which a setting may be chosen
    drawn = replace(
        Scenes.drawn(**few, size=grids.pictures),
        benign=benign_subjects(**few, size=4 * grids.pictures),
    )
    swept = sweep_grids(detector, grids.sides, drawn, share)
    if any(row.threshold == -inf for row in swept):
        raise BadParams(
            f"profiles.{params.profile}.grids.pictures: {grids.pictures} are wrong: of four times "
            f"as many no threshold masks a patch and at most {share:g} of the harmless ones; give "
            "more."
        )
    found = {
        "threshold": setting.threshold,
        "grid": setting.grid,
        "scores": scores_by_truth(detector, scenes),
        "examples": [
            {"suite": suite, **_example(detector, subject)}
            for suite in _EXAMPLES
            for subject in scenes.harmful[suite][:2]
        ],
    }
    card = {
        "clip": clip_name,
        "bank": told["card_sha256"],
        "pool": "test",
        "pictures": params.budget.detection,
        "seed": params.seed,
        "grids": {"pool": "calibration", **asdict(grids)},
    }
    with writing(folder, card) as partial:
        write_json(rows, partial / "metrics.json")
        write_json(found, partial / "detection.json")
        write_json([asdict(row) for row in swept], partial / "grids.json")
    return folder


def _example(detector: Any, subject: Any) -> dict[str, Any]:
    """A picture, the scores of its patches, what they hold, and the picture as it is masked."""
    from hauberk.evaluation.detection import labels_of

    picture = subject.picture
    masked = detector.masked([picture])
    return {
        "picture": _png(picture),
        "masked": _png(masked.images[0]),
        "scores": detector.scores([picture])[0].tolist(),
        "hidden": masked.patches[0].tolist(),
        "labels": labels_of(subject, detector.setting.grid).tolist(),
    }


def _png(picture: Any) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main("measure_detection", run, "clip")
