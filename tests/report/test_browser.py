"""The page as a browser sees it: no error, nothing blocked, tables alive."""

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


@pytest.fixture(scope="module")
def opened(index: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    """Open the page; return what became of it, and what the browser had to say."""
    profile = tmp_path_factory.mktemp("profile")
    done = subprocess.run(
        [BROWSER, *QUIET, f"--user-data-dir={profile}", "--dump-dom", index.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Page(done.stdout), done.stderr


def test_the_browser_complains_about_nothing(opened: tuple[Page, str]) -> None:
    complaints = [line for line in opened[1].splitlines() if "CONSOLE" in line]
    assert not complaints


def test_every_row_is_rendered(opened: tuple[Page, str], results: Comparison) -> None:
    page, _ = opened
    keys = {(row["model"], row["suite"], row["defense"]) for row in results.metrics}
    assert len(page.table("measured")) - 1 == len(keys)


def test_tables_can_be_sorted_and_filtered(opened: tuple[Page, str]) -> None:
    page, _ = opened
    sortable = [rows for a, rows in page.tables if "sortable" in (a.get("class") or "")]
    assert len(page.all("button")) == sum(len(rows[0]) for rows in sortable)
    assert len(page.all("select")) == 3  # model, suite, defense
