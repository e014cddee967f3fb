"""What is said about frames is what the rows say, for every model."""

from base64 import b64decode, b64encode
from itertools import product

import pytest

from hauberk import UNDEFENDED
from tasks.params import DAVSP, PROMPT_PARTS, TRANSFERRED
from tasks.report import Comparison, davsp, render_report
from tasks.report.words import amount, interval
from tests.report.made_up import picture
from tests.report.reading import Page

MODELS = ("lab-llava", "lab-qwen")
TRIED = (UNDEFENDED, DAVSP, *PROMPT_PARTS)
TRANSFER = (("text_image", "unsafe_rate"), ("benign_image", "accuracy"))


def row(place, model, defense, suite, metric, **more):
    value = 0.05 + (place * 0.0137) % 0.9
    number = {"value": value, "n": 40 + place % 7, "low": value - 0.04, "high": value + 0.04}
    return {"model": model, "defense": defense, "suite": suite, "metric": metric, **number, **more}


def training(place):
    history = [
        {"step": step, "course": 0, "loss": 2 / step, "hinge_harmful": 1 / step, "answer": 0.1,
         "hinge_harmless": 0.5 / step, "backward": int(step < 100)}
        for step in range(1, 121)
    ]  # fmt: skip
    scores = {
        kind: {when: [base + shift * (when == "after") + i / 100 for i in range(40)]
               for when in ("before", "after")}
        for kind, base, shift in (("harmful", 0.1, 0.7), ("harmless", -0.3, -0.1))
    }  # fmt: skip
    png = b64encode(picture(place)).decode()
    return {
        "rule": "the best of those that were validated.", "step": 60, "history": history,
        "validated": [{"step": s, "merit": m} for s, m in ((0, 0.1), (60, 0.9), (120, 0.8))],
        "goal": {"layer": 4, "score": "span", "high": 1.0, "low": 0.0}, "scores": scores,
        "frame": png, "example": b64encode(picture(place + 9)).decode(),
        "attacked": [row(7 * e + len(d), "", d, "text_image", "unsafe_rate", epsilon=e)
                     for e, d in product((4, 16), (UNDEFENDED, DAVSP))],
    }  # fmt: skip


@pytest.fixture(scope="module")
def found():
    asked = {(suite, "unsafe_rate") for suite in davsp.ATTACKS} | {*davsp.COSTS}
    rows = []
    for model in MODELS:
        others = [f"{TRANSFERRED}{other}" for other in MODELS if other != model]
        for defense, (suite, metric) in product((*TRIED, *others), sorted(asked)):
            rows.append(row(len(rows), model, defense, suite, metric))
    frames = {model: training(place) for place, model in enumerate(MODELS)}
    return Comparison(metrics=rows, frames=frames)


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory):
    return render_report(found, tmp_path_factory.mktemp("reports")).parent


@pytest.fixture(scope="module")
def read(folder):
    return Page((folder / "index.html").read_text("utf-8"))


def test_every_part_stands_in_its_row_with_value_interval_and_n(found, read):
    by_value = {str(each["value"]): each for each in found.metrics}
    for model, table in zip(MODELS, read.every("prompts"), strict=True):
        _, _, *rows = table
        others = [f"{TRANSFERRED}{other}" for other in MODELS if other != model]
        names = [*davsp.PARTS, *others]
        assert len(rows) == len(names)
        columns = [(suite, "unsafe_rate") for suite in davsp.ATTACKS] + [*davsp.COSTS]
        for defense, (_, *cells) in zip(names, rows, strict=True):
            for column, cell in zip(columns, cells, strict=True):
                told = by_value[cell.value]
                keys = (told["model"], told["defense"], told["suite"], told["metric"])
                assert keys == (model, defense, *column)
                bounds = interval(told["low"], told["high"], told["metric"])
                assert amount(told["value"], told["metric"]) in cell.text
                assert f"{bounds} · n\xa0{told['n']}" in cell.text


def test_a_frame_stands_where_its_model_and_the_one_it_is_tried_on_cross(found, read):
    values = {
        (each["model"], each["defense"], each["suite"], each["metric"]): str(each["value"])
        for each in found.metrics
    }
    _, _, *rows = read.table("transfer")
    for source, (_, *cells) in zip([*MODELS, UNDEFENDED], rows, strict=True):
        for place, target in enumerate(MODELS):
            own = DAVSP if source == target else f"{TRANSFERRED}{source}"
            defense = UNDEFENDED if source == UNDEFENDED else own
            pair = cells[2 * place : 2 * place + 2]
            expected = [values[target, defense, *each] for each in TRANSFER]
            assert [cell.value for cell in pair] == expected


def test_attacks_frame_example_and_plots_are_shown_for_every_model(found, folder, read):
    sources = {b64decode(a["src"].split(",", 1)[1]) for a in read.all("img") if "png" in a["src"]}
    for model, table in zip(MODELS, read.every("attacked"), strict=True):
        told = found.frames[model]
        assert {b64decode(told["frame"]), b64decode(told["example"])} <= sources
        _, *rows = table
        assert [int(cells[0].text) for cells in rows] == [4, 16]
        shown = [cell.value for _, *cells in rows for cell in cells]
        assert shown == [str(each["value"]) for each in told["attacked"]]
        for name in ("training", "scores"):
            assert (folder / "plots" / f"davsp.{model}.{name}.svg").stat().st_size > 1000
    assert read.text.count("The frame of step 60 of 120 was kept. In 21 of 120 steps nothing") == 2
    assert all(a["alt"] for a in read.all("img"))


def test_no_part_of_a_defense_stands_among_whole_ones(found):
    for model in MODELS:
        assert found.defenses(model) == [UNDEFENDED, DAVSP]


def test_without_frames_nothing_is_said_of_them(found, tmp_path):
    bare = Comparison(metrics=[r for r in found.metrics if r["defense"] == UNDEFENDED])
    page = Page(render_report(bare, tmp_path).read_text("utf-8"))
    assert "DAVSP" not in page.text
