"""From stages to the registry: only what is up to date is published."""

import pytest

from flows.driver import driving
from flows.errors import Stale
from flows.record import publish_all, record_all
from registry.errors import SmokeFailed
from registry.store import open_store

BUNDLE = "artifacts/toy/cmrm/bundle"


@pytest.fixture(autouse=True)
def _own_store(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("record", [publish_all, record_all])
@pytest.mark.parametrize(
    ("path", "says"),
    [
        (f"{BUNDLE}/card.json", f"estimate_shift@toy-cmrm: modified output {BUNDLE}"),
        ("artifacts/toy/none/evaluation/card.json", "evaluate_undefended@toy: modified output"),
        ("artifacts/data/card.json", "prepare_data: modified output artifacts/data"),
        ("reports/metrics.json", "compare: modified output reports"),
    ],
)
def test_a_folder_that_was_changed_is_not_published(built, record, path, says):
    (built.root / path).write_text((built.root / path).read_text() + " ")
    with pytest.raises(Stale) as refused:
        with driving(built.root) as driver:
            record(driver)
    assert says in str(refused.value)
    assert "python -m flows run" in str(refused.value)
    assert open_store(built.root).names() == []


def test_stages_that_are_out_of_date_are_not_published(built):
    built.set("alpha: 1", "alpha: 2")
    done = built.flows("publish")
    assert done.returncode == 1
    assert "estimate_shift@toy-cmrm: modified parameter defenses.cmrm" in done.stderr
    assert "Traceback" not in done.stderr
    assert open_store(built.root).names() == []


def test_nothing_is_published_while_a_run_may_write(built):
    with driving(built.root):
        done = built.flows("publish")
    assert done.returncode == 1
    assert "another run owns this project" in done.stderr


def test_what_is_up_to_date_is_published(built):
    with driving(built.root) as driver:
        (made,) = publish_all(driver).published
    assert (made.name, made.version, made.created) == ("cmrm.toy", "1", True)


def test_a_version_that_was_rolled_back_is_refused_and_the_run_goes_on(built):
    built.set("promote: {}", "promote: {toy: cmrm}")
    store = open_store(built.root)
    with driving(built.root) as driver:
        publish_all(driver)
        store.client.set_model_version_tag("cmrm.toy", "1", "rolled_back", "{}")
        record = record_all(driver)
    ((name, why),) = record.refused
    assert name == "cmrm.toy"
    assert "does not come back by itself" in why


def test_a_version_that_does_not_load_fails_the_run(built):
    built.set("promote: {}", "promote: {toy: cmrm}")
    with pytest.raises(SmokeFailed, match=r"models:/cmrm\.toy/1 cannot be loaded"):
        with driving(built.root) as driver:
            record_all(driver)
    assert "production" not in open_store(built.root).aliases("cmrm.toy")
