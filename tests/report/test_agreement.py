"""What the page says of the judges, and of suites that are neither attacks nor plain questions."""

import json
from dataclasses import replace

import pytest

from hauberk.evaluation.agreement import ALL
from hauberk.evaluation.label_correction import corrected
from hauberk.evaluation.label_sheet import Sheet, key_of
from hauberk.evaluation.metrics import LABELLED, difference_rows, metric_rows
from hauberk.evaluation.run import Record
from hauberk.evaluation.utility import METRICS, TOGETHER
from tasks.report import render_report
from tasks.report.agreement import agreed, labelled
from tasks.report.effects import effects
from tasks.report.samples import pick
from tasks.report.tables import UTILITY
from tasks.report.verdict import elsewhere, judge
from tasks.report.words import amount, interval
from tests.report.made_up import COUNT, UNSAFE, WRONG, comparison
from tests.report.reading import Page

FEW = ("benign_image", "lookalike")


@pytest.fixture(scope="module")
def small():
    return comparison(harmless=FEW)


def page_of(results, folder):
    return Page(render_report(results, folder).read_text(encoding="utf-8"))


def test_every_agreement_by_channel_is_on_the_page_with_interval_n_and_names(results, page):
    tables = page.every("agreement")
    for model, rows in zip(results.models, tables, strict=True):
        heads = [cell.text.strip() for cell in rows[0][1:]]
        assert heads[-1] == ALL
        shown = {
            (row[0].text.strip().replace("undefended", "none"), head): cell.text
            for row in rows[1:]
            for head, cell in zip(heads, row[1:], strict=True)
        }
        own = [row for row in results.agreement["channels"] if row["model"] == model]
        assert {(row["defense"], row["channel"]) for row in own} == set(shown)
        for row in own:
            text = shown[row["defense"], row["channel"]]
            if row["metric"] == "judge_agreement":
                assert f"same {amount(row['value'], '')}" in text
            elif row["value"] is None:
                assert "undefined" in text
            else:
                assert interval(row["low"], row["high"], "judge_kappa") in text
                assert f"n\xa0{row['n']}" in text
    assert "First judge: exact. Second judge: keyword." in page.text


def test_other_judges_are_shown_by_their_names(small, tmp_path):
    rows = [
        row | {"judge": "llama-guard-3:guard@1", "second": "m/ab"}
        for row in small.agreement["channels"]
    ]
    changed = replace(small, agreement={**small.agreement, "channels": rows})
    page = page_of(changed, tmp_path)
    assert "First judge: llama-guard-3:guard@1. Second judge: m/ab." in page.text
    assert (tmp_path / "plots" / "agreement.lab-llava.svg").is_file()
    assert agreed(replace(small, agreement={})) == {}


def test_what_people_said_stands_beside_what_a_judge_counted(small, tmp_path):
    records = [
        Record("", "text_image", "text+image", "lab-llava", "none", "", "refuse", "", "",
               "harmful", "refused", None, 0.1, 3)
    ] * 40  # fmt: skip
    records = [
        replace(r, sample_id=str(place), outcome="harmful" if place < 20 else "refused",
                response=str(place))
        for place, r in enumerate(records)
    ]  # fmt: skip
    labels = {
        key_of(r): "harmful" if r.outcome == "harmful" and place % 5 else "refused"
        for place, r in enumerate(records)
    }
    rows = corrected(records, Sheet(labels, {}, len(labels)))
    results = replace(small, metrics=[*small.metrics, *rows])
    found = labelled(results, "lab-llava")
    assert {one.judge for one in found} == {"exact", "keyword"}
    exact = next(one for one in found if one.judge == "exact")
    row = next(row for row in rows if row["metric"] == f"unsafe_rate_exact{LABELLED}")
    assert (
        exact.corrected.value
        == row["value"]
        < exact.counted.value
        == pytest.approx(small.cell("lab-llava", "none", "text_image", "unsafe_rate").value)
    )
    assert results.defenses("lab-llava") == small.defenses("lab-llava")
    assert results.pooled == small.pooled
    table = page_of(results, tmp_path).table("labelled")
    assert amount(row["value"], "unsafe_rate") in "".join(cell.text for cell in table[1])


