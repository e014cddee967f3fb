"""The part about safety layers says what layers.json says, whatever its numbers are."""

from base64 import b64decode
from dataclasses import replace

import pytest

from tasks.report import render_report
from tests.report.reading import Page

BLOCKS = 4


def estimate(value, n=20):
    return {"value": value, "low": max(value - 0.1, 0), "high": min(value + 0.1, 1), "n": n}


def spread(median):
    return {"n": 18, "median": median, "low": median - 1, "high": median + 1, "least": 0, "most": 4}


def made_up(*, fallback=False, injected=0.4, hidden=(0,), located=(1, 2)):
    """A layers.json whose wishes are read in the blocks ``hidden``."""
    windows = [[block] for block in range(BLOCKS)]
    onward = [list(range(block, BLOCKS)) for block in range(BLOCKS)]

    def both(layers):
        gone = set(hidden) & set(layers)
        return {"layers": layers, "harmful": estimate(0.3 if gone else 0.9),
                "harmless": estimate(0.3 if gone else 0.1)}  # fmt: skip

    pictures = [{"layers": w, **estimate(injected * (w == [2]))} for w in windows]
    none = None if fallback else spread(2.5)
    return {
        "blocks": BLOCKS, "width": 1,
        "tokens": [] if fallback else [
            {"token": 3, "text": "sorry", "refused": 0.7, "answered": 0.0},
            {"token": 4, "text": "no", "refused": 0.3, "answered": 0.12},
        ],
        "located": {"layers": list(located), "asked": 20, "refused": 19, "fallback": fallback,
                    "counted": 0 if fallback else 18, "start": none, "start_top5": none,
                    "end": none, "settled": none and spread(3.0)},
        "lens": {"share": [] if fallback else [estimate(k / 5) for k in range(BLOCKS + 1)],
                 "start": [0, 6, 12, 0, 0], "settled": [0, 0, 6, 12, 0]},
        "attention": [estimate(k / 10) for k in range(BLOCKS)],
        "words": {"untouched": {"harmful": estimate(0.95), "harmless": estimate(0.0)},
                  "hidden": [both(w) for w in windows],
                  "hidden_from": [both(w) for w in onward],
                  "skipped": [{"layers": w, "harmful": estimate(0.5)} for w in windows]},
        "pictures": {"told": estimate(0.9), "refused": estimate(0.05), "added": pictures,
                     "replaced": [{"layers": w, **estimate(0.0)} for w in windows]},
        "alignment": {name: [estimate(k / 10) for k in range(BLOCKS)]
                      for name in ("cosine", "centred")},
    }  # fmt: skip


def shown(results, folder, documents):
    bare = replace(results, layers=documents, sweeps={}, detection={})
    return Page(render_report(bare, folder).read_text(encoding="utf-8"))


def said(results, folder, **changes):
    page = shown(results, folder, {"lab-llava": made_up(**changes)})
    return " ".join(page.text.split())


def test_what_was_located_is_said_with_what_counts(results, tmp_path):
    text = said(results, tmp_path)
    assert (
        "Located: blocks 1–2 of 0 to 3. Of 20 harmful requests in words 19 are refused, 18 of them "
        "begin with “sorry” or “no” (so do 12 % of harmless answers); only these count. "
        "Refusal starts after block 1.5 (0.5 to 2.5) and is settled after block 2 (1 to 3)"
    ) in text


def test_where_nothing_was_located_that_is_said(results, tmp_path):
    text = said(results, tmp_path, fallback=True)
    assert "none so that the lens could follow it. So no blocks of 0 to 3 were located" in text
    assert "Located: blocks" not in text


@pytest.mark.parametrize(
    ("hidden", "sentence"),
    [
        ((0,), "hidden in block 0, outside the located blocks."),
        ((0, 2), "hidden in block 0 and block 2, which the lens locates as well."),
        ((), "No one window tells"),
    ],
)
def test_where_the_wish_is_read_is_said_and_whether_the_lens_agrees(
    results, tmp_path, hidden, sentence
):
    assert sentence in said(results, tmp_path, hidden=hidden)


def test_what_injected_words_reach_is_said_or_that_they_reach_nothing(results, tmp_path):
    text = said(results, tmp_path / "some")
    assert (
        "The most that injected words bring about is 40.0 % (30.0 to 50.0, n 20): caption" in text
    )
    assert "Injected words bring about no refusal" in said(results, tmp_path / "none", injected=0)


def test_every_rate_is_in_the_table(results, tmp_path):
    document = made_up()
    page = shown(results, tmp_path, {"lab-llava": document})
    _, *rows = page.table("layers")
    words, pictures = document["words"], document["pictures"]
    expected = [
        *((row, kind) for way in ("hidden", "hidden_from") for row in words[way]
          for kind in ("harmful", "harmless")),
        *((row, "harmful") for row in words["skipped"]),
        *((row, None) for way in ("added", "replaced") for row in pictures[way]),
    ]  # fmt: skip
    assert len(rows) == len(expected)
    for cells, (row, kind) in zip(rows, expected, strict=True):
        rate = row if kind is None else row[kind]
        assert [float(c.value) for c in cells[4:7]] == [rate[k] for k in ("value", "low", "high")]
        assert (cells[3].text == "yes") == (set(row["layers"]) <= {1, 2})


def test_every_plot_is_on_the_page_with_words_and_beside_it(results, tmp_path):
    page = shown(results, tmp_path, {"lab-llava": made_up(), "other": made_up(fallback=True)})
    found = [
        b64decode(a["src"].split(",", 1)[1]).decode()
        for a in page.all("img")
        if (a["src"] or "").startswith("data:image/svg")
    ]
    for model in ("lab-llava", "other"):
        for name in ("lens", "hidden", "captions", "injected"):
            assert (tmp_path / "plots" / f"layers.{model}.{name}.svg").read_text() in found
    assert all(a["alt"] for a in page.all("img"))


def test_without_layers_the_page_has_no_such_part(results, tmp_path):
    page = shown(results, tmp_path, {})
    assert not any(a.get("id") == "layers" for _, a in page.elements)
