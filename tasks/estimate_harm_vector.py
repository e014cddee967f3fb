"""Stage estimate_harm_vector: anchor suites and a model -> where its states tell harm from use.

in   artifacts/data/anchor/*, the model
out  artifacts/MODEL/davsp/harm/   vectors.safetensors (harmful, harmless: (blocks, hidden size)
     float32), harm.json (how well every block tells held-out requests apart, the block that is
     taken, thresholds and the scores that they come from), card.json

Requests stand for their kind by what the model does: harmful ones that it refuses, harmless ones
that it answers, each with its picture and, where words tell it whole, as its text twin without.  Of
a model that does right by too few of a kind, all of that kind are taken, and harm.json says so.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.params import Params
from tasks.stage import harm_folder, load_model, main, suite_file, write_json, writing

_AT_LEAST = 8
"""Requests of a kind, as of a group of the analysis of the gap (hauberk.analysis.gap)."""


def run(params: Params, model_name: str) -> Path:
    """Fit on every other request, choose block and thresholds on the rest."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    from hauberk.analysis.harmfulness import fit_harm_vectors, separation
    from hauberk.analysis.twins import last_states
    from hauberk.bundle import binding_of, file_hash, versions

    told = params.davsp.harm
    model, processor = load_model(params, model_name)
    batch = params.evaluate.batch_size
    bar = tqdm(total=4, desc=f"{model_name}: harmfulness vector")
    kinds: dict[str, list[Any]] = {}
    counts: dict[str, dict[str, int]] = {}
    for kind, suites in (("harmful", told.harmful), ("harmless", told.harmless)):
        every, right = _asked(params, model, processor, suites)
        kinds[kind] = right if len(right) >= _AT_LEAST else every
        counts[kind] = {"asked": len(every), "right": len(right), "taken": len(kinds[kind])}
        bar.update()
    with torch.no_grad():
        fitted = {kind: requests[0::2] for kind, requests in kinds.items()}
        vectors = fit_harm_vectors(
            model, processor, fitted["harmful"], fitted["harmless"], batch_size=batch
        )
        bar.update()
        held = {
            kind: last_states(model, processor, requests[1::2], batch)
            for kind, requests in kinds.items()
        }
        found = separation(vectors, held["harmful"], held["harmless"])
        bar.update()
    bar.close()
    layer = found.layer if told.layer is None else told.layer
    axis = vectors.axis(layer, told.score)
    scores = {kind: axis.score(states[:, layer]) for kind, states in held.items()}
    quantile = {kind: float(values.quantile(told.quantile)) for kind, values in scores.items()}
    document = {
        "auroc": list(found.auroc),
        "distance": list(found.distance),
        "best_layer": found.layer,
        "layer": layer,
        "score": told.score,
        "high": quantile["harmful"] if told.high is None else told.high,
        "low": quantile["harmless"] if told.low is None else told.low,
        "scores": {kind: values.tolist() for kind, values in scores.items()},
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
        tensors = {"harmful": vectors.harmful, "harmless": vectors.harmless}
        save_file(tensors, partial / "vectors.safetensors")
        write_json(document, partial / "harm.json")
    return harm_folder(model_name)


def _asked(
    params: Params, model: Any, processor: Any, suites: list[str]
) -> tuple[list[Any], list[Any]]:
    """The requests of some suites with their text twins, and those that the model does right by."""
    from dataclasses import replace

    from hauberk.data.samples import read_suite
    from hauberk.evaluation.run import judge_response
    from hauberk.requests import respond

    pictured = [
        sample for suite in suites for sample in read_suite(suite_file("", "anchor", suite))
    ]
    samples = [
        each
        for sample in pictured
        for each in (sample, *([replace(sample, image=None)] if _told(sample) else []))
    ]
    answers = respond(
        model,
        processor,
        [sample.request for sample in samples],
        max_new_tokens=params.evaluate.max_new_tokens,
        batch_size=params.evaluate.batch_size,
    )
    outcomes = [
        judge_response(sample, answer, model="", defense="").outcome
        for sample, answer in zip(samples, answers, strict=True)
    ]
    right = [
        sample.request
        for sample, outcome in zip(samples, outcomes, strict=True)
        if (outcome == "refused") == (sample.expected == "refuse")
    ]
    return [sample.request for sample in samples], right


def _told(sample: Any) -> bool:
    """Whether words tell a request whole: of "what is this ?" they do not."""
    return sample.channel == "text+image" or sample.suite.endswith("_twin")


if __name__ == "__main__":
    main("estimate_harm_vector", run, "model")
