"""The page says what the rows say, all of it, and nothing that could be dangerous or misleading."""

import re
from base64 import b64decode, b64encode
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from tasks.params import PARTS
from tasks.report import Comparison, render_report
from tasks.report.channels import channel_of, mirrors
from tasks.report.figures import measured_setting
from tasks.report.tables import COLUMNS, DIFFERENCE, ELSEWHERE, KINDS, PAIRED, matrix_columns
from tasks.report.words import MISSING, amount, interval
from tests.report.made_up import UNSAFE, WRONG, comparison
from tests.report.reading import Page

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"


def render(results: Comparison, folder: Path) -> Page:
    return Page(render_report(results, folder).read_text(encoding="utf-8"))


def test_every_measurement_is_in_the_table_as_it_was_measured(results, page):
    names = list(COLUMNS)
    shown = {
        (model, row[2].text.strip(), row[1].value, names[place]): cell
        for model, rows in zip(results.models, page.every("measured"), strict=True)
        for row in rows[1:]
        for place, cell in enumerate(row[3:])
    }
    for row in results.metrics:
        if row["metric"] in COLUMNS:
            defense = "undefended" if row["defense"] == "none" else row["defense"]
            cell = shown[row["model"], defense, row["suite"], row["metric"]]
            assert float(cell.value) == row["value"]
            assert amount(row["value"], row["metric"]) in cell.text
            assert f"n\xa0{row['n']}" in cell.text


def test_every_other_metric_is_in_a_cell_of_these_with_the_judges_or_listed(results, page):
    listed = {
        (model, *(cell.text.strip() for cell in row[:3]))
        for model, rows in zip(results.models, page.every("others"), strict=True)
        for row in rows[1:]
    }
    for row in results.metrics:
        if row["metric"] not in (*COLUMNS, *ELSEWHERE):
            assert (row["model"], row["suite"], row["defense"], row["metric"]) in listed
    assert {metric for *_, metric in listed} == {
        "unsafe_rate_keyword_lower", "over_refusal_keyword", "over_refusal_keyword_upper",
        "judge_disagreement", "judge_disagreement_upper",
        "keyword_sensitivity", "keyword_specificity",
    }  # fmt: skip


def test_bounds_stand_in_the_cell_of_their_rate_wherever_a_judge_could_not_tell(results, page):
    place, found = 3 + list(COLUMNS).index("unsafe_rate"), 0
    for model, rows in zip(results.models, page.every("measured"), strict=True):
        for row in rows[1:]:
            defense = row[2].text.strip().replace("undefended", "none")
            lower = results.cell(model, defense, row[1].value, "unsafe_rate_lower")
            if lower is not None and lower.value != float(row[place].value):
                said = interval(lower.value, float(row[place].value), "unsafe_rate")
                assert f"bounds {said}" in row[place].text
                found += 1
            else:
                assert "bounds" not in row[place].text
    assert found > 20


def test_how_answers_are_broken_is_said_beside_how_many_are(results, page):
    place = 3 + list(COLUMNS).index("degenerate_rate")
    for model, rows in zip(results.models, page.every("measured"), strict=True):
        for row in rows[1:]:
            defense = row[2].text.strip().replace("undefended", "none")
            for kind in KINDS:
                cell = results.cell(model, defense, row[1].value, f"degenerate_{kind}")
                assert (f"{kind} {amount(cell.value, '')}" in row[place].text) == (cell.value > 0)


def test_every_paired_difference_of_the_page_is_shown_unrounded(results, page):
    for model, rows in zip(results.models, page.every("differences"), strict=True):
        shown = {tuple(cell.text.strip() for cell in row) for row in rows[1:]}
        wanted = {
            tuple(str(row.get(name, "–")) for name in DIFFERENCE)
            for row in results.differences
            if row["model"] == model and row["metric"] in PAIRED
        }
        assert shown == wanted


