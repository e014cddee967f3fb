"""Stage compare: all evaluations -> one table, paired differences, and the report.

in   artifacts/MODEL/DEFENSE/evaluation, also of served models, artifacts/MODEL/DEFENSE/bundle,
     artifacts/MODEL/gap,
     artifacts/MODEL/guardalign/parts, artifacts/MODEL/davsp/parts,
     artifacts/MODEL/davsp/{attacked,transfer}, artifacts/MODEL/tga/{layers,parts},
     artifacts/MODEL/adversarial, artifacts/data, artifacts/CLIP/concept_bank/evaluation
out  reports/   metrics.json, differences.json, channels.json (metrics of all suites of a channel
                together), forms.json (unsafe answers by whether they have to name their thing),
                agreement.json (of the two judges), detection.json, index.html, plots/*.svg,
                card.json
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hauberk import UNDEFENDED
from tasks.params import DAVSP, GUARDALIGN, TGA, Params
from tasks.stage import (
    bundle_folder,
    clip_folder,
    evaluation_folder,
    gap_folder,
    layers_folder,
    main,
    parts_folder,
    read_json,
    suite_file,
    tested_files,
    transfer_folder,
    write_json,
    writing,
)

if TYPE_CHECKING:
    from hauberk.evaluation.run import Record

REPORTS = Path("reports")
ANSWERS = "responses.jsonl"


def run(params: Params) -> Path:
    """Gather the rows, pair every defended run with the undefended one, render the report."""
    from hauberk.evaluation.agreement import agreement_rows, confusion_rows
    from hauberk.evaluation.label_correction import corrected_by_model
    from hauberk.evaluation.label_sheet import read_sheets
    from hauberk.evaluation.metrics import (
        corrected_rows,
        difference_rows,
        form_rows,
        keyword_rows,
    )
    from hauberk.evaluation.run import read_records
    from tasks.report.comparison import Comparison, Deciding
    from tasks.report.render import render_report

    metrics: list[Any] = []
    differences: list[Any] = []
    forms: list[Any] = []
    responses: list[Any] = []
    agreement: dict[str, list[Any]] = {"suites": [], "channels": [], "confusion": []}
    whole: list[Record] = []
    sweeps: dict[tuple[str, str], Any] = {}
    for folder in (evaluation_folder(model, UNDEFENDED) for model in params.models):
        read_json(folder / "card.json")  # or its own stage is named, and no file of the data
    scenarios = _scenarios(params)
    for model, defenses in _evaluated(params).items():
        control = read_records(evaluation_folder(model, UNDEFENDED) / ANSWERS)
        metrics += keyword_rows(control)
        by_id = {record.sample_id: record for record in control}
        whole_ones = [evaluation_folder(model, name) for name in defenses]
        for folder in (*whole_ones, *_part_folders(params, model)):
            metrics += read_json(folder / "metrics.json")
            for defense, records in _by_defense(read_records(folder / ANSWERS)):
                metrics += corrected_rows(records, control)
                responses += (_response(one, scenarios.get(one.sample_id)) for one in records)
                if params.whole(model, defense):
                    forms += form_rows(records, control)
                    agreement["suites"] += agreement_rows(records)
                    agreement["channels"] += agreement_rows(records, by="channel")
                    agreement["confusion"] += confusion_rows(records)
                    whole += records
                if defense != UNDEFENDED:
                    same = [by_id[record.sample_id] for record in records]
                    differences += difference_rows(records, same, asdict(params.noninferiority))
        for defense in defenses:
            if (sweep := bundle_folder(model, defense) / "sweep.json").is_file():
                sweeps[model, defense] = read_json(sweep)
    if params.judges.labels and any(Path(params.judges.labels).glob("*.csv")):  # or none yet
        metrics += corrected_by_model(whole, read_sheets(Path(params.judges.labels)))
    detection = {clip: _detection(clip) for clip in params.concept_banks}
    comparison = Comparison(
        metrics=metrics,
        differences=differences,
        sweeps=sweeps,
        forms=forms,
        agreement=agreement,
        responses=responses,
        served={name: _served(params, name) for name in params.served},
        images=_images(params),
        deciding=Deciding(params.gap.harmful, params.gap.words),
        chosen=params.registry.promote,
        detection={clip: each for clip, each in detection.items() if _measured(each)},
        frames={model: _frame(params, model) for model in params.davsp.models},
        gaps={model: _gap(model) for model in params.models},
        projectors={model: _projector(model) for model in params.tga.models},
        layers={model: read_json(layers_folder(model) / "layers.json") for model in params.models},
        context=_context(params) | _left_out(detection),
    )
    with writing(REPORTS, {"profile": params.profile, "seed": params.seed}) as partial:
        write_json(metrics, partial / "metrics.json")
        write_json(differences, partial / "differences.json")
        write_json(forms, partial / "forms.json")
        write_json(agreement, partial / "agreement.json")
        found = [row for clip in detection.values() for row in clip["rows"]]
        write_json(found, partial / "detection.json")
        pooled = [row for row in comparison.pooled if params.whole(row["model"], row["defense"])]
        write_json(pooled, partial / "channels.json")
        render_report(comparison, partial)
    return REPORTS


def _part_folders(params: Params, model: str) -> list[Path]:
    """Where the parts of the defenses of a model lie, and the frames of others; none if served."""
    made = [name for name in (GUARDALIGN, DAVSP, TGA) if name in params.evaluated_on(model)]
    folders = [parts_folder(model, name) for name in made]
    return folders + ([transfer_folder(model)] if DAVSP in made else [])


def _evaluated(params: Params) -> dict[str, tuple[str, ...]]:
    """What was evaluated on every suite: model -> defenses, those that others serve last."""
    here = {name: (UNDEFENDED, *params.evaluated_on(name)) for name in params.models}
    return here | {name: (UNDEFENDED, *told.defenses) for name, told in params.served.items()}


def _served(params: Params, name: str) -> dict[str, Any]:
    """Where a served model was asked, and what came of it: defense -> what its card says."""
    defenses = _evaluated(params)[name]
    return {each: read_json(evaluation_folder(name, each) / "card.json") for each in defenses}


def _gap(model: str) -> dict[str, Any]:
    """What the analysis of a model's gap found, with its plots."""
    folder = gap_folder(model)
    plots = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.svg"))}
    return {**read_json(folder / "gap.json"), "plots": plots}


