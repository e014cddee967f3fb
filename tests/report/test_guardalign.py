"""What is said about GuardAlign is what the rows say, for every CLIP and every model."""

import re
from base64 import b64decode, b64encode
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from hauberk import UNDEFENDED
from hauberk.evaluation.detection import ALL_HARMLESS, READINGS
from tasks.params import GUARDALIGN, PARTS
from tasks.report import Comparison, guardalign, render_report
from tasks.report.effects import REST
from tasks.report.guardalign_plots import UNSAFE_TO_SAFE, written
from tasks.report.tables import matrix
from tasks.report.words import amount, full, interval
from tests.report.made_up import detection
from tests.report.reading import Page
from tests.report.test_page import HOSTILE, render

SAID = r"\d to \S*\d · n \d+"


def plain(text):
    return " ".join(text.split())


def seen(results, folder, **found):
    """The page of one CLIP alone, with what is told changed."""
    bare = Comparison(metrics=results.metrics[:40], detection={"lab-clip": detection() | found})
    return render(bare, folder)


def pictures(page):
    """What the three views of every example show, in order."""
    sources = [a["src"] or "" for a in page.all("img")]
    place = next(i for i, a in enumerate(page.all("img")) if "as it was sent" in (a["alt"] or ""))
    return [b64decode(source.split(",", 1)[1]) for source in sources[place : place + 24]]


def test_every_measurement_of_a_detector_is_in_its_tables_with_interval_and_n(results, page):
    found = results.detection["lab-clip"]["rows"]
    (ranked,), (masked,) = page.every("ranked"), page.every("masked")
    shown = [cell for row in (ranked[1], *masked[1:]) for cell in row if cell.value]
    assert sorted(float(cell.value) for cell in shown) == sorted(row["value"] for row in found)
    by_value = {float(cell.value): cell.text.replace("\xa0", " ") for cell in shown}
    for row in found:
        text = by_value[row["value"]]
        assert amount(row["value"], row["metric"]) in text
        bounds = interval(row["low"], row["high"], row["metric"]).replace("\xa0", " ")
        assert f"{bounds} · n {row['n']}" in text


def test_shares_stand_in_the_row_of_their_suite_under_what_they_are(results, page):
    heads, *rows = page.table("masked")
    titles = [cell.text.strip() for cell in heads]
    table = {
        (row[0].text.strip(), title): cell.value
        for row in rows
        for title, cell in zip(titles, row, strict=True)
    }
    for title, metrics in guardalign.MASKED.items():
        for row in results.detection["lab-clip"]["rows"]:
            if row["metric"] in metrics:
                assert table[row["suite"], title] == str(row["value"])


def test_an_area_under_a_curve_is_no_percentage(page):
    names, values = page.table("ranked")
    assert [cell.text.strip() for cell in names[1:]] == list(guardalign.RANKED.values())
    assert all(re.match(r"\s*0\.\d{3}(?!\d*\s*%)", cell.text) for cell in values[1:])


def test_the_sentences_name_the_best_and_the_worst_suite(results, page):
    found = {
        cell.suite: cell
        for _, (cell, *_) in guardalign.seen(results)["lab-clip"].masked
        if cell is not None
    }
    best, worst = (pick(found.values(), key=lambda cell: cell.value) for pick in (max, min))
    assert plain(f"at best in {full(best)} of the pictures of {best.suite}") in plain(page.text)
    assert plain(f"at worst in {full(worst)} of those of {worst.suite}") in plain(page.text)


def test_what_masking_costs_harmless_requests_is_no_share_of_clean_pictures(results, page):
    assert guardalign.ALL_HARMLESS == ALL_HARMLESS
    touched = {
        row["suite"]: guardalign._cell(row)
        for row in results.detection["lab-clip"]["rows"]
        if row["metric"] in ("touched_harmless_requests", "touched_benign_pictures")
    }
    said = plain(page.text)
    clean, whole = touched.pop("benign"), touched.pop(ALL_HARMLESS)
    assert plain(f"Of pictures without anything toxic, {full(clean)} lose a patch.") in said
    parts = sorted(touched.values(), key=lambda cell: -cell.value)
    listed = "; ".join(f"{cell.suite} {full(cell)}" for cell in parts)
    assert len(parts) == 3
    assert (
        plain(f"whatever they show, {full(whole)} lose a patch, suite by suite {listed}.") in said
    )


