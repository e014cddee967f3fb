"""What a run found stays readable in a terminal, however many suites there are."""

import json
import re
from io import StringIO
from itertools import product

from rich.console import Console

from flows.tables import read_channels, result_table

MODELS, DEFENSES = ("lab-llava", "lab-qwen", "lab-intern"), ("none", "cmrm", "cmrm_naive")
CHANNELS = ("text", "text+image", "image", "typographic", "adversarial")


def row(model, defense, channel, metric, n=1500, value=0.25):
    return {"model": model, "defense": defense, "channel": channel, "metric": metric, "n": n,
            "value": value, "low": value - 0.02, "high": value + 0.02, "suites": []}  # fmt: skip


def rows(**more):
    harmful = product(MODELS, DEFENSES, CHANNELS, ("unsafe_rate", "unsafe_rate_lower"))
    harmless = product(
        MODELS, DEFENSES, ("benign", "lookalike"), ("accuracy", "over_refusal_upper")
    )
    return [row(*key, **more) for key in (*harmful, *harmless)]


def drawn(found, width=100):
    console = Console(width=width, record=True, file=StringIO())
    console.print(result_table(found))
    return console.export_text()


def test_three_models_and_three_defenses_fit_a_terminal_of_eighty_columns():
    text = drawn(rows(), width=80)
    assert sum(line.startswith(DEFENSES) for line in text.splitlines()) == 3 * 3
    assert len(text.splitlines()) < 40
    for name in (*MODELS, *DEFENSES, "text+", "typo-", "adver-", "lookalike", "benign", "accurate"):
        assert name in text


def test_an_unsafe_rate_stands_with_interval_n_utility_and_over_refusal():
    text = drawn(rows(), width=80)
    assert text.count("n 1500") == len(CHANNELS) + 2
    for line in text.splitlines():
        if re.match("none|cmrm", line):
            assert line.count("25.0") == len(CHANNELS) + 2
    assert text.count("23.0–27.0") == 9 * (len(CHANNELS) + 2)
    assert "reports/index.html" in text


def test_where_samples_differ_each_number_has_its_own_n():
    found = [*rows(), row("lab-llava", "none", "image", "unsafe_rate", n=40)]
    text = drawn(found, width=120)
    assert text.count("n 40") == 1
    assert text.count("n 1500") == len(CHANNELS) + 1 + 8


def test_what_was_not_measured_is_missing_and_no_zero():
    found = [row("m", "d", "image", "unsafe_rate", value=float("nan"))]
    assert "missing" in drawn(found)
    assert "0.0" not in drawn(found)


def test_without_a_report_there_is_nothing_to_draw(tmp_path):
    assert read_channels(tmp_path) == []
    assert drawn([]) == ""
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "channels.json").write_text(json.dumps(rows()[:1]))
    assert read_channels(tmp_path) == rows()[:1]
