"""Stage prepare_data: the lab's world -> suites in the normal form.

in   nothing but parameters
out  artifacts/data/SPLIT/SUITE.parquet   test for every suite; anchor, train and calibration where
     a defense is fitted, trained or calibrated on it; anchor where the gap is analysed on it; test
     and calibration where pictures are attacked
     artifacts/data/card.json             sizes and hashes
"""

from collections.abc import Iterable
from pathlib import Path

from tasks.params import Params
from tasks.stage import DATA, GAP_SUITES, main, writing


def run(params: Params) -> Path:
    """Draw and write the suites; return the folder."""
    from tqdm import tqdm

    from hauberk.data.lab import REVISION, build_suite
    from hauberk.data.samples import write_suite

    wanted = _wanted(params)
    rows: dict[str, int] = {}
    card = {"source": "hauberk-lab", "revision": REVISION, "seed": params.seed, "rows": rows}
    with writing(DATA, card) as folder:
        for split, suite, size in tqdm(wanted, "drawing suites"):
            (folder / split).mkdir(exist_ok=True)
            samples = build_suite(suite, split, size, params.seed)
            rows[f"{split}/{suite}"] = len(samples)
            write_suite(samples, folder / split / f"{suite}.parquet")
    return DATA


def _wanted(params: Params) -> list[tuple[str, str, int]]:
    from hauberk.data.lab import ATTACKED

    sizes = params.budget.data
    anchors = {suite for defense in params.defenses.values() for suite in defense.anchors}
    anchors.update(GAP_SUITES)
    calibration = {s for defense in params.defenses.values() for s in defense.calibrate_on}
    calibration.update(
        params.guardalign.calibrate_on, params.davsp.validate_on, params.tga.validate_on
    )
    anchors.update(params.davsp.harm.harmful, params.davsp.harm.harmless)
    framed = {*params.davsp.harmful, *params.davsp.harmless}
    projected = {*params.tga.aligned, *params.tga.answered, *params.tga.index.snippets}
    gated = {rule["suite"] for rule in params.gate}
    budget = params.budget
    trained = dict.fromkeys(framed, budget.frame.samples)
    for suite in projected:
        trained[suite] = max(trained.get(suite, 0), budget.projector.samples)

    def drawn(suites: Iterable[str]) -> list[str]:
        return sorted({*suites, *ATTACKED.values()} - ATTACKED.keys())

    return [
        *(
            ("test", suite, (suite in gated and sizes.gated) or sizes.samples)
            for suite in drawn(params.suites)
        ),
        *(("calibration", suite, sizes.calibration) for suite in drawn(calibration)),
        *(("anchor", suite, sizes.anchor) for suite in sorted(anchors)),
        *(("train", suite, trained[suite]) for suite in sorted(trained)),
    ]


if __name__ == "__main__":
    main("prepare_data", run)
