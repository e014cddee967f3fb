"""Before a version goes to production it is loaded and asked in a clean process."""

from pathlib import Path

import pytest

from flows.record import smoke_load
from registry.bundles import Subject
from registry.errors import SmokeFailed
from registry.publish import publish
from registry.store import open_store


@pytest.fixture
def published(built, tiny, monkeypatch) -> Path:
    """A real bundle of a tiny model, published from the toy; gives the model's folder."""
    from hauberk.bundle import binding_of
    from hauberk.defenses.shift import Shift, ShiftSetting, estimate_shift, sample_shifts

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = built.root / "lab" / "toy"
    tiny.model.save_pretrained(model)
    tiny.processor.save_pretrained(model)
    shifts = sample_shifts(tiny.model, tiny.processor, tiny.pictured[:4])
    defense = Shift(estimate_shift(shifts), ShiftSetting(), tiny.processor)
    here = built.root / "artifacts" / "toy" / "cmrm"
    defense.save(here / "bundle", binding_of(tiny.model, tiny.processor), data=[])
    stages = ("evaluate@toy-cmrm", "evaluate_undefended@toy")
    reports = built.root / "reports"
    subject = Subject("toy", "cmrm", here / "bundle", here / "evaluation", stages, reports)
    publish(open_store(built.root), subject)
    return model


def test_a_version_answers_with_and_without_the_defense(built, published):
    seen = smoke_load(built.root)("models:/cmrm.toy/1")
    assert seen["ok"]
    assert seen["model"] == "lab/toy@main"
    assert set(seen["packages"]) == {"torch", "transformers"}
    assert isinstance(seen["with"], str)
    assert isinstance(seen["without"], str)


def test_a_version_that_is_not_there_says_how_to_try_it(built):
    with pytest.raises(SmokeFailed, match=r"not found\nTry it: python -m flows\.smoke models:/"):
        smoke_load(built.root)("models:/cmrm.toy/9")
    with pytest.raises(SmokeFailed, match=r"params\.yaml has no model 'other'"):
        smoke_load(built.root)("models:/cmrm.other/1")


def test_a_version_that_does_not_answer_in_time_is_one_message(built):
    with pytest.raises(SmokeFailed, match=r"has not answered after 0\.1 s\.\nTry it: python -m"):
        smoke_load(built.root, patience=0.1)("models:/cmrm.toy/1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("error: a\n  b", "a\n  b"),
        ("noise\nerror: a", "a"),
        ("Traceback\n  line\nValueError: no", "ValueError: no"),
        ("", "it said nothing"),
    ],
)
def test_what_a_process_said_last_is_found(text, says):
    from flows.record import _said

    assert _said(text) == says