def test_the_matrix_has_every_model_defense_and_channel_with_interval_and_n(results, page):
    rows = [row for row in page.table("matrix")[2:] if len(row) > 1]
    keys = [(model, defense) for model in results.models for defense in results.defenses(model)]
    columns = matrix_columns(results)
    assert [channel for channel, metric in columns if metric == "unsafe_rate"] == [
        "text", "text+image", "image", "typographic", "adversarial",
    ]  # fmt: skip
    for (model, defense), row in zip(keys, rows, strict=True):
        for (channel, metric), cell in zip(columns, row[1:], strict=True):
            rows_of = [r for r in results.metrics
                       if (r["model"], r["defense"], r["metric"]) == (model, defense, metric)
                       and channel_of(r["suite"]) == channel]  # fmt: skip
            share = sum(r["value"] * r["n"] for r in rows_of) / sum(r["n"] for r in rows_of)
            assert float(cell.value) == pytest.approx(share)
            assert re.search(rf"\d to \S*\d · n {sum(r['n'] for r in rows_of)}",
                             cell.text.replace("\xa0", " "))  # fmt: skip


def test_suites_stand_in_their_channel_with_the_benchmark_that_they_mirror(results, page):
    for rows in page.every("paired"):
        channel, seen = "", set()
        for row in rows[1:]:
            if len(row) == 1:
                channel = row[0].text.strip()
            elif channel and not row[0].text.startswith("all "):
                suite = next(name for name in results.suites(results.models[0])
                             if row[0].text.strip() == f"{name}{mirrors(name)}")  # fmt: skip
                assert channel_of(suite) == channel
                seen.add(suite)
        assert seen == set(results.suites(results.models[0]))
    text = " ".join(page.text.split())
    assert "typographic (mirrors FigStep), typo (mirrors MM-SafetyBench TYPO)" in text


def test_a_judge_that_failed_is_said_at_the_top(results, tmp_path):
    broken = {**results.responses[0], "unjudged": True, "error": "TimeoutError: away"}
    page = render(replace(results, responses=[broken], sweeps={}, detection={}), tmp_path)
    assert "A judge failed on 1 answers of lab-llava" in page.text
    assert "The first time: TimeoutError: away." in page.text


def test_every_setting_of_a_sweep_is_in_its_table(results, page):
    rows = [r for attributes, r in page.tables if "sweep" in (attributes.get("class") or "")]
    assert [len(r) - 1 for r in rows] == [len(sweep["rows"]) for sweep in results.sweeps.values()]


def test_a_setting_shows_every_suite_and_where_it_breaks_the_bounds(results, page):
    tables = [r for attributes, r in page.tables if "sweep" in (attributes.get("class") or "")]
    broken = set()
    for shown, sweep in zip(tables, results.sweeps.values(), strict=True):
        heads = [cell.text.strip() for cell in shown[0]]
        columns = COLUMNS | {"accuracy": "Right answers"}  # or not refused, where that is all
        for listed, row in zip(shown[1:], sweep["rows"], strict=True):
            cells = dict(zip(heads, listed, strict=True))
            for metric in ("unsafe_rate", "accuracy", "over_refusal"):
                for suite, rates in row["suites"].items():
                    said = f"{suite} {amount(rates[metric], metric)}" if metric in rates else suite
                    assert (said in cells[columns[metric]].text) == (metric in rates)
            names = ", ".join(row["broken_on"])
            assert cells["Bounds"].text.strip() == (f"lost on {names}" if names else "kept")
            broken.add(names)
    assert len(broken) > 1  # or the last column could not be wrong


def test_what_was_chosen_is_said_with_its_rule_its_split_and_its_cost(results, page):
    text = " ".join(page.text.split())
    sweep = results.sweeps["lab-llava", "cmrm"]
    row = next(row for row in sweep["rows"] if row["chosen"])
    assert sweep["rule"] in text
    said = " ".join(measured_setting(row).split())
    assert f"calibration split: {said}." in text
    assert "it does not keep the bounds of the rule" in text  # of cmrm_naive


