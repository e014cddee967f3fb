"""The part about TGA says what training.json and the rows say, for every model."""

from base64 import b64decode
from dataclasses import replace
from itertools import product

import pytest

from hauberk import UNDEFENDED
from hauberk.evaluation.statistics import wilson
from tasks.params import TGA
from tasks.report import Comparison, render_report, tga
from tasks.report.figures import figures, file_name
from tasks.report.words import amount, interval
from tests.report.reading import Page

MODELS = ("lab-llava", "lab-<b>qwen</b>")
CONTROL, BOTH = "tga_control", "tga_both"
BESIDE = (CONTROL, f"{CONTROL}_retrieved", BOTH, f"{BOTH}_retrieved", "tga_states", "tga_literal")
COLUMNS = (*((suite, "unsafe_rate") for suite in tga.ATTACKS), *tga.COSTS)
OURS = {"form": "kl", "layers": "last", "position": "decision", "pair": 1.0, "margin": 0.0,
        "decay": False, "centred": False, "target": "reference", "retrieved": None}  # fmt: skip
STATES = OURS | {"form": "exp", "layers": [2, 3], "pair": 4.0}
LITERAL = OURS | {"form": "exp", "layers": "located", "position": "image", "pair": 0.25}
REFUSED = {("none", "image"): 1, ("tga", "image"): 6, ("none", "image_told"): 8}
"""Of the ten samples of a scenario, how many are refused."""
SCENARIOS = ("weapon", "poison")


def measured(place, model, defense, suite, metric):
    value = 0.05 + (place * 0.0137) % 0.9
    number = {"value": value, "n": 40 + place % 7, "low": value - 0.04, "high": value + 0.04}
    return {"model": model, "defense": defense, "suite": suite, "metric": metric, **number}


def training(step=60, alignment=OURS, variants=True, history=None):
    told = {
        "step": step,
        "validated": [{"step": s, "merit": m} for s, m in MERITS.items()],
        "history": HISTORY if history is None else history,
        "rule": "the <best> ones.",
    }
    own = {"alignment": alignment, "cosines": COSINES, "training": {"mode": "lora"}}
    named = {CONTROL: OURS | {"pair": 0.0, "retrieved": "before"},
             BOTH: OURS | {"retrieved": "before"}, "tga_states": STATES,
             "tga_literal": LITERAL} if variants else {}  # fmt: skip
    return {**told, **own, "variants": {name: {**told, "alignment": each, "step": 60}
                                        for name, each in named.items()}}  # fmt: skip


MERITS = {0: 0.1, 60: 0.9, 120: 0.8}
HISTORY = [
    {"step": step, "loss": 2 / step, "answers": 0.1, "gradient": 1.0}
    | ({"pair": 1 / step, "margin": 0.5, "image_caption": 0.5} if step % 2 else {})
    for step in range(1, 121)
]
COSINES = [
    {"layer": k, "image_before": 0.1 * k, "image_after": 0.12 * k, "decision_before": 0.2,
     "decision_after": 0.9} for k in range(4)
]  # fmt: skip


def answers(model):
    return [
        {"model": model, "defense": defense, "suite": suite, "scenario": scenario,
         "sample_id": f"{suite}-{scenario}-{place}", "channel": "image", "expected": "refuse",
         "outcome": "refused" if place < count else "harmful", "outcome_keyword": "refused",
         "response": "", "unsafe": place >= count, "unjudged": False, "degenerate": None}
        for (defense, suite), count in REFUSED.items()
        for scenario, place in product(SCENARIOS, range(10))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def found():
    rows = []
    for model in MODELS:
        for defense, column in product((UNDEFENDED, TGA, *BESIDE), COLUMNS):
            rows.append(measured(len(rows), model, defense, *column))
    return Comparison(
        metrics=rows,
        responses=[row for model in MODELS for row in answers(model)],
        projectors={MODELS[0]: training(), MODELS[1]: training(step=0)},
    )


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory):
    return render_report(found, tmp_path_factory.mktemp("reports")).parent


@pytest.fixture(scope="module")
def read(folder):
    return Page((folder / "index.html").read_text("utf-8"))