def _frame(params: Params, model: str) -> dict[str, Any]:
    """How the frame of a model was trained, with the frame and a picture in it."""
    from base64 import b64encode
    from io import BytesIO

    from hauberk.bundle import read_card
    from hauberk.data.samples import read_suite
    from hauberk.defenses.safety_prompt import SafetyPrompt

    folder = bundle_folder(model, DAVSP)
    prompt = SafetyPrompt.read(*read_card(folder))
    shown = read_suite(suite_file(model, "train", params.davsp.harmful[0]))[0]

    def png(picture: Any) -> str:
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        return b64encode(buffer.getvalue()).decode()

    pictures = {"frame": png(prompt.picture()), "example": png(prompt.framed(shown.image))}
    attacked = read_json(folder.parent / "attacked" / "metrics.json")
    return {**read_json(folder / "training.json"), **pictures, "attacked": attacked}


def _projector(model: str) -> dict[str, Any]:
    """How the weights of a model were trained, and those that explain it."""
    return {
        **read_json(bundle_folder(model, TGA) / "training.json"),
        "variants": read_json(parts_folder(model, TGA) / "trainings.json"),
    }


def _by_defense(records: "list[Record]") -> "list[tuple[str, list[Record]]]":
    """The records of one folder, which holds one defense, or several in turn."""
    return [(name, list(group)) for name, group in groupby(records, lambda r: r.defense)]


_TABLES = {"rows": "metrics", "grids": "grids"}


def _detection(clip: str) -> dict[str, Any]:
    """How well a CLIP finds what is unsafe in pictures: rows, a sweep, scores and examples."""
    folder = clip_folder(clip, "evaluation")
    tables = {name: read_json(folder / f"{of}.json") for name, of in _TABLES.items()}
    return {**tables, **read_json(folder / "detection.json")}