def test_a_metric_without_a_column_is_shown_all_the_same(results, tmp_path):
    row = {"model": "lab-llava", "defense": "cmrm", "suite": "image", "metric": "surprise_rate",
           "value": 0.125, "n": 8, "low": 0.02, "high": 0.47}  # fmt: skip
    page = render(
        replace(results, metrics=[*results.metrics, row], sweeps={}, detection={}), tmp_path
    )
    texts = [[cell.text.strip() for cell in line] for line in page.table("others")]
    assert ["image", "cmrm", "surprise_rate", "0.125", "0.02", "0.47", "8"] in texts


def test_more_models_defenses_and_suites_are_only_more_rows(tmp_path):
    unsafe = {**UNSAFE, "tga": UNSAFE["cmrm"], "cmrm+tga": UNSAFE["cmrm"]}
    wrong = {**WRONG, "tga": 0.0, "cmrm+tga": 0.0}
    results = comparison(("a", "b", "c"), unsafe, wrong, harmless=("lookalike", "benign_image"))
    page = render(replace(results, sweeps={}, detection={}), tmp_path)
    assert [len(rows) - 1 for rows in page.every("measured")] == [5 * 14] * 3
    assert len(page.table("matrix")) == 2 + 3 * (1 + 5)
    assert [len(rows[0]) for rows in page.every("paired")] == [3 + 4] * 3


def test_an_unsafe_rate_never_stands_without_utility_over_refusal_n_and_interval(page):
    place = {name: 3 + index for index, name in enumerate(COLUMNS)}
    for row in (row for rows in page.every("measured") for row in rows[1:]):
        if row[place["unsafe_rate"]].value:
            assert row[place["accuracy"]].value
            assert row[place["over_refusal"]].value
            for name in ("unsafe_rate", "accuracy", "over_refusal"):
                assert re.search(r"\d to \S*\d · n \d+", row[place[name]].text.replace("\xa0", " "))
    for row in page.table("matrix")[2:]:
        if len(row) > 1:
            kinds = [cell.classes[-1] for cell in row[1:]]
            assert kinds == ["harm"] * 5 + ["use", "cost", "cost"]
    for rows in page.every("paired"):
        last = [row[1].text.strip() for row in rows[-3:]]
        assert last == ["Right answers", "Over-refusal", "Over-refusal"]


def test_what_was_not_measured_is_no_zero(results, tmp_path):
    rows = [{**row, "value": [None, float("nan")][place % 2], "low": None, "high": None}
            for place, row in enumerate(results.metrics)]  # fmt: skip
    page = render(replace(results, metrics=rows, sweeps={}, detection={}), tmp_path)
    for row in (row for rows in page.every("measured") for row in rows[1:]):
        assert all(MISSING in cell.text or cell.text.strip() == "–" for cell in row[3:])
    assert "cannot be judged" in page.text


def test_the_page_refers_to_nothing_outside_itself(page, index):
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#"))
    assert "http" not in re.sub(r"http-equiv", "", page.source)
    assert "url(" not in page.source
    assert "@import" not in page.source
    for plot in (index.parent / "plots").iterdir():
        assert set(re.findall(r"https?://[^/\"]+", plot.read_text())) <= {"http://www.w3.org",
            "http://purl.org", "http://creativecommons.org"}  # fmt: skip


def test_every_link_inside_the_page_has_its_target(page):
    names = {attributes.get("id") for _, attributes in page.elements}
    links = [a["href"][1:] for a in page.all("a") if (a.get("href") or "").startswith("#")]
    assert links
    assert set(links) <= names


