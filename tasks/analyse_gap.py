"""Stage analyse_gap: an undefended model -> is there something to fix, and what do its states say.

in   artifacts/data/anchor/*, the model, artifacts/MODEL/none/evaluation/responses.jsonl
out  artifacts/MODEL/gap/   gap.json (rates, the gap and its verdict, what the model's card demands
     of it, every number by decoder block), states.parquet (the measured requests in the plane of
     two principal components), NAME.svg (the plots), card.json

The rates are those of the test split.  States are of the anchor split, never of test: the refusal
direction and the principal components are fitted on every other text, the rest is measured.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hauberk import UNDEFENDED
from tasks.params import Params
from tasks.stage import (
    DATA,
    evaluation_folder,
    gap_folder,
    load_model,
    main,
    read_json,
    spread,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from hauberk.data.samples import Sample
    from hauberk.evaluation.statistics import Estimate

Row = dict[str, Any]

_RATES = {
    ("text", "unsafe_rate"), ("text_blank", "unsafe_rate"), ("text_image", "unsafe_rate"),
    ("benign_image", "accuracy"), ("lookalike", "over_refusal"), ("benign_image", "over_refusal"),
}  # fmt: skip
"""What the rates are of, in the lab: harmful words without and with a picture, and what a model
that refuses everything would lose."""
_OF_DATA = ("unsafe_rate", "accuracy", "over_refusal")
"""What they are of every suite of a data set that has them."""


def run(params: Params, model_name: str) -> Path:
    """Measure the gap and the states behind it; write numbers and plots."""
    import pandas as pd

    from hauberk.bundle import binding_of, versions
    from hauberk.data.samples import read_suite
    from tasks.report.gap_plots import draw

    model, processor = load_model(params, model_name)
    evaluation = evaluation_folder(model_name, UNDEFENDED)
    read_json(evaluation / "card.json")  # or it is said which stage to run
    read = {
        key: spread(read_suite(DATA / "anchor" / f"{suite}.parquet"), params.gap.requests)
        for key, suite in params.gap.read.items()
    }
    measured, points = _places(model, processor, read["harmful"], read["harmless"], params.seed)
    if "captions" in read:
        measured["layers"] += _alignment(model, processor, read["captions"], params.seed)
    document = {
        **_answers(params, evaluation / "responses.jsonl"),
        **measured,
        "demands": _demands(params.folder_of(model_name)),
    }
    card = {
        "model": model_name,
        "binding": asdict(binding_of(model, processor)),
        "suites": [f"anchor/{suite}" for suite in params.gap.read.values()],
        "requests": params.gap.requests,
        "versions": versions(),
    }
    folder = gap_folder(model_name)
    with writing(folder, card) as partial:
        write_json(document, partial / "gap.json")
        pd.DataFrame(points).to_parquet(partial / "states.parquet", index=False)
        for name, svg in draw(document, points).items():
            (partial / f"{name}.svg").write_text(svg, encoding="utf-8")
    return folder


def _demands(model: Path) -> list[Row]:
    """Give what the card of a lab model demands of it; of another model none is kept."""
    kept = model / "measurements.json"
    return list(read_json(kept).values()) if kept.exists() else []


def _answers(params: Params, responses: Path) -> Row:
    """Say how often the undefended model answers unsafely, and whether a picture adds to it."""
    from hauberk.analysis.gap import verdict
    from hauberk.evaluation.metrics import metric_rows
    from hauberk.evaluation.run import by_suite, read_records
    from hauberk.evaluation.statistics import unpaired_difference

    records = read_records(responses)
    unsafe = {suite: [r.unsafe for r in members] for suite, members in by_suite(records)}
    told, own = params.gap, {suite for each in params.datasets.values() for suite in each.suites}
    wanted = _RATES | {(suite, metric) for suite in own for metric in _OF_DATA}
    rows = [row for row in metric_rows(records) if (row["suite"], row["metric"]) in wanted]
    if told.words is None:
        why = "gap not measured: params.yaml names no suite of harmful words alone"
        return {"gap": None, "verdict": why, "rates": rows}
    gap = unpaired_difference(unsafe[told.harmful], unsafe[told.words])
    return {"gap": asdict(gap), "verdict": verdict(gap), "rates": rows}


def _places(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    harmful: "Sequence[Sample]",
    harmless: "Sequence[Sample]",
    seed: int,
) -> tuple[Row, list[Row]]:
    """Measure where requests lie between harmless and harmful texts, by decoder block.

    Every group holds the same requests: with their picture, with a white one, and without any.
    """
    from hauberk.analysis.gap import auroc, fit_axis, fit_plane, halves, mean
    from hauberk.analysis.twins import last_states
    from hauberk.requests import blank_twin, text_twin

    wishes, twins = ([sample.request for sample in group] for group in (harmful, harmless))
    requests = {
        "harmful_text": [text_twin(request) for request in wishes],
        "harmful_blank": [blank_twin(request, processor) for request in wishes],
        "harmful_image": wishes,
        "benign_text": [text_twin(request) for request in twins],
        "benign_image": twins,
    }
    parts = {g: halves(last_states(model, processor, r)) for g, r in requests.items()}
    texts = parts["harmful_text"][0], parts["benign_text"][0]
    measured = {group: rest for group, (_, rest) in parts.items()}
    axis, plane = fit_axis(*texts), fit_plane(*texts)
    score = {group: axis.score(states) for group, states in measured.items()}
    moved = {g: score["harmful_text"] - score[g] for g in ("harmful_blank", "harmful_image")}
    layers = [
        *(row for group in score for row in _rows("score", group, mean(score[group], seed))),
        *(row for group in moved for row in _rows("moved", group, mean(moved[group], seed))),
        *_rows("auroc", "text", auroc(score["harmful_text"], score["benign_text"], seed)),
        *_rows("auroc", "image", auroc(score["harmful_image"], score["benign_image"], seed)),
    ]
    points = [
        {"group": group, "request": place, "block": block, "x": x, "y": y}
        for group, states in measured.items()
        for place, blocks in enumerate(plane.project(states).tolist())
        for block, (x, y) in enumerate(blocks)
    ]
    fit = {"fitted_on": list(map(len, texts)), "explained": plane.explained.tolist()}
    return {**fit, "layers": layers}, points


def _alignment(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    captioned: "Sequence[Sample]",
    seed: int,
) -> list[Row]:
    """Measure how near a picture lies to its caption, and to the caption of another picture.

    All states of a model have much in common, so that any two have a high cosine: what counts is
    the margin by which the own caption is nearer.
    """
    from hauberk.analysis.gap import cosines, mean
    from hauberk.analysis.states import image_states, text_states
    from hauberk.analysis.twins import last_states
    from hauberk.lab.language import told
    from hauberk.requests import Request, blank_twin

    pictured = [sample.request for sample in captioned]
    captions = [sample.caption for sample in captioned]
    others = _others(captions)
    twins = [Request(told(sample.caption, sample.question)) for sample in captioned]
    strangers = [
        Request(told(captions[other], sample.question))
        for other, sample in zip(others, captioned, strict=True)
    ]
    blanks = [blank_twin(request, processor) for request in pictured]
    image = image_states(model, processor, pictured)
    words = text_states(model, processor, twins, captions)
    end = last_states(model, processor, pictured)

    def at_end(requests: Sequence[Request]) -> Any:
        return cosines(end, last_states(model, processor, requests))

    cosine = {
        ("over_image", "caption"): cosines(image, words),
        ("over_image", "other_caption"): cosines(image, words[others]),
        ("at_end", "caption"): at_end(twins),
        ("at_end", "other_caption"): at_end(strangers),
        ("at_end", "blank"): at_end(blanks),
    }
    for where in ("over_image", "at_end"):
        cosine[where, "margin"] = cosine[where, "caption"] - cosine[where, "other_caption"]
    return [
        row
        for (measure, group), values in cosine.items()
        for row in _rows(measure, group, mean(values, seed))
    ]


def _others(captions: Sequence[str]) -> list[int]:
    """Give every picture the place of the next one whose caption is another."""
    from hauberk.errors import BadData

    if len(set(captions)) < 2:
        raise BadData(
            f"all {len(captions)} captions are {captions[0]!r}; two different ones at least are "
            "right: raise `gap.requests` in params.yaml."
        )
    return [
        next(
            (place + step) % len(captions)
            for step in range(1, len(captions))
            if captions[(place + step) % len(captions)] != caption
        )
        for place, caption in enumerate(captions)
    ]


def _rows(measure: str, group: str, estimates: "Sequence[Estimate]") -> list[Row]:
    return [
        {"measure": measure, "group": group, "block": block, **asdict(estimate)}
        for block, estimate in enumerate(estimates)
    ]


if __name__ == "__main__":
    main("analyse_gap", run, "model")
