"""Labelling sheets: blind, inert in a spreadsheet, read back intact, and put to use."""

import csv
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hauberk.data.lab import build_suite
from hauberk.data.samples import write_suite
from hauberk.errors import BadData, BadParams
from hauberk.evaluation.label import label_read, label_write
from hauberk.evaluation.label_correction import corrected, corrected_by_model, unrepresented
from hauberk.evaluation.label_sheet import (
    COLUMNS,
    LABELS,
    Sheet,
    _alive,
    _inert,
    draw,
    key_of,
    read_sheet,
    read_sheets,
    write_sheet,
)
from hauberk.evaluation.run import Record, write_records

BLANK = Record("", "", "", "m", "d", "", "refuse", "", "", "safe", "safe", None, 0.0, 0)
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def run(number, *, suite="text", outcome="safe", text="answer", **fields):
    return [
        replace(BLANK, sample_id=f"{suite}-{outcome}-{place}", suite=suite, outcome=outcome,
                question=f"harmful request {place}", response=f"{text} {place}", **fields)
        for place in range(number)
    ]  # fmt: skip


RECORDS = [
    *run(40, outcome="refused"), *run(10, outcome="harmful"), *run(3, suite="image"),
    *run(2, suite="image", outcome="judge_error"),
]  # fmt: skip