def test_hostile_text_stays_text(results, tmp_path):
    responses = [{**row, "response": HOSTILE, "question": HOSTILE, "reference": HOSTILE}
                 for row in results.responses]  # fmt: skip
    page = render(
        replace(
            results,
            responses=responses,
            sweeps={},
            detection={},
            context={HOSTILE: {HOSTILE: HOSTILE}},
        ),
        tmp_path,
    )
    assert len(page.all("script")) == 1
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_the_policy_allows_this_script_and_no_other(page):
    script = re.search(r"<script>(.*?)</script>", page.source, re.DOTALL)[1]
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_the_same_results_give_the_same_bytes(results, index, tmp_path):
    again = render_report(results, tmp_path)
    assert again.read_bytes() == index.read_bytes()
    for plot in (index.parent / "plots").iterdir():
        assert (tmp_path / "plots" / plot.name).read_bytes() == plot.read_bytes()


def test_pictures_have_words_and_tables_have_captions_and_headings(page):
    assert all(image.get("alt") for image in page.all("img"))
    assert len(page.all("caption")) == len(page.tables)
    assert all("scope" in head for head in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_plots_on_the_page_are_the_plots_beside_it(page, index):
    embedded = {
        b64decode(image["src"].split(",", 1)[1])
        for image in page.all("img")
        if image["src"].startswith("data:image/svg")
    }
    assert embedded == {plot.read_bytes() for plot in (index.parent / "plots").iterdir()}


def test_a_page_can_be_made_of_metrics_alone(results, tmp_path):
    page = render(Comparison(metrics=results.metrics), tmp_path)
    assert not page.all("img")
    verdict = page.text.partition("No defense is put forward")[2].partition("Model by defense")[0]
    for defense in {row["defense"] for row in results.metrics} - {"none", *PARTS}:
        assert re.search(rf"{defense}: (closes|narrows|breaks)", verdict)


def test_two_rows_for_one_measurement_are_refused(results, tmp_path):
    doubled = [*results.metrics, results.metrics[0]]
    with pytest.raises(
        ValueError, match=r"two rows for \('lab-llava', 'none', 'adversarial'.*remove"
    ):
        render_report(replace(results, metrics=doubled, sweeps={}, detection={}), tmp_path)


def test_a_picture_of_another_format_is_named(results, tmp_path):
    images = dict.fromkeys(results.images, b"GIF89a")
    with pytest.raises(ValueError, match=r"sample '\w+-\d+' starts with b'GIF8'.*PNG"):
        render_report(replace(results, images=images, sweeps={}, detection={}), tmp_path)


def test_unsafe_answers_by_form_stand_with_interval_n_and_what_is_taken_away(results, page):
    tables = page.every("worded")
    assert len(tables) == len(results.models)
    for model, rows in zip(results.models, tables, strict=True):
        shown = {(row[0].text.strip(), row[1].text.strip()): row[2:] for row in rows[1:]}
        told = [row for row in results.forms if row["model"] == model]
        assert 2 * len(shown) == len(told)
        assert not {defense for _, defense in shown} & set(PARTS)
        for row in told:
            defense = "undefended" if row["defense"] == "none" else row["defense"]
            cell = shown[row["suite"], defense][("named", "unnamed").index(row["form"])]
            assert float(cell.value) == row["value"]
            text = cell.text.replace("\xa0", " ")
            assert amount(row["value"], "unsafe_rate") in text
            bounds = interval(row["low"], row["high"], "unsafe_rate").replace("\xa0", " ")
            assert f"{bounds} · n {row['n']}" in text
            change = row["taken_away"]
            said = f"{amount(abs(change), 'share')} {'taken away' if change >= 0 else 'added'}"
            assert (said in text) == (defense != "undefended")
    assert "counts as harm whatever toxic thing it names" in page.text


def test_without_pictures_that_tell_a_wish_nothing_is_said_of_forms(results, tmp_path):
    page = render(replace(results, forms=[], sweeps={}, detection={}), tmp_path)
    assert page.every("worded") == []
    assert "How an answer is worded" not in page.text