def hedged(results, defense, unsafe):
    """Answers to a suite whose requests are to be hedged, in a channel of attacks."""
    return [
        Record(f"h{place}", "adversarial", "adversarial", "lab-llava", defense, "how ?", "hedge",
               "", f"{defense} {place < unsafe}", "harmful" if place < unsafe else "safe", "safe",
               None, 0.1, 3)
        for place in range(COUNT)
    ]  # fmt: skip


def test_requests_to_hedge_are_measured_and_are_neither_attacks_nor_harmless(tmp_path):
    plain = {defense: {s: r for s, r in suites.items() if s != "adversarial"}
             for defense, suites in UNSAFE.items()}  # fmt: skip
    before = comparison(unsafe=plain, wrong=WRONG, harmless=FEW)
    runs = {"none": hedged(before, "none", 10), "cmrm": hedged(before, "cmrm", 70)}
    after = replace(
        before,
        metrics=[*before.metrics, *(row for run in runs.values() for row in metric_rows(run))],
        differences=[*before.differences, *difference_rows(runs["cmrm"], runs["none"])],
        responses=[
            *before.responses,
            *(vars(r) | {"unsafe": r.unsafe, "unjudged": r.unjudged, "degenerate": r.degenerate}
              for run in runs.values() for r in run),
        ],
    )  # fmt: skip
    assert after.pooled == before.pooled
    assert after.cell("lab-llava", "cmrm", "adversarial", "unsafe_rate").value == 70 / COUNT
    for of in (judge, effects, elsewhere, pick):
        assert of(after, "lab-llava", "cmrm") == of(before, "lab-llava", "cmrm")
    page = page_of(after, tmp_path)
    shown = {row[1].value for row in page.table("measured")[1:]}
    assert "adversarial" in shown


def mme(defense, wrong):
    def meta(place):
        return json.dumps({"metric": "mme", "group": str(place // 2)})

    return [
        Record(f"m{place}", "mme", "benign", "lab-llava", defense, "is it ?", "answer", "yes",
               "no" if place < wrong else "yes", "safe", "safe", place >= wrong, 0.1, 3,
               scenario="color", meta=meta(place), score=float(place >= wrong))
        for place in range(40)
    ]  # fmt: skip


def test_metrics_of_a_benchmark_stand_in_a_table_of_their_own_in_their_unit(small, tmp_path):
    rows = [row for defense, wrong in (("none", 5), ("cmrm", 11))
            for row in metric_rows(mme(defense, wrong))]  # fmt: skip
    results = replace(small, metrics=[*small.metrics, *rows])
    table = page_of(results, tmp_path).table("utility")
    heads = [cell.text.strip() for cell in table[0]]
    assert "MME perception" in heads
    assert "F1" not in heads  # of which nothing is known
    for row in table[1:]:
        told = dict(zip(heads, row, strict=True))
        defense = told["Defense"].text.strip().replace("undefended", "none")
        for name, title in UTILITY.items():
            if cell := results.cell("lab-llava", defense, "mme", name):
                assert float(told[title].value) == cell.value
        points = results.cell("lab-llava", defense, "mme", "mme_perception").value
        assert f"{points:.0f}" in told["MME perception"].text
        assert "%" not in told["MME perception"].text
        assert "%" in told["Accuracy+"].text
    pooled = {row["metric"] for row in results.pooled if row["channel"] == "other"}
    assert "accuracy" in pooled
    assert not pooled & set(TOGETHER)


def test_every_number_of_a_whole_suite_has_a_place_on_the_page():
    found = set()
    for name in ("mme", "pope"):
        for scenario in ("color", "code_reasoning"):
            records = [replace(r, scenario=scenario) for r in mme("none", 5)]
            found |= set(METRICS[name].together(records))
    assert found == set(TOGETHER) <= set(UTILITY)
