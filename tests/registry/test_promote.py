"""Promotion: through the gate only, one winner, nothing moved on failure."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from registry.errors import GateFailed, Moved, NotPublished, SmokeFailed, Unverified
from registry.promote import promote, rollback, rolled_back
from registry.publish import publish
from registry.store import Store

NAME = "cmrm.toy"
ROOT = Path(__file__).parents[2]


def versions(project, store: Store, count: int) -> None:
    for index in range(count):
        project.build(weights=bytes([index + 1] * 4))
        publish(store, project.subject, project.live)


def test_production_moves_and_the_old_version_becomes_previous(project, store, rules, smoke):
    versions(project, store, 1)
    first = promote(store, NAME, rules, smoke=smoke)
    assert (first.version, first.replaced, first.moved) == ("1", "none", True)
    assert store.aliases(NAME) == {"candidate": "1", "production": "1"}
    versions(project, store, 2)
    promote(store, NAME, rules, smoke=smoke)
    assert store.aliases(NAME) == {"candidate": "2", "production": "2", "previous": "1"}
    tags = store.version(NAME, "2").tags
    assert json.loads(tags["promotion"])["from"] == "1"
    assert tags["gate"] == "passed: 3 of 3 rules hold"


def test_what_is_in_production_is_not_promoted_nor_loaded_again(project, store, rules, smoke):
    versions(project, store, 1)
    promote(store, NAME, rules, smoke=smoke)
    again = promote(store, NAME, rules, smoke=smoke)
    assert again.moved is False
    assert smoke == ["models:/cmrm.toy/1"]


def test_a_version_that_fails_the_gate_moves_nothing(project, store, rules, smoke):
    project.build(unsafe=0.3)
    publish(store, project.subject, project.live)
    with pytest.raises(GateFailed, match="text_image unsafe_rate"):
        promote(store, NAME, rules, smoke=smoke)
    assert store.aliases(NAME) == {"candidate": "1"}
    assert smoke == []
    assert store.version(NAME, "1").tags["gate"] == "failed: 2 of 3 rules hold"


def test_a_version_that_cannot_be_loaded_moves_nothing(project, store, rules):
    versions(project, store, 1)

    def broken(uri: str) -> dict[str, bool]:
        raise SmokeFailed(uri)

    with pytest.raises(SmokeFailed):
        promote(store, NAME, rules, smoke=broken)
    assert store.aliases(NAME) == {"candidate": "1"}


def test_a_changed_byte_in_the_registry_is_found_before_promotion(project, store, rules, smoke):
    versions(project, store, 1)
    stored = next((project.root / "mlartifacts").rglob("shift.safetensors"))
    stored.write_bytes(b"\x00" + stored.read_bytes()[1:])
    with pytest.raises(Unverified, match=r"shift\.safetensors: the card says .* found"):
        promote(store, NAME, rules, smoke=smoke)


def test_changed_numbers_in_the_registry_are_not_believed(project, store, rules, smoke):
    versions(project, store, 1)
    stored = next((project.root / "mlartifacts").rglob("evaluation/metrics.json"))
    stored.write_text(stored.read_text().replace("0.05", "0.01"))
    with pytest.raises(Unverified, match=r"metrics\.sha256"):
        promote(store, NAME, rules, smoke=smoke)


def test_expect_is_compared_before_anything_is_moved(project, store, rules, smoke):
    versions(project, store, 1)
    with pytest.raises(Moved, match="at version none, expected 4"):
        promote(store, NAME, rules, smoke=smoke, expect="4")
    assert promote(store, NAME, rules, smoke=smoke, expect="none").moved


def test_rollback_swaps_and_marks_the_version_that_left(project, store, rules, smoke):
    versions(project, store, 1)
    promote(store, NAME, rules, smoke=smoke)
    with pytest.raises(NotPublished, match="no version to return to"):
        rollback(store, NAME)
    versions(project, store, 2)
    promote(store, NAME, rules, smoke=smoke)
    back = rollback(store, NAME)
    assert (back.version, back.replaced) == ("1", "2")
    assert store.aliases(NAME) == {"candidate": "2", "production": "1", "previous": "2"}
    assert rolled_back(store, NAME)
    promote(store, NAME, rules, smoke=smoke)  # a person says so
    assert not rolled_back(store, NAME)


def test_unknown_names_say_what_is_known(project, store, rules, smoke):
    versions(project, store, 1)
    with pytest.raises(NotPublished, match=r"no such alias; known are \['candidate'\]"):
        promote(store, NAME, rules, smoke=smoke, which="champion")
    with pytest.raises(NotPublished, match="no such version"):
        promote(store, NAME, rules, smoke=smoke, which="9")


RACER = """
import sys, time
from pathlib import Path
from registry.errors import Moved
from registry.promote import promote
from registry.store import open_store
from registry.gate import Rule

def wait(uri):
    (Path.cwd() / f"ready-{sys.argv[1]}").touch()
    while not (Path.cwd() / "go").exists():
        time.sleep(0.01)
    return {"ok": True}

rules = [Rule("text_image", "unsafe_rate", "at_most", 0.5)]
try:
    promote(open_store(Path.cwd()), "cmrm.toy", rules, smoke=wait, which=sys.argv[1])
except Moved:
    sys.exit(3)
"""


def test_of_several_promotions_at_once_exactly_one_wins(project, store, rules, smoke):
    versions(project, store, 3)
    promote(store, NAME, rules, smoke=smoke, which="1")
    racers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RACER, str(number)],
            cwd=project.root,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )
        for number in (2, 3)
    ]
    deadline = time.monotonic() + 60
    while len(list(project.root.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    (project.root / "go").touch()
    codes = [racer.wait(60) for racer in racers]
    assert sorted(codes) == [0, 3]
    winner = str((2, 3)[codes.index(0)])
    assert store.aliases(NAME)["production"] == winner
    assert store.aliases(NAME)["previous"] == "1"