def test_every_reading_of_every_grid_stands_under_its_name(results, page):
    assert list(guardalign.READINGS) == list(READINGS)
    groups, heads, *rows = page.table("grids")
    assert [cell.text.strip() for cell in groups[1:]] == list(guardalign.SWEPT.values())
    assert [cell.text.strip() for cell in heads[1:]] == 2 * list(guardalign.READINGS.values())
    columns = [(metric, name) for metric in guardalign.SWEPT for name in guardalign.READINGS]
    found = {(r["grid"], r["reading"]): r for r in results.detection["lab-clip"]["grids"]}
    assert len(rows) * len(guardalign.READINGS) == len(found)
    for first, *cells in rows:
        side = int(first.text.split()[0])
        for (metric, reading), cell in zip(columns, cells, strict=True):
            told = found[side, reading][metric]
            assert cell.value == str(told["value"])
            assert f"{interval(told['low'], told['high'], metric)} · n\xa048" in cell.text


def test_the_scores_up_to_the_threshold_are_counted(results, tmp_path):
    scores = {"toxic": [-5.0, -4.0, 3.0], "benign": [-4.0, 0.5, 1.0, 2.0]}
    page = seen(results, tmp_path, scores=scores)
    said = "Up to the threshold of −4.0 lie 2 of 3 toxic and 1 of 4 harmless patches."
    assert said in plain(page.text)
    assert any(said in a["alt"] for a in page.all("img"))


def test_every_example_is_shown_as_sent_scored_and_masked(results, tmp_path):
    page = seen(results, tmp_path)
    examples, views = detection()["examples"], pictures(page)
    assert len(views) == 3 * len(examples) == 24
    for place, example in enumerate(examples):
        sent, heat, masked = views[3 * place : 3 * place + 3]
        assert sent == b64decode(example["picture"])
        assert masked == b64decode(example["masked"])
        name = f"guardalign.lab-clip.example-{place + 1}.svg"
        assert heat == (tmp_path / "plots" / name).read_bytes()


def test_words_stand_for_every_picture_with_its_scores_by_rows(results, tmp_path):
    page = seen(results, tmp_path)
    words = [a["alt"] for a in page.all("img") if "patches, row by row" in (a["alt"] or "")]
    for text, example in zip(words, detection()["examples"], strict=True):
        numbers = re.findall(r"(\S+\d\.\d|\d\.\d)(?: \((\w+)\))?", text)
        labels = {"toxic": 1, "part": -1, "": 0}
        assert [score for score, _ in numbers] == [written(s) for s in example["scores"]]
        assert [labels[label] for _, label in numbers] == example["labels"]
        assert text.count(";") == 2  # between two rows, and before what is masked
        hits = sum(
            h and lab == 1 for h, lab in zip(example["hidden"], example["labels"], strict=True)
        )
        toxic = example["labels"].count(1)
        truth = f"{hits} of {toxic} toxic" if toxic else "none is toxic"
        assert f"masked: {sum(example['hidden'])} of 4 patches, {truth}." in text


def test_a_fine_grid_has_colours_and_its_extremes_in_words(results, tmp_path):
    fine = detection(grid=8)
    page = seen(results, tmp_path, grid=8, examples=fine["examples"])
    words = [a["alt"] for a in page.all("img") if "8 by 8 patches" in (a["alt"] or "")]
    for text, example in zip(words, fine["examples"], strict=True):
        ends = (written(pick(example["scores"])) for pick in (min, max))
        assert "from {} to {};".format(*ends) in text
    assert "A patch with × holds" in page.text
    assert "“part”" not in page.text


def test_orange_is_exactly_what_is_up_to_the_threshold(results, tmp_path):
    example = {**detection()["examples"][0], "scores": [-30.0, -4.01, -3.99, 30.0],
               "hidden": [True, True, False, False], "labels": [1, 1, 0, 0]}  # fmt: skip
    seen(results, tmp_path, examples=[example])
    svg = (tmp_path / "plots/guardalign.lab-clip.example-1.svg").read_text()
    colours = [colour for colour in re.findall(r"fill: (#\w{6})", svg) if colour in UNSAFE_TO_SAFE]
    places = [UNSAFE_TO_SAFE.index(colour) for colour in dict.fromkeys(colours)]
    assert places == [1, 4, 5, 9]  # the scale reaches as far below the threshold as above it
    assert all(f"fill: {colour}" in svg for colour in colours)


def test_attention_on_the_prefix_is_drawn_and_listed_by_block(results, page, index):
    tables = page.every("attention")
    assert len(tables) == len(results.models)
    for model, rows in zip(results.models, tables, strict=True):
        shares = results.sweeps[model, GUARDALIGN]["shares"]
        for cells, row in zip(rows[1:], shares, strict=True):
            found = [row["plain"], row["calibrated"]]
            told = [row["layer"], *(each["value"] if each else "" for each in found)]
            assert [cells[0].text, *(cell.value for cell in cells[1:])] == list(map(str, told))
            for each, cell in zip(found, cells[1:], strict=True):
                bounds = each and interval(each["low"], each["high"], "share")
                assert not each or f"{bounds} · n\xa048" in cell.text
        assert (index.parent / f"plots/guardalign.{model}.attention.svg").is_file()
    said = "most in block 2: from 6.0 % (4.7 to 7.3) to 26.0 % (24.7 to 27.3); n 48."
    assert plain(page.text).replace("\u202f", " ").count(said) == len(results.models)


