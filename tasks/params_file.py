"""params.yaml, read and checked at the door."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hauberk.errors import BadParams
from tasks.params import (
    AlignmentParams,
    AttackBudget,
    AttackParams,
    BankParams,
    ContaminationParams,
    DatasetParams,
    FrameBudget,
    FrameParams,
    FrameTraining,
    GapParams,
    Generation,
    GridSweep,
    GuardAlignParams,
    GuardVariant,
    HarmParams,
    Judges,
    Margins,
    ModelSpec,
    Params,
    Profile,
    ProjectorBudget,
    ProjectorParams,
    ProjectorTrainingParams,
    Registry,
    SafetyLayerParams,
    SafetyPromptParams,
    ServedParams,
    ShiftParams,
    Sizes,
    TextIndexParams,
    TransportParams,
    Variant,
)
from tasks.params_checks import absent_files, contradictions
from tasks.suites import NOTHING_READ, Kind


def load_params(path: Path = Path("params.yaml"), root: Path | None = None) -> Params:
    """Read and check params.yaml, or a file that is to stand there in a project whose root is told.

    Raises
    ------
    BadParams
        Naming every wrong key by its dotted path, with the value, what would be right, and what
        to do.
    """
    content, root = _read(path), root or path.parent
    try:
        # Through JSON, where strict still lets a mapping become a dataclass.
        text = json.dumps(content, default=str, skipkeys=True)
        params = TypeAdapter(Params).validate_json(text)
    except ValidationError as error:
        problems = [_sentence(detail) for detail in error.errors()]
    else:
        problems = list(contradictions(params, root, NOTHING_READ))
    if problems:
        raise BadParams(f"{path}:\n  " + "\n  ".join(problems) + f"\nCorrect {path.name}.")
    if absent := list(absent_files(params, root)):
        raise BadParams(
            f"{path} names what is not there:\n  " + "\n  ".join(absent) + "\nPut the files there "
            "and run again; what each data set needs is in data/README.md."
        )
    return params


def check_kinds(params: Params, read: Mapping[str, Kind]) -> None:
    """Check the suites of data sets once it is known what they hold.

    Raises
    ------
    BadParams
        Where a section names one that it cannot use, as for suites of the lab.
    """
    if problems := list(contradictions(params, Path(), read)):
        raise BadParams("params.yaml:\n  " + "\n  ".join(problems) + "\nCorrect params.yaml.")


def _read(path: Path) -> Any:
    """Read YAML in which no key stands twice; YAML itself would take the last one silently."""
    import yaml

    if not path.is_file():
        raise BadParams(
            f"{path} does not exist; start in the root of the project, or restore the file: "
            f"`git checkout {path.name}`."
        )
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        content = None if tree is None else yaml.SafeLoader("").construct_document(tree)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for a date that is none
        raise BadParams(f"{path} is not YAML: {_where(error, path)}; correct the file.") from None
    if tree is None:
        raise BadParams(f"{path} is empty; restore it: `git checkout {path.name}`.")
    if twice := list(_duplicates(tree, (), set())):
        raise BadParams(f"{path}:\n  " + "\n  ".join(twice) + f"\nKeep one of each in {path.name}.")
    return content


def _where(error: Exception, path: Path) -> str:
    """Say what YAML stumbles over, and in which line and column, in one line."""
    from yaml import MarkedYAMLError
    from yaml.reader import ReaderError

    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark) is not None:
        what = " ".join(filter(None, (error.context, error.problem)))
        return f"{what}, in line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(error, UnicodeDecodeError):
        what, before = "a byte that is not UTF-8", error.object[: error.start].decode()
    elif isinstance(error, ReaderError):
        what = f"the character {error.character:#x} may not be there"
        before = path.read_text(encoding="utf-8")[: error.position]
    else:
        return " ".join(str(error).split())
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return f"{what}, in line {line}, column {column}"


def _duplicates(node: Any, above: tuple[str, ...], seen: set[int]) -> Iterator[str]:
    """Yield the keys that one mapping of a YAML tree has more than once, with their lines."""
    if id(node) in seen or not isinstance(node.value, list):
        return
    seen.add(id(node))  # an alias is the node itself
    lines: dict[tuple[str, str], list[int]] = {}
    for place, item in enumerate(node.value):
        key, value = item if isinstance(item, tuple) else (None, item)
        here = (*above, str(place if key is None else key.value))
        if key is not None:
            lines.setdefault((key.tag, str(key.value)), []).append(key.start_mark.line + 1)
        yield from _duplicates(value, here, seen)
    for (_, name), found in lines.items():
        if len(found) > 1:
            key = ".".join((*above, name))
            where = f"{', '.join(map(str, found[:-1]))} and {found[-1]}"
            yield f"{key}: stands there more than once, in lines {where}"


def _sentence(detail: Any) -> str:
    key = ".".join(map(str, detail["loc"])) or "(file)"
    secret = detail["loc"][:1] in (("served",), ("judges",))  # somebody may write a key there
    if detail["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key; known here are {', '.join(_known(detail['loc'])) or 'none'}"
    if detail["type"] in ("missing", "missing_argument"):
        return f"{key}: missing"
    value = "" if secret else f"{detail['input']!r} "
    return f"{key}: {value}is wrong: {detail['msg'].lower()}"


_OF_PROFILE = {
    "attack": AttackBudget, "frame": FrameBudget, "grids": GridSweep, "projector": ProjectorBudget,
}  # fmt: skip
_OF_TGA = {"index": TextIndexParams, "training": ProjectorTrainingParams}


def _known(location: tuple[Any, ...]) -> list[str]:
    """List the keys that are right where an unknown one stands."""
    sections: dict[tuple[str, int], Any] = {
        ("profiles", 3): Profile,
        ("profiles", 4): _OF_PROFILE.get(str(location[2]) if location[2:] else "", Sizes),
        ("models", 3): ModelSpec,
        ("served", 3): ServedParams,
        ("datasets", 3): DatasetParams,
        ("contamination", 2): ContaminationParams,
        ("defenses", 3): ShiftParams,
        ("defenses", 5): Variant,
        ("concept_banks", 3): BankParams,
        ("concept_banks", 4): TransportParams,
        ("guardalign", 2): GuardAlignParams,
        ("guardalign", 4): GuardVariant,
        ("davsp", 2): SafetyPromptParams,
        ("davsp", 3): FrameTraining if "training" in location else HarmParams,
        ("davsp", 4): FrameParams,
        ("tga", 2): ProjectorParams,
        ("tga", 3): _OF_TGA.get(str(location[1]) if location[1:] else "", AlignmentParams),
        ("tga", 4): AlignmentParams,
        ("attack", 2): AttackParams,
        ("evaluate", 2): Generation,
        ("gap", 2): GapParams,
        ("safety_layers", 2): SafetyLayerParams,
        ("noninferiority", 2): Margins,
        ("judges", 2): Judges,
        ("registry", 2): Registry,
    }
    section = sections.get((str(location[0]), len(location)), Params)
    return [each.name for each in fields(section)]
