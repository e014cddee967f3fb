"""Promotion: through the gate only, one winner, nothing moved on failure."""

import contextlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.errors import (
    GateFailed,
    Moved,
    NotPublished,
    RolledBack,
    SmokeFailed,
    Unverified,
)
from registry.gate import Rule
from registry.promote import promote, rollback, rolled_back
from registry.publish import publish
from registry.store import Store

NAME = "cmrm.toy"
ROOT = Path(__file__).parents[2]


def versions(project, store: Store, count: int) -> None:
    for index in range(count):
        project.build(weights=bytes([index + 1] * 4))
        publish(store, project.subject, project.live)


def in_production(project, store: Store, rules, smoke, count: int) -> None:
    for number in range(1, count + 1):
        versions(project, store, number)
        promote(store, NAME, rules, smoke=smoke)


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


def test_values_of_other_samples_are_held_against_production_as_unpaired(
    project, store, rules, smoke
):
    versions(project, store, 1)
    promote(store, NAME, rules, smoke=smoke)
    unpaired = "unpaired: production was measured on other samples, n = 40"
    project.build(unsafe=0.08, question="what else is it ?")  # by 0.03, where 0.02 are allowed
    publish(store, project.subject, project.live)
    with pytest.raises(GateFailed, match=rf"changed by \+0\.03 \(n = 40\); {unpaired}"):
        promote(store, NAME, rules, smoke=smoke)
    project.build(unsafe=0.01, question="what else is it ?")
    publish(store, project.subject, project.live)
    done = promote(store, NAME, rules, smoke=smoke)
    assert done.moved
    assert [check.says.endswith(unpaired) for check in done.verdict.checks] == [False, False, True]


def test_answers_that_batching_changed_can_be_refused(project, store, rules, smoke):
    rules.append(Rule("all", "differing_alone", "at_most", 0.2))
    project.build(differing=("1",))
    publish(store, project.subject, project.live)
    with pytest.raises(GateFailed, match=r"differing_alone at most 0\.2: measured 0\.25 \(n = 4\)"):
        promote(store, NAME, rules, smoke=smoke)
    project.build(weights=b"other")
    publish(store, project.subject, project.live)
    assert promote(store, NAME, rules, smoke=smoke).moved


def test_a_version_that_cannot_be_loaded_moves_nothing(project, store, rules):
    versions(project, store, 1)

    def broken(uri: str) -> dict[str, bool]:
        raise SmokeFailed(uri)

    with pytest.raises(SmokeFailed):
        promote(store, NAME, rules, smoke=broken)
    assert store.aliases(NAME) == {"candidate": "1"}


def test_a_version_is_loaded_anew_each_time_it_comes_to_production(project, store, rules, smoke):
    in_production(project, store, rules, smoke, 2)
    promote(store, NAME, rules, smoke=smoke, which="1")
    rollback(store, NAME, smoke=smoke)
    assert [uri.rpartition("/")[2] for uri in smoke] == ["1", "2", "1", "2"]


def test_a_version_that_does_not_load_any_more_is_nothing_to_return_to(
    project, store, rules, smoke
):
    in_production(project, store, rules, smoke, 2)

    def broken(uri: str) -> dict[str, bool]:
        raise SmokeFailed(uri)

    with pytest.raises(SmokeFailed, match=r"models:/cmrm\.toy/1"):
        rollback(store, NAME, smoke=broken)
    assert store.aliases(NAME)["production"] == "2"
    assert rolled_back(store, NAME, "2") == []


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


def test_rollback_returns_and_marks_the_version_that_left(project, store, rules, smoke):
    versions(project, store, 1)
    promote(store, NAME, rules, smoke=smoke)
    with pytest.raises(NotPublished, match="nothing to return to"):
        rollback(store, NAME, smoke=smoke)
    versions(project, store, 2)
    promote(store, NAME, rules, smoke=smoke)
    back = rollback(store, NAME, smoke=smoke)
    assert (back.version, back.replaced) == ("1", "2")
    assert store.aliases(NAME) == {"candidate": "2", "production": "1"}
    assert rolled_back(store, NAME) == ["2"]
    with pytest.raises(NotPublished, match="nothing to return to"):
        rollback(store, NAME, smoke=smoke)
    promote(store, NAME, rules, smoke=smoke)  # a person says so
    assert rolled_back(store, NAME) == []


def test_rollback_goes_back_one_version_after_another(project, store, rules, smoke):
    in_production(project, store, rules, smoke, 3)
    assert [rollback(store, NAME, smoke=smoke).version for _ in range(2)] == ["2", "1"]
    assert rolled_back(store, NAME, "2") == ["2"]


def test_the_bytes_that_were_rolled_back_do_not_return_as_another_version(
    project, store, rules, smoke
):
    in_production(project, store, rules, smoke, 2)
    rollback(store, NAME, smoke=smoke)
    project.build(weights=bytes([2] * 4), unsafe=0.01)  # the same bundle, evaluated again
    publish(store, project.subject, project.live)
    with pytest.raises(RolledBack, match=r"cmrm\.toy/3 has the bytes of version 2, which left"):
        promote(store, NAME, rules, smoke=smoke, unattended=True)
    assert store.aliases(NAME)["production"] == "1"
    promote(store, NAME, rules, smoke=smoke)  # a person says so, of these bytes
    assert rolled_back(store, NAME, "2") == []


def test_rollback_does_not_return_to_what_was_rolled_back(project, store, rules, smoke):
    in_production(project, store, rules, smoke, 2)
    promote(store, NAME, rules, smoke=smoke, which="1")
    promote(store, NAME, rules, smoke=smoke, which="2")  # returns to 1, which returns to 2
    rollback(store, NAME, smoke=smoke)
    with pytest.raises(RolledBack, match="would return to version 2, and version 2 with the same"):
        rollback(store, NAME, smoke=smoke)
    assert store.aliases(NAME)["production"] == "1"


