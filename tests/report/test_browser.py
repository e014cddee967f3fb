"""The page as a browser sees it: no error, nothing blocked, tables alive."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.report import Comparison
from tests.report.reading import Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--enable-logging=stderr",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here; scripts/chromium.sh installs it where apt is"
)


USE = """
const table = document.getElementById("measured-1"), rows = [...table.tBodies[0].rows];
const shown = (column, read) =>
  [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => read(row.cells[column]));
const sort = () => {
  [...table.tHead.rows].at(-1).cells[3].querySelector("button").click();
  return shown(3, (cell) => cell.dataset.v);
};
const filter = (value) => {
  const select = document.querySelectorAll("select")[1];  // after the channel's
  select.value = value;
  select.dispatchEvent(new Event("change", {bubbles: true}));
  return shown(1, (cell) => cell.dataset.v);
};
const seen = document.createElement("data");
seen.value = JSON.stringify({up: sort(), down: sort(), some: filter("image"), all: filter("")});
document.body.append(seen);
"""
"""What a reader does: sorts by unsafe answers twice, then looks at one suite and at all again."""


def browse(page: Path, profile: Path) -> tuple[Page, str]:
    """Open a page; return what became of it, and what the browser had to say."""
    done = subprocess.run(
        [BROWSER, *QUIET, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Page(done.stdout), done.stderr


@pytest.fixture(scope="module")
def opened(index: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    return browse(index, tmp_path_factory.mktemp("profile"))


def test_the_browser_complains_about_nothing(opened: tuple[Page, str]) -> None:
    complaints = [line for line in opened[1].splitlines() if "CONSOLE" in line]
    assert not complaints


def test_every_row_is_rendered(opened: tuple[Page, str], results: Comparison) -> None:
    page, _ = opened
    keys = {(row["model"], row["suite"], row["defense"]) for row in results.metrics
            if row["suite"] != "all"}  # fmt: skip
    assert sum(len(rows) - 1 for rows in page.every("measured")) == len(keys)


def test_tables_can_be_sorted_and_filtered(opened: tuple[Page, str], results: Comparison) -> None:
    page, _ = opened
    sortable = [rows for a, rows in page.tables if "sortable" in (a.get("class") or "")]
    assert len(page.all("button")) == sum(len(rows[0]) for rows in sortable)
    assert len(page.all("select")) == 3 * len(results.models)  # channel, suite, defense


def test_sorting_orders_the_rows_and_filtering_hides_the_others(
    index: Path, results: Comparison, tmp_path: Path
) -> None:
    source = index.read_text(encoding="utf-8")
    open_to_scripts, removed = re.subn(
        r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", source
    )
    assert removed == 1  # the policy of the page would forbid this test its script
    (tmp_path / "used.html").write_text(
        open_to_scripts.replace("</body>", f"<script>{USE}</script></body>"), encoding="utf-8"
    )
    page, _ = browse(tmp_path / "used.html", tmp_path / "profile")
    seen = json.loads(page.all("data")[0]["value"] or "")
    first = [row for row in results.metrics if row["model"] == results.models[0]]
    unsafe = [row["value"] for row in first if row["metric"] == "unsafe_rate"]
    keys = {(row["suite"], row["defense"]) for row in first if row["suite"] != "all"}
    unmeasured = [""] * (len(keys) - len(unsafe))  # last, whichever way the rest is sorted
    assert seen["up"] == [*map(str, sorted(unsafe)), *unmeasured]
    assert seen["down"] == [*map(str, sorted(unsafe, reverse=True)), *unmeasured]
    assert seen["some"] == ["image"] * sum(suite == "image" for suite, _ in keys)
    assert sorted(seen["all"]) == sorted(suite for suite, _ in keys)