def _measured(found: Mapping[str, Any]) -> bool:
    return "not_measured" not in found


def _left_out(detection: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """What was not measured, and why; nothing where all was."""
    why = {
        f"detection of {clip}": found["not_measured"]
        for clip, found in detection.items()
        if not _measured(found)
    }
    return {"Not measured": why} if why else {}


def _response(record: "Record", scenario: str | None) -> dict[str, Any]:
    """A line of responses.jsonl, with what the record and its sample say of it."""
    said = {"unsafe": record.unsafe, "unjudged": record.unjudged, "degenerate": record.degenerate}
    return vars(record) | said | {"scenario": scenario}


def _test_columns(params: Params, *names: str) -> Iterator[dict[str, Any]]:
    """Columns of the Parquet files of the test suites, sample by sample."""
    import pyarrow.parquet as pq

    files = {file for model in params.models for file in tested_files(model, params.suites)}
    for file in sorted(files):
        yield from pq.read_table(file, columns=["sample_id", *names]).to_pylist()


def _scenarios(params: Params) -> dict[str, str]:
    """The category of harm or of use: sample_id -> scenario."""
    return {row["sample_id"]: row["scenario"] for row in _test_columns(params, "scenario")}


def _images(params: Params) -> dict[str, bytes]:
    """The pictures of the test suites as they lie in the Parquet files: sample_id -> PNG."""
    rows = _test_columns(params, "image")
    return {row["sample_id"]: row["image"]["bytes"] for row in rows if row["image"]}


def _context(params: Params) -> dict[str, Mapping[str, Any]]:
    """What the page names at its foot: no clock in it, so that the same run gives the same page."""
    bundles = {
        f"{model} / {defense}": read_json(bundle_folder(model, defense) / "card.json")
        for model in params.models
        for defense in params.evaluated_on(model)
    }
    evaluations = {
        f"{model} / {defense}": read_json(evaluation_folder(model, defense) / "card.json")
        for model, defenses in _evaluated(params).items()
        for defense in defenses
    }
    return {
        "Run": {"profile": params.profile, "seed": params.seed, **asdict(params.evaluate)},
        "May be lost and still be no worse": asdict(params.noninferiority),
        "Versions": _versions(bundles, evaluations),
        "Batched answers that differ from batch size 1": _differing(evaluations)
        | _differing(_parts(params)),
        "Bundles": {name: card["card_sha256"] for name, card in bundles.items()},
        "Concept banks": {
            clip: read_json(clip_folder(clip, "bundle") / "card.json")["card_sha256"]
            for clip in params.concept_banks
        },
        "Weights": {name: card["binding"]["weights"] for name, card in bundles.items()},
    }


def _versions(bundles: Mapping[str, Any], evaluations: Mapping[str, Any]) -> dict[str, str]:
    """The packages that built and that measured, as the stages recorded them when they ran."""
    made = {f"{name}, bundle": card for name, card in bundles.items()}
    made |= {f"{name}, evaluation": card for name, card in evaluations.items()}
    return {
        name: ", ".join(f"{package} {version}" for package, version in card["versions"].items())
        for name, card in made.items()
    }


def _parts(params: Params) -> dict[str, Any]:
    """What the parts of defenses were checked for, part by part as an evaluation is."""
    cards = {
        model: [read_json(folder / "card.json") for folder in _part_folders(params, model)]
        for model in params.models
    }
    return {
        f"{model} / {part}": {**card, "differing_alone": differing}
        for model, found in cards.items()
        for card in found
        for part, differing in card["differing_alone"].items()
    }


def _differing(evaluations: Mapping[str, Any]) -> dict[str, str]:
    """What batching changed; nothing of served models, which are asked one by one."""
    return {
        name: f"{len(card['differing_alone'])} of {card['checked_alone']} checked"
        for name, card in evaluations.items()
        if "checked_alone" in card
    }


if __name__ == "__main__":
    main("compare", run)