def test_the_same_bytes_evaluated_again_are_nothing_to_return_to(project, store, rules, smoke):
    in_production(project, store, rules, smoke, 2)
    project.build(weights=bytes([2] * 4), unsafe=0.01)
    publish(store, project.subject, project.live)
    promote(store, NAME, rules, smoke=smoke)
    assert store.aliases(NAME) == {"candidate": "3", "production": "3", "previous": "1"}
    assert rollback(store, NAME, smoke=smoke).version == "1"


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_before_write(store: Store, number: int) -> Iterator[None]:
    """End what runs before its write with this number, counted from 0."""
    writes = [n for n in dir(store.client) if re.match(r"(set|delete)_.*_(tag|alias)$", n)]
    left = itertools.count(-number)

    def counted(write):
        def call(*arguments):
            if next(left) == 0:
                raise Killed
            return write(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in writes:
            patch.setattr(store.client, name, counted(getattr(store.client, name)))
        with contextlib.suppress(Killed):
            yield
            raise AssertionError(f"fewer than {number + 1} writes")


@pytest.mark.parametrize("write", range(4))
def test_a_rollback_killed_anywhere_is_finished_by_another(project, store, rules, smoke, write):
    in_production(project, store, rules, smoke, 3)
    with killed_before_write(store, write):
        rollback(store, NAME, smoke=smoke)
    if write > 1:
        with pytest.raises(RolledBack):
            promote(store, NAME, rules, smoke=smoke, which="3", unattended=True)
    if store.aliases(NAME)["production"] == "3":
        rollback(store, NAME, smoke=smoke)
    assert store.aliases(NAME)["production"] == "2"
    assert rolled_back(store, NAME, "3") == ["3"]
    assert rollback(store, NAME, smoke=smoke).version == "1"


@pytest.mark.parametrize("write", range(4))
def test_after_a_rollback_killed_anywhere_a_promotion_goes_on(project, store, rules, smoke, write):
    in_production(project, store, rules, smoke, 2)
    with killed_before_write(store, write):
        rollback(store, NAME, smoke=smoke)
    versions(project, store, 3)
    promote(store, NAME, rules, smoke=smoke, unattended=True)
    back = "2" if write <= 1 else "1"  # killed before the mark, the rollback has not happened
    assert store.aliases(NAME) == {"candidate": "3", "production": "3", "previous": back}
    assert rollback(store, NAME, smoke=smoke).version == back


def promotion_killed(project, store, rules, smoke, write):
    """Kill the promotion of version 3 over version 2 before one of its writes."""
    in_production(project, store, rules, smoke, 2)
    versions(project, store, 3)
    with killed_before_write(store, write):
        promote(store, NAME, rules, smoke=smoke)


@pytest.mark.parametrize("write", range(5))
def test_a_promotion_killed_anywhere_can_be_rolled_back(project, store, rules, smoke, write):
    promotion_killed(project, store, rules, smoke, write)
    now = store.aliases(NAME)["production"]
    assert rollback(store, NAME, smoke=smoke).version == str(int(now) - 1)


@pytest.mark.parametrize("write", range(5))
def test_a_promotion_killed_anywhere_is_finished_by_another(project, store, rules, smoke, write):
    promotion_killed(project, store, rules, smoke, write)
    promote(store, NAME, rules, smoke=smoke, unattended=True)
    assert store.aliases(NAME)["production"] == "3"
    assert rollback(store, NAME, smoke=smoke).version == "2"


def test_who_keeps_a_version_whose_rollback_was_killed_takes_the_mark_off(
    project, store, rules, smoke
):
    in_production(project, store, rules, smoke, 2)
    with killed_before_write(store, 2):
        rollback(store, NAME, smoke=smoke)
    with pytest.raises(RolledBack, match=r"was interrupted.*flows rollback.*flows promote"):
        promote(store, NAME, rules, smoke=smoke, unattended=True)
    promote(store, NAME, rules, smoke=smoke)
    assert promote(store, NAME, rules, smoke=smoke, unattended=True).version == "2"


def test_unknown_names_say_what_is_known(project, store, rules, smoke):
    versions(project, store, 1)
    with pytest.raises(NotPublished, match=r"no such alias; known are \['candidate'\]"):
        promote(store, NAME, rules, smoke=smoke, which="champion")
    with pytest.raises(NotPublished, match="no such version"):
        promote(store, NAME, rules, smoke=smoke, which="9")
    unknown = r"nope: there is no such registered model; known are cmrm\.toy"
    for which in ("candidate", "1"):
        with pytest.raises(NotPublished, match=unknown):
            promote(store, "nope", rules, smoke=smoke, which=which)
    with pytest.raises(NotPublished, match=unknown):
        rollback(store, "nope", smoke=smoke)
    with pytest.raises(NotPublished, match="expect: 'foo' is no version number"):
        promote(store, NAME, rules, smoke=smoke, expect="foo")
    assert store.aliases(NAME) == {"candidate": "1"}


def test_a_rollback_advises_only_versions_that_exist(project, store, rules, smoke):
    versions(project, store, 1)
    promote(store, NAME, rules, smoke=smoke)
    with pytest.raises(
        NotPublished, match=r"nothing to return to .*there is no other version"
    ) as no:
        rollback(store, NAME, smoke=smoke)
    assert "--version" not in str(no.value)
    versions(project, store, 3)
    with pytest.raises(NotPublished, match="N being 2 or 3"):
        rollback(store, NAME, smoke=smoke)


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