def fill(path, labels, delimiter=",", encoding="utf-8-sig"):
    """Fill in a sheet as a person does: by key, with whatever a spreadsheet makes of the file."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = labels.get(row["key"], "")
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def sheet(tmp_path):
    write_sheet(RECORDS, tmp_path / "sheet.csv", n=12)
    return tmp_path / "sheet.csv"


# --- the draw ---------------------------------------------------------------------------------


def test_every_stratum_is_drawn_alike_until_it_is_exhausted():
    drawn = draw(RECORDS, 12)
    counts = {}
    for record in drawn:
        counts[record.suite, record.outcome] = counts.get((record.suite, record.outcome), 0) + 1
    assert sum(counts.values()) == 12
    assert counts["image", "judge_error"] == 2
    assert counts["image", "safe"] == 3
    assert {counts["text", "refused"], counts["text", "harmful"]} <= {3, 4}
    assert len(draw(RECORDS, 1000)) == len(RECORDS)


@given(st.integers(4, 60), st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_draw_depends_on_the_answers_and_the_seed_alone(n, seed, rng):
    shuffled = list(RECORDS)
    rng.shuffle(shuffled)
    drawn = draw(RECORDS, n, seed)
    assert draw(shuffled, n, seed) == drawn
    assert len(set(map(key_of, drawn))) == len(drawn) == min(n, len(RECORDS))


def test_another_seed_draws_others_and_the_order_tells_no_outcome():
    drawn = draw(RECORDS, 20)
    assert set(map(key_of, drawn)) != set(map(key_of, draw(RECORDS, 20, seed=1)))
    outcomes = [record.outcome for record in drawn]
    assert outcomes != sorted(outcomes)
    assert outcomes != sorted(outcomes, reverse=True)


@pytest.mark.parametrize(("given_", "arguments", "told"), [
    ([], {"n": 3}, "no answers to label"),
    (RECORDS, {"n": 3}, "3 answers cannot stand for 4 strata of suite and outcome; draw 4"),
    (RECORDS, {"n": 9, "strata": ["suit"]}, r"strata \['suit'\] are unknown; known are sample_id"),
    (RECORDS, {"n": 9, "strata": ["seconds"]}, r"\['seconds'\] are unknown"),
])  # fmt: skip
def test_a_draw_that_cannot_be_says_why_and_leaves_nothing(tmp_path, given_, arguments, told):
    with pytest.raises(BadParams, match=told):
        write_sheet(given_, tmp_path / "sheet.csv", **arguments)
    assert list(tmp_path.iterdir()) == []


# --- the sheet --------------------------------------------------------------------------------


def test_a_sheet_shows_no_outcome_no_model_and_no_defense(tmp_path):
    records = [replace(record, model="lab-secret", defense="shield") for record in RECORDS]
    write_sheet(records, tmp_path / "sheet.csv", n=55)
    for path in (tmp_path / "sheet.csv", tmp_path / "sheet.html"):
        text = path.read_text(encoding="utf-8")
        for hidden in ("lab-secret", "shield", "judge_error", "text-", "image-"):
            assert hidden not in text
    with (tmp_path / "sheet.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 55
    assert {row["label"] for row in rows} == {""}


def test_a_sheet_that_is_there_is_never_overwritten(sheet):
    filled = fill(sheet, {key_of(RECORDS[0]): "safe"}).read_bytes()
    with pytest.raises(BadParams, match=r"sheet\.csv and .*sheet\.html: already there"):
        write_sheet(RECORDS, sheet, n=12)
    assert sheet.read_bytes() == filled
    with pytest.raises(BadParams, match=r"sheet\.xlsx: a sheet is a CSV"):
        write_sheet(RECORDS, sheet.with_suffix(".xlsx"), n=12)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    from pathlib import Path

    kept = Path.write_bytes

    def full(path, content):
        if path.name == "sheet.csv.part":
            raise OSError("no space left on device")
        return kept(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        write_sheet(RECORDS, tmp_path / "sheet.csv", n=12)
    assert list(tmp_path.iterdir()) == []


NASTY = [
    "=1+1", "+1", "-1", "@SUM(A1)", "'quoted", "'=1", " =1", "\t=1", "\r\n=1", 'a "b", c; d',
    "line\nline", "<script>alert(1)</script>", "</script><b>", "a\x00b", "\ud800", "", "é 漢 🙂",
]  # fmt: skip


def test_no_cell_is_a_formula_and_every_one_is_read_back_intact(tmp_path):
    records = [replace(BLANK, sample_id=f"s{n}", response=text) for n, text in enumerate(NASTY)]
    write_sheet(records, tmp_path / "sheet.csv", n=len(NASTY))
    with (tmp_path / "sheet.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for cell in (cell for row in rows for cell in row.values()):
        assert not re.match(r"\s*[=+@-]|[\t\r]", cell)
    wanted = {key_of(record): record.response.replace("\ud800", "?") for record in records}
    assert {row["key"]: _alive(row["response"]) for row in rows} == wanted


@given(st.text(st.sampled_from("=+-@'\t\r\n a\"")))
def test_what_is_made_inert_comes_alive_as_it_was(text):
    assert _alive(_inert(text)) == text
    assert not re.match(r"\s*[=+@-]|[\t\r]", _inert(text))


@pytest.mark.parametrize("delimiter", list(",;\t"))
def test_a_sheet_is_read_as_spreadsheets_of_any_country_save_it(sheet, delimiter):
    drawn = draw(RECORDS, 12)
    labels = {key_of(record): " Harmful " for record in drawn[:5]}
    found = read_sheet(fill(sheet, labels, delimiter))
    assert found.labels == dict.fromkeys(labels, "harmful")
    assert found.rows == 12


def test_a_sheet_that_nobody_filled_in_has_no_labels_and_blank_rows_are_none(sheet):
    sheet.write_bytes(sheet.read_bytes() + b",,,,,\r\n\r\n")
    found = read_sheet(sheet)
    assert (found.labels, found.notes, found.rows) == ({}, {}, 12)


@pytest.mark.parametrize(("content", "told"), [
    (b"", r"columns \['key', 'label'\] are missing"),
    (b"key,label\r\n", "no row below the first"),
    (b"key,verdict\r\nk1,safe\r\n", r"columns \['label'\] are missing in the first row \['key'"),
    (b"key,label\r\nk1,safe\r\nk2,sfae\r\n", "row 3: label 'sfae' is unknown; write harmful, safe"),
    (b"key,label\r\nk1,safe\r\nk1,safe\r\n", "row 3: 'k1' stands in row 2 already"),
    (b"key,label\r\n,safe\r\n", "row 2: it has no key"),
    (b"key,label\r\nk1,safe,more\r\n", "row 2: 3 cells where 2 columns are"),
    (b'key,label\r\nk1,"safe\r\n', "between quotation marks"),
    (b"key,label\r\nk1,\xe9\r\n", "byte 14 is no UTF-8; save it as 'CSV UTF-8'"),
])  # fmt: skip
def test_a_sheet_that_cannot_be_read_names_the_row_and_the_cure(tmp_path, content, told):
    (tmp_path / "sheet.csv").write_bytes(content)
    with pytest.raises(BadData, match=rf"sheet\.csv.*{told}"):
        read_sheet(tmp_path / "sheet.csv")


def test_no_sheet_is_told_how_to_make_one(tmp_path):
    with pytest.raises(BadData, match="no such sheet; `hauberk label write` makes one"):
        read_sheet(tmp_path / "sheet.csv")


# --- the page ---------------------------------------------------------------------------------

USE = """
for (const [index, article] of [...document.querySelectorAll("article")].entries()) {
  if (index % 2 === 0) article.querySelectorAll("button")[index % 4].click();
  const note = article.querySelector("input");
  note.value = "=note " + index;
  note.dispatchEvent(new Event("input"));
}
const seen = document.createElement("data");
seen.value = JSON.stringify({csv: csv(), shown: document.querySelectorAll("img").length,
  count: document.getElementById("count").textContent, made: document.querySelector("b") !== null});
