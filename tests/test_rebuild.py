"""Comparing a rebuild with the card that ships."""

import json

import pytest

from hauberk.evaluation.rebuild import KEPT, compare, main, note


def one(value, tolerance=0.05):
    return {"value": value, "n": 400, "low": value, "high": value, "tolerance": tolerance}


def test_a_difference_up_to_its_tolerance_is_within_it():
    rows = compare({"a": one(0.5), "b": one(0.5)}, {"a": one(0.54), "b": one(0.44)})
    assert [(row["name"], row["within"]) for row in rows] == [("a", True), ("b", False)]


def test_other_measurements_are_refused():
    with pytest.raises(ValueError, match=r"\['b', 'c'\]"):
        compare({"a": one(0), "b": one(0)}, {"a": one(0), "c": one(0)})


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """What ships, and a rebuild of it, of which a test sets the one value."""
    monkeypatch.chdir(tmp_path)
    made = [tmp_path / "lab" / "lab-clip", tmp_path / "built"]
    recipe = {"products": {"tower": "float32"}, "seconds": {"tower": 60}, "source": "abc"}
    for folder in made:
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text(json.dumps(recipe))
        (folder / "measurements.json").write_text(json.dumps({"read": one(0.5)}))
    return made


def test_a_rebuild_that_differs_too_much_ends_with_status_1(folders, capsys):
    command = ["lab-clip", "--folder", str(folders[1])]
    main(command)
    assert "within" in capsys.readouterr().out
    (folders[1] / "measurements.json").write_text(json.dumps({"read": one(0.6)}))
    with pytest.raises(SystemExit, match="1"):
        main(command)
    assert "OUTSIDE" in capsys.readouterr().out
    assert not (folders[0] / KEPT).exists()


def test_a_rebuild_that_is_not_there_is_an_error(folders):
    with pytest.raises(SystemExit, match=r"elsewhere.*is not there"):
        main(["lab-clip", "--folder", "elsewhere"])


def test_a_card_says_what_is_known_of_rebuilds(folders):
    home = folders[0]
    assert "until a rebuild confirms them" in note(home)
    row = {"name": "read", "shipped": 0.5, "rebuilt": 0.52, "tolerance": 0.05, "within": True}
    recipe = json.loads((home / "recipe.json").read_text())
    (home / KEPT).write_text(json.dumps(recipe | {"rows": [row]}))
    said = " ".join(note(home).split())
    assert "within all of them" in said
    assert "float32, 1 minutes" in said
    assert "read: 52.0% for 50.0%" in said
    row["within"] = False
    (home / KEPT).write_text(json.dumps(recipe | {"rows": [row]}))
    assert "outside of those of read" in " ".join(note(home).split())
