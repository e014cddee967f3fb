"""A bundle as the record sees it: a folder with card.json, and nothing that is executed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from registry.errors import NotBuilt, Unverified
from registry.gate import UNDEFENDED

ADDED = "registered_model_meta"
BANK = "concept_bank"
"""Stands where the name of a defense would, for the concepts that a CLIP knows."""


@dataclass(frozen=True)
class Subject:
    """What becomes one version: a bundle, its evaluation, and the stages that made them."""

    model: str
    defense: str
    bundle: Path
    evaluation: Path
    stages: tuple[str, ...]
    """Their names in dvc.lock: the evaluation, and the undefended one it is compared with, if it
    is compared with one."""
    reports: Path
    """The folder of the compare stage."""

    @property
    def name(self) -> str:
        """The registered model."""
        return f"{self.defense}.{self.model}"

    @cached_property
    def card(self) -> dict[str, Any]:
        """The bundle's card."""
        return read_card(self.bundle)

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
        """Give the metrics, the paired differences and the undefended metrics.

        A concept bank defends nothing by itself: it has metrics of its own, and neither of the
        others.

        One metric is of the evaluation itself: ``all`` ``differing_alone``, the share of the
        answers that came out differently alone than in their batch, of those that were asked twice.
        """
        if self.defense == BANK:
            return _rows(self.evaluation / "metrics.json"), [], []
        metrics = _rows(self.reports / "metrics.json")
        differences = _rows(self.reports / "differences.json")
        own = [r for r in metrics if (r["model"], r["defense"]) == (self.model, self.defense)]
        bare = [r for r in metrics if (r["model"], r["defense"]) == (self.model, UNDEFENDED)]
        paired = [
            r for r in differences if (r["model"], r["defense"]) == (self.model, self.defense)
        ]
        if not own:
            raise NotBuilt(
                f"{self.reports / 'metrics.json'} has no row of {self.model} with {self.defense}; "
                "run the pipeline: `python -m flows run`."
            )
        return own + self._alone(own[0]), paired, bare

    def _alone(self, like: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Give the share of answers that batching changed, as a row that a gate can hold."""
        card = read_card(self.evaluation)
        if not (n := card.get("checked_alone")):
            return []
        share = len(card["differing_alone"]) / n
        of = {"model": self.model, "defense": self.defense, "suite": "all"}
        return [dict.fromkeys(like) | of | {"metric": "differing_alone", "value": share, "n": n}]

    def samples(self) -> list[tuple[Any, ...]]:
        """Give what the model was asked: id, suite, question and expected answer of each sample.

        A concept bank is asked nothing.
        """
        if self.defense == BANK:
            return []
        path = self.evaluation / "responses.jsonl"
        if not path.is_file():
            raise NotBuilt(f"{path} does not exist; run the pipeline first: `python -m flows run`.")
        asked = ("sample_id", "suite", "question", "expected", "reference")
        responses = map(json.loads, path.read_text().splitlines())
        return sorted(tuple(response[key] for key in asked) for response in responses)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise NotBuilt(f"{path} does not exist; run the pipeline first: `python -m flows run`.")
    return list(json.loads(path.read_text()))


def read_card(folder: Path) -> dict[str, Any]:
    """Read the card of a finished folder.

    Raises
    ------
    NotBuilt
        If there is none: the card is written last, so the folder is not finished.
    Unverified
        If it is no card.
    """
    path = folder / "card.json"
    if not path.is_file():
        raise NotBuilt(f"{path} does not exist; run the pipeline first: `python -m flows run`.")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise Unverified(
            f"{path} cannot be read ({error}); what is published must be published again, what is "
            "built is built again by `python -m flows run`."
        ) from None


def tree_hash(folder: Path) -> str:
    """Hash every file of a folder with its path: 64 hexadecimal digits.

    Left out is the one file that MLflow adds when it downloads a version.
    """
    lines = [
        f"{_sha256(path)}  {path.relative_to(folder).as_posix()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / ADDED
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def find_bundle(folder: Path) -> Path:
    """Find the bundle in a downloaded MLflow model: ``data/NAME/card.json``.

    Raises
    ------
    Unverified
        If the folder does not hold exactly one.
    """
    found = sorted(folder.glob("data/*/card.json"))
    if len(found) != 1:
        raise Unverified(
            f"{folder} holds {len(found)} bundles under data/ instead of one; the version was not "
            "made by `python -m flows publish`: publish again."
        )
    return found[0].parent


def verify_model(folder: Path, tags: Mapping[str, str]) -> None:
    """Compare every byte of a downloaded MLflow model with what was recorded.

    The bundle is held against its card and the tag ``bundle.sha256``, and the whole, with MLmodel
    and the requirements, against the tag ``model.sha256``.

    Raises
    ------
    Unverified
        Naming what differs.
    """
    bundle = find_bundle(folder)
    wrong = []
    for name, recorded in read_card(bundle).get("files", {}).items():
        found = _sha256(bundle / name) if (bundle / name).is_file() else "no such file"
        if found != recorded:
            wrong.append(f"{name}: the card says {recorded}, found {found}")
    for what, where in (("bundle", bundle), ("model", folder)):
        expected = tags.get(f"{what}.sha256", "nothing")
        if not wrong and (found := tree_hash(where)) != expected:
            wrong.append(f"the {what}: the registry says {expected}, found {found}")
    if wrong:
        raise Unverified(
            "the bytes of the version are not those that were published:\n  "
            + "\n  ".join(wrong)
            + "\nRestore the artifact store, or publish again."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
