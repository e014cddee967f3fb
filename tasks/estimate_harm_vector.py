"""Stage estimate_harm_vector: anchor suites and a model -> where its states tell harm from use.

in   artifacts/data/anchor/*, the model
out  artifacts/MODEL/davsp/harm/   vectors.safetensors (harmful, harmless: (blocks, hidden size)
     float32), harm.json (how well every block tells held-out requests apart, the block that is
     taken, thresholds and the scores that they come from), card.json

Requests stand for their kind by what the model does: harmful ones that it refuses, harmless ones
that it answers, each with its picture and, where words tell it whole, as its text twin without.  Of
a model that does right by too few of a kind, all of that kind are taken, and harm.json says so.

Every other request is held out, with its twin.  With and without a picture the means are taken
apart and weigh the same, so that the vector is not one between pictures and words; what harmless
requests are to score follows from those with a picture alone, since a frame acts on no others.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tasks.judging import answers_it, judge_at, outcomes
from tasks.params import Params
from tasks.stage import harm_folder, load_model, main, suite_file, write_json, writing

_AT_LEAST = 8
"""Requests of a kind, as of a group of the analysis of the gap (hauberk.analysis.gap)."""
_KINDS = ("harmful", "harmless")


@dataclass(frozen=True)
class Asked:
    """A request, and whether the model does right by it."""

    request: Any
    pictured: bool
    held_out: bool
    right: bool


def run(params: Params, model_name: str) -> Path:
    """Fit on every other request, choose block and thresholds on the rest."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    from hauberk.analysis.harmfulness import HarmVectors, fit_harm_vectors, separation
    from hauberk.analysis.twins import last_states
    from hauberk.bundle import binding_of, versions
    from hauberk.files import file_hash

    told = params.davsp.harm
    model, processor = load_model(params, model_name)
    batch = params.evaluate.batch_size
    bar = tqdm(total=4, desc=f"{model_name}: harmfulness vector")
    taken: dict[str, list[Asked]] = {}
    counts: dict[str, dict[str, int]] = {}
    for kind, suites in zip(_KINDS, (told.harmful, told.harmless), strict=True):
        every = _asked(params, model, processor, suites)
        right = [asked for asked in every if asked.right]
        taken[kind] = right if len(right) >= _AT_LEAST else every
        counts[kind] = {"asked": len(every), "right": len(right), "taken": len(taken[kind])}
        bar.update()
    ways = _ways(taken, counts)
    with torch.no_grad():
        fitted = [
            fit_harm_vectors(
                model, processor, *(_of(taken[kind], way, False) for kind in _KINDS), batch
            )
            for way in ways
        ]
        vectors = HarmVectors(
            *(torch.stack([getattr(one, kind) for one in fitted]).mean(0) for kind in _KINDS)
        )
        bar.update()
        held = {
            (kind, way): last_states(model, processor, _of(taken[kind], way, True), batch)
            for kind in _KINDS
            for way in ways
        }
        found = separation(vectors, *(tuple(held[kind, way] for kind in _KINDS) for way in ways))
        bar.update()
    bar.close()
    layer = found.layer if told.layer is None else told.layer
    axis = vectors.axis(layer, told.score)
    harmful = torch.cat([axis.score(held["harmful", way][:, layer]) for way in ways])
    shown = True if True in ways else ways[0]
    harmless = axis.score(held["harmless", shown][:, layer])
    document = {
        "auroc": list(found.auroc),
        "distance": list(found.distance),
        "best_layer": found.layer,
        "layer": layer,
        "score": told.score,
        "high": float(harmful.quantile(told.high_quantile)) if told.high is None else told.high,
        "low": float(harmless.quantile(told.low_quantile)) if told.low is None else told.low,
        "scores": {"harmful": harmful.tolist(), "harmless": harmless.tolist()},
        "fitted_on": ["pictured" if way else "text" for way in ways],
        "requests": counts,
    }
    files = [suite_file(model_name, "anchor", suite) for suite in (*told.harmful, *told.harmless)]
    card = {
        "model": model_name,
        "binding": asdict(binding_of(model, processor)),
        "data": {f"anchor/{file.stem}": file_hash(file) for file in files},
        "versions": versions(),
    }
    with writing(harm_folder(model_name), card) as partial:
        tensors = {kind: getattr(vectors, kind).contiguous() for kind in _KINDS}
        save_file(tensors, partial / "vectors.safetensors")
        write_json(document, partial / "harm.json")
    return harm_folder(model_name)


def _asked(params: Params, model: Any, processor: Any, suites: list[str]) -> list[Asked]:
    """Ask the requests of some suites, and their text twins."""
    from hauberk.data.samples import read_suite
    from hauberk.requests import respond

    pictured = [
        sample for suite in suites for sample in read_suite(suite_file("", "anchor", suite))
    ]
    samples = [
        (each, place % 2 == 1)
        for place, sample in enumerate(pictured)
        for each in (sample, *([replace(sample, image=None)] if _told(sample) else []))
    ]
    answers = respond(
        model,
        processor,
        [sample.request for sample, _ in samples],
        max_new_tokens=params.evaluate.max_new_tokens,
        batch_size=params.evaluate.batch_size,
    )
    said = outcomes(judge_at(params, "first"), [sample for sample, _ in samples], answers)
    found = []
    for (sample, held_out), outcome in zip(samples, said, strict=True):
        right = outcome == "refused" if sample.expected == "refuse" else answers_it(outcome)
        found.append(Asked(sample.request, sample.image is not None, held_out, right))
    return found


def _told(sample: Any) -> bool:
    """Whether words tell a request whole: of "what is this ?" they do not."""
    return sample.channel == "text+image" or sample.suite.endswith("_twin")


def _of(asked: list[Asked], pictured: bool, held_out: bool) -> list[Any]:
    return [one.request for one in asked if (one.pictured, one.held_out) == (pictured, held_out)]


def _ways(taken: dict[str, list[Asked]], counts: dict[str, dict[str, int]]) -> list[bool]:
    """With a picture, or without: the ways of which there are enough requests of both kinds."""
    from hauberk.errors import BadData

    found = [
        way
        for way in (True, False)
        if all(
            len(_of(taken[kind], way, held_out)) >= _AT_LEAST // 2
            for kind in _KINDS
            for held_out in (True, False)
        )
    ]
    if not found:
        raise BadData(
            f"too few requests to fit a harmfulness vector on and to hold out ({counts}); name "
            "more suites in davsp.harm of params.yaml, or raise `anchor`."
        )
    return found


if __name__ == "__main__":
    main("estimate_harm_vector", run, "model")
