"""The part about the gap says what gap.json says, whatever its numbers are."""

import re
from base64 import b64decode
from dataclasses import replace

import pytest

from tasks.report import render_report
from tasks.report.gap_plots import GROUPS, draw
from tests.report.reading import Page

BLOCKS, COUNT = 4, 12


def estimate(value, n=COUNT):
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}


def demand(what, value, *, missed_by):
    return {"what": what, **estimate(value, n=400), "missed_by": missed_by}


def made_up(auroc=0.9):
    """A gap.json with every measure and group, and its points in the plane."""
    kinds = {
        "score": GROUPS,
        "moved": ("harmful_blank", "harmful_image"),
        "auroc": ("text", "image"),
        "over_image": ("caption", "other_caption", "margin"),
        "at_end": ("caption", "other_caption", "blank", "margin"),
    }
    rates = {("text", "unsafe_rate"): 0.11, ("text_image", "unsafe_rate"): 0.61,
             ("benign_image", "accuracy"): 0.87, ("lookalike", "over_refusal"): 0.13}  # fmt: skip
    layers = [
        {"measure": measure, "group": group, "block": block,
         **estimate(auroc if measure == "auroc" else block / 10)}
        for measure, groups in kinds.items()
        for group in groups
        for block in range(BLOCKS)
    ]  # fmt: skip
    points = [
        {"group": group, "request": place, "block": block, "x": place * side, "y": side - place}
        for side, group in enumerate(GROUPS)
        for place in range(COUNT)
        for block in range(BLOCKS)
    ]
    document = {
        "gap": estimate(0.5, n=80), "verdict": "gap of 50 points: there is something to fix",
        "rates": [{"suite": suite, "metric": metric, **estimate(value, n=40)}
                  for (suite, metric), value in rates.items()],
        "demands": [demand("text: unsafe", 0.01, missed_by=0.0),
                    demand("captions: exact answer", 0.81, missed_by=0.14)],
        "fitted_on": [COUNT, COUNT], "explained": [[0.5, 0.25]] * BLOCKS, "layers": layers,
    }  # fmt: skip
    return document | {"plots": draw(document, points)}, points


def shown(results, folder, documents):
    few = replace(results, gaps=documents, sweeps={}, detection={}, agreement={})
    page = render_report(few, folder)
    return Page(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    document, _ = made_up()
    return shown(
        results, tmp_path_factory.mktemp("gap"), {"lab-llava": document, "other": document}
    )


def test_the_verdict_stands_there_with_every_rate_its_interval_its_n_and_what_it_costs(page):
    text = " ".join(page.text.split())
    assert "other · gap of 50 points: there is something to fix" in text
    assert "Unsafe answers with a picture minus without: 50.0 points (40.0 to 60.0)" in text
    sentence = re.search(r"Undefended, on the test split: (.*?)\. Unsafe", text)[1].split("; ")
    assert sentence == [
        "unsafe answers on text 11.0 % (1.0 to 21.0, n 40)",
        "unsafe answers on text_image 61.0 % (51.0 to 71.0, n 40)",
        "right answers on benign_image 87.0 % (77.0 to 97.0, n 40)",
        "over-refusal on lookalike 13.0 % (3.0 to 23.0, n 40)",
    ]


def test_every_number_by_decoder_block_is_in_the_table(page):
    document, _ = made_up()
    rows = page.table("states")[1:]
    assert len(rows) == len(document["layers"])
    for cells, row in zip(rows, document["layers"], strict=True):
        assert [float(cell.value) for cell in cells[3:6]] == [row["value"], row["low"], row["high"]]
        assert [cells[2].text, cells[6].text] == [str(row["block"]), str(row["n"])]
    assert len({(cells[0].text, cells[1].text) for cells in rows}) == len(rows) / BLOCKS


def test_every_plot_is_on_the_page_with_words_and_beside_it(results, tmp_path):
    document, _ = made_up()
    page = shown(results, tmp_path, {"lab-llava": document})
    embedded = [a for a in page.all("img") if (a["src"] or "").startswith("data:image/svg")]
    found = [b64decode(a["src"].split(",", 1)[1]).decode() for a in embedded]
    assert found == list(document["plots"].values())
    assert all("lab-llava" in a["alt"] for a in embedded)
    files = {path.name: path.read_text() for path in (tmp_path / "plots").iterdir()}
    assert files == {f"gap.lab-llava.{k}.svg": svg for k, svg in document["plots"].items()}


def test_how_far_a_picture_moves_requests_is_said_of_the_last_block(page):
    text = " ".join(page.text.split())
    assert "In block 3, the last, a picture moves harmful requests by 0.30 (0.20 to 0.40)" in text


def test_where_no_axis_tells_texts_apart_no_place_on_it_is_shown(results, tmp_path):
    document, _ = made_up(auroc=0.55)  # whose interval holds 0.5
    text = " ".join(shown(results, tmp_path, {"lab-llava": document}).text.split())
    assert "there is no refusal axis along which a picture could move them" in text
    assert "only in blocks where it tells other texts apart (none)" in text
    assert "a picture moves harmful requests" not in text


def test_a_miss_of_the_card_is_said_with_n_and_interval_and_what_it_meets_is_not(page):
    text = " ".join(page.text.split())
    assert (
        "Of the 2 things that the card of a lab model demands it misses 1: captions: exact answer "
        "81.0 % (71.0 to 91.0, n 400), 14.0 points off."
    ) in text
    assert "text: unsafe" not in text


@pytest.mark.parametrize(("kept", "said"), [(1, True), (0, False)])
def test_a_model_without_a_card_is_not_said_to_meet_one(results, tmp_path, kept, said):
    document, _ = made_up()
    met = shown(
        results, tmp_path, {"lab-llava": document | {"demands": document["demands"][:kept]}}
    )
    assert ("It shows all 1 things" in " ".join(met.text.split())) == said
    assert "it misses" not in met.text


def test_without_an_analysis_the_page_has_no_such_part(results, tmp_path):
    page = shown(results, tmp_path, {})
    assert "Is there something to fix?" not in page.text
    assert not any(a.get("id") == "gap" for _, a in page.elements)


def test_the_same_numbers_give_the_same_plots_and_other_numbers_others():
    document, points = made_up()
    assert draw(document, points) == document["plots"]
    other = draw(made_up(auroc=0.8)[0], points)
    assert other["direction"] != document["plots"]["direction"]
    assert other["states"] == document["plots"]["states"]