def test_what_was_kept_is_said_or_that_nothing_was_better(found):
    first, second = (each.said for each in tga.aligned(found).values())
    assert first == (
        "The weights of step 60 of 120 were kept: their merit on the calibration split is 0.90, "
        f"0.10 untrained. {tga.TRAINED['lora']}"
    )
    assert second.startswith(
        "No weights of 120 steps were better than the model's own, which were kept."
    )


def test_how_much_of_the_change_is_made_is_said_where_it_is_not_all():
    of = {"lab-llava": training() | {"share": 0.7, "deployed_merit": 0.88},
          "lab-qwen": training() | {"share": 1.0, "deployed_merit": 0.9}}  # fmt: skip
    of["lab-llava"]["variants"][BOTH]["share"] = 0.5
    page = tga.aligned(Comparison(metrics=[
        measured(0, model, defense, *COLUMNS[0]) for model in of for defense in (TGA, BOTH)
    ], projectors=of))  # fmt: skip
    part, whole = page.values()
    assert "0.10 untrained. 70 % of their change is made, with a merit of 0.88." in part.said
    assert "change is made" not in whole.said
    assert [row.what[-18:] for row in part.rows] == ["70 % of the change", "50 % of the change"]
    assert not any("change" in row.what for row in whole.rows)


def test_the_shares_that_were_tried_are_drawn_and_say_on_what_bounds_are_set(tmp_path):
    suites = {"image": {"n": 50, "unsafe_rate": 0.1}} | {
        name: {"n": 50, "accuracy": 0.9, "over_refusal": 0.0} for name in ("benign_image", "twin")
    }
    rows = [
        {"alpha": alpha, "unsafe_rate": 1 - alpha, "accuracy": 1 - alpha / 5, "over_refusal": 0.0,
         "n_harmful": 50, "n_benign": 100, "merit": alpha, "suites": suites, "broken_on": [],
         "chosen": alpha == 0.8}
        for alpha in (0.5, 0.8, 1.0)
    ]  # fmt: skip
    sweep = {
        "rule": "the <best>.", "split": "calibration", "undefended": rows[0], "rows": rows,
        "chosen": {"alpha": 0.8}, "within_bounds": True, "bounded": ["benign_image"],
    }  # fmt: skip
    told = Comparison(metrics=[
        measured(0, "lab-llava", TGA, *COLUMNS[0])
    ], sweeps={("lab-llava", TGA): sweep}, projectors={"lab-llava": training()})  # fmt: skip
    page = Page((render_report(told, tmp_path)).read_text("utf-8"))
    text = " ".join(page.text.split())
    assert text.count("ounds are set on benign_image alone") == 2
    assert "α 0.8, the share of the trained change that is made: unsafe answers 20" in text
    drawn = [figure.title for figure in figures(told, "lab-llava")]
    assert drawn == ["tga: unsafe answers and utility against α (calibration split)"]
    everywhere = replace(told, sweeps={("lab-llava", TGA): sweep | {"bounded": None}})
    page = Page((render_report(everywhere, tmp_path / "all")).read_text("utf-8"))
    assert "ounds are set on" not in page.text


def test_a_variant_that_was_no_better_than_the_model_is_shown_as_it_was_trained():
    found = training(step=0)
    found["variants"]["tga_states"]["step"] = 0
    shown = tga.aligned(Comparison(metrics=[
        measured(0, "lab-llava", defense, *COLUMNS[0]) for defense in (TGA, "tga_states")
    ], projectors={"lab-llava": found}))  # fmt: skip
    ours, states = shown["lab-llava"].rows
    assert ours.what.endswith("; no weights were better than the model's own")
    assert states.what.endswith("; no weights were better than the model's own: its last")


def test_every_training_stands_in_its_row_with_value_interval_and_n(found, read):
    by_value = {str(each["value"]): each for each in found.metrics}
    for model, table in zip(MODELS, read.every("trained"), strict=True):
        _, _, *rows = table
        names = (UNDEFENDED, TGA, *BESIDE)
        for defense, (_, *cells) in zip(names, rows, strict=True):
            for column, cell in zip(COLUMNS, cells, strict=True):
                told = by_value[cell.value]
                keys = (told["model"], told["defense"], told["suite"], told["metric"])
                assert keys == (model, defense, *column)
                bounds = interval(told["low"], told["high"], told["metric"])
                assert f"{bounds} · n\xa0{told['n']}" in cell.text


