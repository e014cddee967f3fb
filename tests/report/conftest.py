"""One made-up comparison and its page, shared by the tests that only read them."""

from pathlib import Path

import pytest

from tasks.report import Comparison, render_report
from tests.report.made_up import GUARDED, GUARDED_WRONG, MODELS, comparison
from tests.report.reading import Page


@pytest.fixture(scope="session")
def results() -> Comparison:
    return comparison(MODELS, GUARDED, GUARDED_WRONG)


@pytest.fixture(scope="session")
def index(results: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_report(results, tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="session")
def page(index: Path) -> Page:
    return Page(index.read_text(encoding="utf-8"))