def test_a_model_of_which_no_block_has_causal_attention_has_a_plot_all_the_same(results, tmp_path):
    sweep = results.sweeps["lab-llava", GUARDALIGN]
    blind = {**sweep, "shares": [{"layer": 0, "plain": None, "calibrated": None}]}
    page = render(replace(results, detection={}, sweeps={("lab-llava", GUARDALIGN): blind}),
                  tmp_path)  # fmt: skip
    assert "No block has causal self-attention." in page.text


# --- the parts --------------------------------------------------------------------------------


def test_the_rows_are_undefended_guardalign_and_every_part_in_this_order(results, page):
    assert tuple(guardalign.PARTS) == (UNDEFENDED, GUARDALIGN, *PARTS)
    for rows in page.every("parts"):
        starts = [row[0].text.strip() for row in rows[2:]]
        for text, name in zip(starts, ("undefended", GUARDALIGN, *PARTS), strict=True):
            assert text.startswith(name)


def test_a_part_shows_what_was_measured_and_never_an_unsafe_rate_alone(results, page):
    for model, rows in zip(results.models, page.every("parts"), strict=True):
        for row, defense in zip(rows[2:], guardalign.PARTS, strict=True):
            wanted = [(suite, "unsafe_rate") for suite in guardalign.ATTACKS]
            for (suite, metric), cell in zip((*wanted, *guardalign.COSTS), row[1:], strict=True):
                found = results.cell(model, defense, suite, metric)
                assert float(cell.value) == found.value
                text = cell.text.replace("\xa0", " ")
                assert re.search(SAID, text)
                assert f"n {found.n}" in text
                assert found.n == (30 if defense in PARTS else 80)


def test_answers_beside_the_point_stand_under_the_unsafe_rate_where_they_are_many(results, page):
    many = 0
    for model, rows in zip(results.models, page.every("parts"), strict=True):
        for row, defense in zip(rows[2:], guardalign.PARTS, strict=True):
            for suite, cell in zip(guardalign.ATTACKS, row[1:], strict=False):
                found = results.cell(model, defense, suite, "evasion_rate")
                said = f"beside the point {amount(found.value, 'evasion_rate')}, "
                bounds = interval(found.low, found.high, "evasion_rate")
                assert (plain(said + bounds) in plain(cell.text)) == (found.value > REST)
                assert ("beside the point" in cell.text) == (found.value > REST)
                many += found.value > REST
    assert 0 < many < 5 * 7 * len(results.models)


def test_parts_are_in_the_tables_of_everything_and_nowhere_else(results, page):
    rows = [row.defense for rows in matrix(results) for row in rows]
    assert not set(PARTS) & set(rows)
    measured = {row[2].text.strip() for rows in page.every("measured") for row in rows[1:]}
    assert set(PARTS) <= measured
    verdict = page.text.partition("GuardAlign and its parts")[0].partition("Model by defense")[0]
    samples = page.text.partition("Not picked by hand")[2].partition("Do the judges agree")[0]
    heads = " ".join(cell.text for rows in page.every("paired") for cell in rows[0])
    for part in PARTS:
        assert part not in verdict + samples + heads
    assert GUARDALIGN in heads
    assert GUARDALIGN in samples


# --- the settings -----------------------------------------------------------------------------


def test_a_sweep_of_prefixes_has_its_own_columns_and_no_plot_against_alpha(results, page, index):
    tables = [rows for rows in page.every("sweep") if rows[0][0].text == "Prefix"]
    assert len(tables) == len(results.models)
    for rows, model in zip(tables, results.models, strict=True):
        heads = [cell.text.strip() for cell in rows[0]]
        assert heads[:7] == ["Prefix", "Placement", "γ", "Gate", "Mode", "Layers", "Fill"]
        for cells, row in zip(rows[1:], results.sweeps[model, GUARDALIGN]["rows"], strict=True):
            layers = "middle" if row["layers"] is None else ", ".join(map(str, row["layers"]))
            assert [cell.text for cell in cells[:6]] == [
                f"“{row['text']}”", row["placement"], str(row["gamma"]), row["gate"], row["mode"],
                layers,
            ]  # fmt: skip
    assert "“be safe . ”, user, γ 0.6, any_masked, clamped, layers 2, fill black: unsafe" in plain(
        page.text
    )
    assert plain(page.text).count("Rule: The largest merit.") == len(tables)
    names = {path.stem for path in (index.parent / "plots").iterdir()}
    assert f"alpha.{results.models[0]}.cmrm" in names
    assert not any(name.startswith("alpha") and name.endswith(GUARDALIGN) for name in names)


