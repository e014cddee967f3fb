"""Stage attack: the pictures of a suite, changed so that one undefended model complies.

in   artifacts/data/calibration/*, artifacts/data/test/*, the model
out  artifacts/MODEL/adversarial/   calibration.parquet, test.parquet, card.json (how often and by
     how much it worked; of a model whose pictures have no gradient it says so, and there are none)
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.params import Params
from tasks.stage import NOT_ATTACKED, attacked_folder, load_model, main, suite_file, writing

if TYPE_CHECKING:
    from hauberk.attacks.pgd import Attacked
    from hauberk.data.samples import Sample

SUITE = "adversarial"


def run(params: Params, model_name: str) -> Path:
    """Attack the pictures of both splits; write them as a suite of the model."""
    from tqdm import tqdm

    from hauberk.attacks.pgd import Pgd, attack
    from hauberk.bundle import binding_of, versions
    from hauberk.data.samples import read_suite, write_suite
    from hauberk.errors import UnknownFamily
    from hauberk.pixels import as_fed, layout_of

    model, processor = load_model(params, model_name)
    budget = params.budget.attack
    told = params.attack
    setting = Pgd(
        told.epsilon,
        told.step_size,
        budget.steps,
        told.tokens,
        told.confidence,
        params.seed,
    )
    clean = {
        split: read_suite(suite_file(model_name, split, told.suite))[:size]
        for split, size in (("calibration", budget.calibration), ("test", budget.samples))
        if size
    }
    splits: dict[str, Any] = {}
    card = {
        "model": model_name,
        "binding": asdict(binding_of(model, processor)),
        "setting": asdict(setting),
        "versions": versions(),
        "splits": splits,
    }
    folder = attacked_folder(model_name, SUITE)
    try:
        layout_of(type(processor.image_processor).__name__)
    except UnknownFamily as error:
        with writing(folder, card | {NOT_ATTACKED: str(error)}):
            print(f"{model_name}: not attacked: {error}", file=sys.stderr)
        return folder
    bar = tqdm(total=sum(map(len, clean.values())), desc=f"{model_name}: attacked pictures")
    with writing(folder, card) as partial, bar:
        for split, samples in clean.items():
            requests = [
                replace(request, images=tuple(as_fed(processor, each) for each in request.images))
                for request in (sample.request for sample in samples)
            ]
            found = attack(
                model,
                processor,
                requests,
                wanted_answers(params, model_name, samples),
                setting,
                batch_size=params.evaluate.batch_size,
                progress=bar.update,
            )
            write_suite(_attacked(samples, found, card), partial / f"{split}.parquet")
            splits[split] = _summary(found)
    return folder


def wanted_answers(params: Params, model_name: str, samples: "Sequence[Sample]") -> list[str]:
    """Say what the attack makes a model answer: as told, or what a model of the lab would say."""
    from hauberk.data.lab import complied
    from hauberk.lab.build import FAMILIES
    from hauberk.lab.language import PLAIN

    if params.attack.target is not None:
        return [params.attack.target] * len(samples)
    dialect = FAMILIES[model_name].dialect if model_name in FAMILIES else PLAIN
    return [dialect.say(complied(sample)) for sample in samples]


def _attacked(
    clean: "Sequence[Sample]", found: "Sequence[Attacked]", card: dict[str, Any]
) -> "list[Sample]":
    """Put the attacked pictures in the place of the clean ones, with where they come from.

    A picture is part of its sample's id, so that those of another attack are other samples.
    """
    model, weights = card["model"], card["binding"]["weights"]
    how = ", ".join(f"{key} {value}" for key, value in card["setting"].items())
    return [
        replace(
            sample,
            sample_id=f"{SUITE}-{model}-{sample.split}-{index:05d}-{_mark(attacked)}",
            suite=SUITE,
            channel="adversarial",
            image=attacked.image,
            source=f"{sample.source}, attacked on {model}",
            revision=f"{sample.revision}; PGD, {how}; weights {weights}",
        )
        for index, (sample, attacked) in enumerate(zip(clean, found, strict=True))
    ]


def _mark(attacked: "Attacked") -> str:
    return hashlib.sha256(attacked.image.tobytes()).hexdigest()[:8]


def _summary(found: "Sequence[Attacked]") -> dict[str, Any]:
    """Give the shares that follow the wanted answer, and the mean losses, before and after."""
    measures = ("followed_before", "followed", "loss_before", "loss_after")
    n = len(found)
    return {"n": n} | {name: sum(getattr(each, name) for each in found) / n for name in measures}


if __name__ == "__main__":
    main("attack", run, "model")