document.body.append(seen);
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; scripts/chromium.sh installs it")
def test_what_the_page_exports_is_the_sheet_filled_in(tmp_path):
    records = [replace(BLANK, sample_id=f"s{n}", response=text) for n, text in enumerate(NASTY)]
    pictures = {f"s{n}": Image.new("RGBA", (900, 20 + n)) for n in range(5)}
    path, page = tmp_path / "sheet.csv", tmp_path / "sheet.html"
    write_sheet(records, path, n=len(records), pictures=pictures)
    source = page.read_text(encoding="utf-8")
    opened, removed = re.subn(r"<meta http-equiv=[^>]*>", "", source)
    assert removed == 1
    page.write_text(opened.replace("</body>", f"<script>{USE}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--no-first-run",
         "--disable-background-networking", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    seen = json.loads(html.unescape(re.search(r'<data value="(.*?)">', done.stdout, re.S)[1]))
    assert (seen["shown"], seen["made"]) == (5, False)
    assert seen["count"] == f"{len(range(0, len(NASTY), 2))} of {len(NASTY)} labelled"
    before = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(keepends=True)))
    path.write_bytes(seen["csv"].encode())
    found = read_sheet(path)
    assert found.rows == len(NASTY)
    order = [row[0] for row in before[1:]]
    assert found.labels == {
        key: list(LABELS)[index % 4] for index, key in enumerate(order) if index % 2 == 0
    }
    assert found.notes == {key: f"=note {index}" for index, key in enumerate(order)}
    with path.open(newline="", encoding="utf-8") as file:
        exported = {row["key"]: row["response"] for row in csv.DictReader(file)}
    assert exported.keys() == {key_of(record) for record in records}
    for record in records:
        plain = record.response.replace("\ud800", "?")
        assert _alive(exported[key_of(record)]) == plain


