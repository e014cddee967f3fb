"""Whether a lab model that was trained anew is the one that ships.

``python -m hauberk.evaluation.rebuild lab-clip --folder FOLDER`` compares the measurements of a
rebuild, made by ``python -m hauberk.lab.train lab-clip --out FOLDER``, with those on the card that
ships, and ends with status 1 if one differs by more than its tolerance.  ``--keep`` writes the
comparison into the card.
"""

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KEPT = "rebuild.json"
"""Beside the weights: what a rebuild measured."""


def compare(shipped: Mapping[str, Any], rebuilt: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put the two values of every measurement side by side, with what they may differ by.

    Raises
    ------
    ValueError
        If the two were not measured by the same measurements.
    """
    if set(shipped) != set(rebuilt):
        raise ValueError(
            f"measured on one side alone: {sorted(set(shipped) ^ set(rebuilt))}; write both cards "
            "with the same version."
        )
    return [
        {
            "name": name,
            "shipped": one["value"],
            "rebuilt": rebuilt[name]["value"],
            "tolerance": one["tolerance"],
            "within": abs(one["value"] - rebuilt[name]["value"]) <= one["tolerance"],
        }
        for name, one in sorted(shipped.items())
    ]


def note(folder: Path) -> str:
    """Say on a card what is known of rebuilds."""
    path = folder / KEPT
    if not path.is_file():
        return (
            "A rebuild may differ from these values by the tolerances in measurements.json, set by "
            "judgement\nuntil a rebuild confirms them."
        )
    kept = json.loads(path.read_text())
    rows = kept["rows"]
    outside = [row["name"] for row in rows if not row["within"]]
    far = max(rows, key=lambda row: abs(row["shipped"] - row["rebuilt"]) / row["tolerance"])
    found = f"outside of those of {', '.join(outside)}" if outside else "within all of them"
    return (
        "A rebuild may differ from these values by the tolerances in measurements.json. One from "
        f"nothing\n(matrices multiplied in {', '.join(sorted(set(kept['products'].values())))}, "
        f"{sum(kept['seconds'].values()) / 60:.0f} minutes by the clock) was {found}; "
        f"{KEPT}\nhas its values. Nearest to its limit came {far['name']}: "
        f"{far['rebuilt']:.1%} for {far['shipped']:.1%}, "
        f"where\n{100 * far['tolerance']:.0f} points either way are allowed."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    from hauberk.evaluation.statistics import Estimate
    from hauberk.lab.train import COURSES

    parser = argparse.ArgumentParser(prog="python -m hauberk.evaluation.rebuild")
    parser.add_argument("name", choices=list(COURSES))
    parser.add_argument("--folder", type=Path, required=True, help="where the rebuild lies")
    parser.add_argument("--keep", action="store_true", help="write the comparison into the card")
    options = parser.parse_args(arguments)
    home = Path("lab", options.name)
    shipped, rebuilt = (_read(folder / "measurements.json") for folder in (home, options.folder))
    rows = compare(shipped, rebuilt)
    for row in rows:
        print(
            f"{row['name']:24} {row['shipped']:7.1%} {row['rebuilt']:7.1%}  "
            f"{100 * row['tolerance']:3.0f} points  {'within' if row['within'] else 'OUTSIDE'}"
        )
    if options.keep:
        recipe = _read(options.folder / "recipe.json")
        content = {key: recipe[key] for key in ("products", "seconds", "source")} | {"rows": rows}
        (home / KEPT).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        card = importlib.import_module(COURSES[options.name].card)
        parts = ("value", "n", "low", "high")
        card.write_card(
            home, {name: Estimate(*(one[key] for key in parts)) for name, one in shipped.items()}
        )
    if not all(row["within"] for row in rows):
        raise SystemExit(1)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise SystemExit(f"error: {path} is not there; train the model, which writes it.")
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