def test_a_prefix_does_not_move_the_plots_of_the_shifts(results, index, tmp_path):
    shifts = {key: sweep for key, sweep in results.sweeps.items() if key[1] != GUARDALIGN}
    render_report(replace(results, sweeps=shifts, detection={}), tmp_path)
    for name in ("trade-off.lab-llava", "layers.lab-llava"):
        assert (tmp_path / f"plots/{name}.svg").read_bytes() == (
            index.parent / f"plots/{name}.svg"
        ).read_bytes()


def test_a_model_with_a_sweep_of_prefixes_alone_has_its_table_and_no_empty_plots(results, tmp_path):
    key = ("lab-llava", GUARDALIGN)
    few = replace(results, detection={}, agreement={}, sweeps={key: results.sweeps[key]})
    page = render(few, tmp_path)
    assert len(page.every("sweep")) == 1
    assert "lab-llava: plots" not in page.text
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "guardalign.lab-llava.attention.svg"
    }


# --- what may be missing or hostile -----------------------------------------------------------


def without(results, models):
    """The same results, had GuardAlign not been measured on some models."""

    def keep(row):
        return row["model"] not in models or row["defense"] not in (GUARDALIGN, *PARTS)

    return replace(
        results,
        metrics=list(filter(keep, results.metrics)),
        differences=list(filter(keep, results.differences)),
        responses=list(filter(keep, results.responses)),
        sweeps={
            k: s for k, s in results.sweeps.items() if k[0] not in models or k[1] != GUARDALIGN
        },
    )


def test_without_guardalign_the_page_has_no_such_part(results, tmp_path):
    page = render(replace(without(results, results.models), detection={}), tmp_path)
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert not ids & {"guardalign", "parts"}
    assert "guardalign" not in page.source.lower().replace("guardalign.html", "")
    assert "any_masked" not in page.text


def test_a_model_without_it_stands_beside_those_that_have_it(results, tmp_path):
    page = render(without(results, ("lab-qwen",)), tmp_path)
    assert len(page.every("parts")) == len(page.every("attention")) == 2
    assert len(page.every("measured")) == 3
    assert len(page.every("ranked")) == 1


def test_guardalign_without_its_parts_stands_beside_the_undefended_model(results, tmp_path):
    rows = [row for row in results.metrics if row["defense"] not in PARTS]
    page = render(Comparison(metrics=rows), tmp_path)
    for rows in page.every("parts"):
        assert [row[0].text.strip() for row in rows[2:]] == [
            "undefended", "guardalignmasking and prefix",
        ]  # fmt: skip


def test_hostile_names_and_prefixes_stay_text(results, tmp_path):
    found = detection()
    rows = [{**row, "suite": HOSTILE} if row["suite"] == "image" else row for row in found["rows"]]
    told = {**found, "rows": rows, "examples": [{**e, "suite": HOSTILE} for e in found["examples"]]}
    sweep = results.sweeps["lab-llava", GUARDALIGN]
    hostile = {**sweep, "rows": [{**row, "text": HOSTILE + "$x"} for row in sweep["rows"]]}
    page = render(
        replace(results, detection={HOSTILE: told}, sweeps={("lab-llava", GUARDALIGN): hostile}),
        tmp_path,
    )
    assert len(page.all("script")) == 1
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>alert(1)</script>" in page.text
    assert all("/" not in path.name for path in (tmp_path / "plots").iterdir())


def test_a_picture_that_is_none_is_refused(results, tmp_path):
    broken = [{**row, "masked": b64encode(b"GIF89a").decode()} for row in detection()["examples"]]
    with pytest.raises(ValueError, match=r"starts with b'GIF8'.*PNG"):
        seen(results, tmp_path, examples=broken)


def test_a_picture_of_any_shape_keeps_it(results, tmp_path):
    Image.new("RGB", (60, 30), "green").save(buffer := BytesIO(), format="PNG")
    wide = {**detection()["examples"][0], "picture": b64encode(buffer.getvalue()).decode()}
    seen(results, tmp_path, examples=[wide])
    svg = (tmp_path / "plots/guardalign.lab-clip.example-1.svg").read_text()
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    assert width == pytest.approx(2 * height)


def test_every_clip_has_its_own_part(results, tmp_path):
    both = {"lab-clip": detection(), "other": detection(seed=1)}
    page = Page(
        render_report(Comparison(metrics=results.metrics[:40], detection=both), tmp_path).read_text(
            encoding="utf-8"
        )
    )
    assert len(page.every("ranked")) == len(page.every("masked")) == 2
    assert len(list((tmp_path / "plots").iterdir())) == 2 * 10