def test_pictures_are_small_inside_the_page_and_nothing_is_fetched(tmp_path):
    records = run(1)
    noise = np.random.default_rng(0).integers(0, 255, (800, 1200, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    write_sheet(records, tmp_path / "s.csv", n=1, pictures={records[0].sample_id: picture})
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "data:image/jpeg;base64," in page
    assert len(page) < 150_000
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)\w", page.replace("http-equiv", ""))
    assert "see the page" in (tmp_path / "s.csv").read_text(encoding="utf-8-sig")


# --- what labels are worth --------------------------------------------------------------------


def population(seed, size=1200, sensitivity=0.7, specificity=0.9, unsafe=0.2):
    """Answers whose truth is known, under a judge with errors; in text, what is true of them."""
    rng = np.random.default_rng(seed)
    truth = rng.random(size) < unsafe
    called = np.where(truth, rng.random(size) < sensitivity, rng.random(size) >= specificity)
    records = [
        replace(BLANK, sample_id=f"s{place}", suite="text", outcome="harmful" if say else "safe",
                outcome_keyword="safe", response=f"{place} {'harmful' if true else 'safe'}")
        for place, (true, say) in enumerate(zip(truth, called, strict=True))
    ]  # fmt: skip
    return records, truth.mean()


def labels_of(records):
    return {key_of(record): record.response.split()[1] for record in records}


def rows_of(records, sheet):
    return {(row["suite"], row["metric"]): row for row in corrected(records, sheet)}


def as_sheet(labels):
    return Sheet(labels, {}, len(labels))


def test_with_every_answer_labelled_the_corrected_rate_is_the_true_one():
    records, truth = population(0)
    rows = rows_of(records, as_sheet(labels_of(records)))
    assert rows["text", "unsafe_rate_exact_labelled"]["value"] == pytest.approx(truth)
    assert rows["all", "exact_unsafe_rate_sensitivity"]["value"] == pytest.approx(0.7, abs=0.07)
    assert rows["all", "exact_unsafe_rate_specificity"]["value"] == pytest.approx(0.9, abs=0.03)


def test_a_row_that_nobody_could_tell_takes_no_weight_from_its_stratum():
    records = [
        replace(BLANK, sample_id=f"s{place}", suite="text", response=f"{place} harmful",
                outcome="harmful" if place < 50 else "safe")
        for place in range(100)
    ]  # fmt: skip
    labels = labels_of([*records[:10], *records[50:60]])
    unclear = dict.fromkeys(list(labels)[:8], "unclear")
    row = rows_of(records, as_sheet(labels | unclear))["all", "exact_unsafe_rate_sensitivity"]
    assert row["value"] == pytest.approx(0.5)
    nothing = as_sheet(dict.fromkeys(labels, "unclear"))
    assert unrepresented(records, nothing) == len(records)


def test_weights_undo_a_draw_that_took_as_many_of_every_outcome():
    """Unweighted, half of the labelled answers would be called harmful, and so would be found."""
    held, estimates, true = 0, [], []
    repeats = 60
    for seed in range(repeats):
        records, truth = population(seed)
        rows = rows_of(records, as_sheet(labels_of(draw(records, 300, seed))))
        row = rows["text", "unsafe_rate_exact_labelled"]
        estimates.append(row["value"])
        true.append(truth)
        held += row["low"] <= truth <= row["high"]
        sensitivity = rows["all", "exact_unsafe_rate_sensitivity"]
        assert sensitivity["low"] <= sensitivity["value"] <= sensitivity["high"]
    assert np.mean(estimates) == pytest.approx(np.mean(true), abs=0.02)
    assert held / repeats >= 0.9


def test_what_is_unclear_or_not_labelled_is_left_out_and_counted():
    records, _ = population(1, size=50)
    labels = labels_of(records[:20])
    unclear = dict.fromkeys(labels_of(records[20:25]), "unclear")
    one, other = (rows_of(records, as_sheet(found)) for found in (labels, labels | unclear))
    known = ("all", "exact_unsafe_rate_specificity")
    assert one[known]["n"] == other[known]["n"]
    only = [record for record in records if record.outcome == "safe"]
    assert unrepresented(records, as_sheet(labels_of(only))) == len(records) - len(only)


def test_judges_that_cannot_be_measured_have_rows_without_a_value():
    records, _ = population(2, size=30)
    rows = rows_of(records, as_sheet({}))
    assert rows["text", "unsafe_rate_exact_labelled"]["value"] is None
    assert rows["text", "unsafe_rate_exact_labelled"]["n"] == 30
    found = rows_of(records, as_sheet(labels_of(records)))
    # the second judge calls nothing harmful: no better than chance
    assert found["text", "unsafe_rate_keyword_labelled"]["value"] is None
    assert {tuple(row) for row in found.values()} == {
        ("model", "defense", "suite", "metric", "value", "n", "low", "high")
    }


def test_refusals_of_harmless_requests_are_corrected_as_well():
    records = [
        *run(10, outcome="refused", expected="answer", suite="benign"),
        *run(30, expected="answer", suite="benign"),
    ]
    labels = {key_of(r): "refused" if r.outcome == "refused" else "safe" for r in records}
    rows = rows_of(records, as_sheet(labels))
    assert rows["benign", "over_refusal_exact_labelled"]["value"] == 0.25
    assert not [name for _, name in rows if "unsafe" in name]


def test_labels_of_other_answers_are_refused():
    records, _ = population(3, size=20)
    changed = [replace(record, response=record.response + " !") for record in records]
    with pytest.raises(BadData, match=r"20 labelled rows.*of none of the 20 answers given"):
        corrected(changed, as_sheet(labels_of(records)))


def test_sheets_of_a_folder_are_read_as_one_unless_they_contradict_each_other(tmp_path):
    with pytest.raises(BadData, match="holds no sheet; `hauberk label write` makes one"):
        read_sheets(tmp_path)
    keys = [key_of(record) for record in RECORDS]
    for name, seed in (("a.csv", 0), ("b.csv", 1)):
        write_sheet(RECORDS, tmp_path / name, n=20, seed=seed)
        fill(tmp_path / name, dict.fromkeys(keys, "safe"))
    found = read_sheets(tmp_path)
    assert found.rows == 40
    assert 20 < len(found.labels) < 40
    fill(tmp_path / "b.csv", dict.fromkeys(keys, "harmful"))
    with pytest.raises(BadData, match=r"b\.csv: 'k\w+' is 'harmful', in another sheet .*'safe'"):
        read_sheets(tmp_path)


def test_each_model_is_corrected_by_the_labels_of_its_own_answers_and_no_other_run():
    one, two = (population(seed, size=200)[0] for seed in (4, 5))
    other = [replace(record, model="other") for record in two]
    untold = [replace(record, defense="untold") for record in two]
    sheet = as_sheet(labels_of([*one, *other]))
    found = corrected_by_model([*one, *untold, *other], sheet)
    assert found == [
        *corrected(one, as_sheet(labels_of(one))), *corrected(other, as_sheet(labels_of(other)))
    ]  # fmt: skip
    assert corrected_by_model(one, as_sheet({})) == []
    with pytest.raises(BadData, match="200 labelled rows"):
        corrected_by_model(one, sheet)


def test_from_files_to_rows(tmp_path):
    samples = build_suite("text_image", "test", 8, seed=1)
    suite = write_suite(samples, tmp_path / "text_image.parquet")
    records = [
        replace(BLANK, sample_id=sample.sample_id, suite="text_image", response=f"answer {place}",
                outcome="harmful" if place % 2 else "refused")
        for place, sample in enumerate(samples)
    ]  # fmt: skip
    responses = write_records(records, tmp_path / "responses.jsonl")
    sheet = tmp_path / "made" / "sheet.csv"
    assert label_write([responses], sheet, n=6, suites=[suite]) == 6
    assert sheet.with_suffix(".html").read_text(encoding="utf-8").count("data:image/jpeg") == 6
    fill(sheet, {key_of(record): "harmful" for record in records[::2]})
    found = label_read(sheet, [responses])
    assert (found["rows"], found["unclear"]) == (6, 0)
    assert 0 < found["labelled"] <= 4
    assert found["unrepresented"] == 4
    assert json.dumps(found)
    with pytest.raises(BadData, match=r"nothing\.jsonl: no such file"):
        label_read(sheet, [tmp_path / "nothing.jsonl"])