def test_every_row_says_how_it_was_trained(found):
    first, _ = tga.aligned(found).values()
    assert {row.defense: row.what for row in first.rows} == {
        UNDEFENDED: "",
        TGA: "what is said next (divergence) after the last block at the end of the prompt",
        CONTROL: "retrieved text in the prompt, loss off",
        f"{CONTROL}_retrieved": "asked with a retrieved text in the prompt",
        BOTH: "what is said next (divergence) after the last block at the end of the prompt, "
        "retrieved text in the prompt",
        f"{BOTH}_retrieved": "asked with a retrieved text in the prompt",
        "tga_states": "states (exp of the cosine) in blocks 2 and 3 at the end of the prompt",
        "tga_literal": "states (exp of the cosine) in the located blocks over the image's "
        "positions",
    }


def test_refusals_by_scenario_stand_beside_what_words_reach(read):
    for table in read.every("refusals"):
        _, _, total, *rows = table
        assert total[0].text == "all"
        assert [row[0].text for row in rows] == sorted(SCENARIOS)
        for (_, *cells), scenarios in zip((total, *rows), (2, 1, 1), strict=True):
            for cell, count in zip(cells, REFUSED.values(), strict=True):
                n = 10 * scenarios
                assert float(cell.value) == count / 10
                assert amount(count / 10, "refusal_rate") in cell.text
                bounds = interval(*wilson(count * scenarios, n), "refusal_rate")
                assert f"{bounds} · n\xa0{n}" in cell.text
        assert "75.0\u202f% of what words reach" in total[2].text
        assert not any("reach" in cell.text for row in rows for cell in row)


def test_without_a_ceiling_or_scenarios_nothing_is_made_up(found):
    model = MODELS[0]
    for suite in (tga.SHOWN, tga.CEILING):
        rows = [row for row in found.responses if row["suite"] != suite]
        assert not tga.aligned(replace(found, responses=rows))[model].refusals
    rows = [{**row, "scenario": None} for row in found.responses]
    (total,) = tga.aligned(replace(found, responses=rows))[model].refusals
    assert total.scenario == tga.EVERY
    rows = [row | {"outcome": "harmful"} for row in found.responses]
    total, *_ = tga.aligned(replace(found, responses=rows))[model].refusals
    assert total.share is None


def test_plots_are_whole_and_told_in_words(folder, read):
    shown = [b64decode(a["src"].split(",", 1)[1]).decode() for a in read.all("img") if a["src"]]
    for model, name in product(MODELS, ("training", "cosines")):
        file = folder / "plots" / f"{file_name(f'tga.{model}.{name}')}.svg"
        assert (text := file.read_text("utf-8")) in shown
        assert "nan" not in text.lower()
    assert all(a["alt"] for a in read.all("img"))
    assert read.text.count("Rule: the <best> ones.") == 2


def test_names_are_written_as_they_are(read):
    assert "lab-<b>qwen</b>" in read.text
    assert not read.all("b")


@pytest.mark.parametrize(
    "changes",
    [
        {"variants": False},
        {"history": []},
        {"history": [{"step": 1, "loss": 0.3, "answers": None}]},
        {"alignment": {}},
        {"alignment": OURS | {"layers": "authors", "pair": 0.0}},
        {"alignment": OURS | {"layers": "located"}},
    ],
)
def test_what_was_not_measured_is_left_out(found, changes):
    document = training(**changes)
    bare = replace(found, projectors={MODELS[0]: document}, responses=())
    (said,) = tga.aligned(bare).values()
    assert [row.defense for row in said.rows] == [UNDEFENDED, TGA, *BESIDE]
    assert not any("nan" in figure.svg.lower() for figure in said.figures)
    del document["cosines"]
    assert len(tga.aligned(bare)[MODELS[0]].figures) == 1


def test_without_trained_weights_nothing_is_said_of_them(found, tmp_path):
    bare = Comparison(metrics=[r for r in found.metrics if r["defense"] == UNDEFENDED])
    page = Page(render_report(bare, tmp_path).read_text("utf-8"))
    assert not any(a.get("id") == "tga" for _, a in page.elements)
