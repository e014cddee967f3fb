"""Stage prepare_data: the lab's world and data sets -> suites in the normal form.

in   parameters, and data/* where `datasets` names any
out  artifacts/data/SPLIT/SUITE.parquet   test for every suite; anchor, train and calibration where
     a defense is fitted, trained or calibrated on it; anchor where the gap is analysed on it; test
     and calibration where pictures are attacked
     artifacts/data/manifests/NAME.json   of every data set: what was there, from what, and what not
     artifacts/data/card.json             sizes and hashes

Of a data set that is larger than what is asked for, pairs are taken by a hash of their id, so that
twins stay together and no scenario comes first.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hauberk.errors import BadData, HauberkError
from tasks.params import DatasetParams, Params
from tasks.params_file import check_kinds
from tasks.stage import DATA, main, writing
from tasks.suites import Kind, Wanted, wanted

if TYPE_CHECKING:
    import pandas as pd

    from hauberk.data.samples import Sample
    from hauberk.data.sources import Loaded

_SHOWN = 10
"""Rows of a table of overlaps that a message shows."""


@dataclass(frozen=True)
class Chosen:
    """A data set, and the samples of it that are used."""

    loaded: "Loaded"
    ids: frozenset[str]
    kinds: Mapping[str, Kind]
    rows: Mapping[str, int]
    """SPLIT/SUITE -> how many."""


def run(params: Params) -> Path:
    """Draw and write the suites; return the folder."""
    from tqdm import tqdm

    from hauberk.data.lab import REVISION, SUITES, build_suite
    from hauberk.data.samples import write_suite

    asked = sorted(wanted(params), key=lambda each: (each.split, each.suite))
    lab = [each for each in asked if each.suite in SUITES]
    chosen = _chosen(params, [each for each in asked if each.suite not in SUITES])
    rows = {place: n for each in chosen.values() for place, n in each.rows.items()}
    card: dict[str, Any] = {"seed": params.seed, "rows": rows}
    if lab:
        card |= {"source": "hauberk-lab", "revision": REVISION}
    with writing(DATA, card) as folder:
        for each in tqdm(lab, "drawing suites"):
            (folder / each.split).mkdir(exist_ok=True)
            samples = build_suite(each.suite, each.split, each.size, params.seed)
            rows[f"{each.split}/{each.suite}"] = len(samples)
            write_suite(samples, folder / each.split / f"{each.suite}.parquet")
        for name, data in tqdm(chosen.items(), "data sets", disable=not chosen):
            _write(name, data, folder)
        if chosen:
            card["datasets"] = {name: _said(data) for name, data in chosen.items()}
            card["overlaps"] = _overlaps(params, folder, [*chosen.values()])
    return DATA


def _chosen(params: Params, asked: Sequence[Wanted]) -> dict[str, Chosen]:
    """Look all data sets through and choose of them, before anything is written."""
    chosen: dict[str, Chosen] = {}
    homes: dict[str, str] = {}
    for name, told in params.datasets.items():
        chosen[name] = _choose(name, told, asked, params.seed)
        for one in chosen[name].ids:
            if (other := homes.setdefault(one, name)) != name:
                raise BadData(
                    f"datasets.{name}: its sample {one!r} has the id of one of datasets.{other}; "
                    "give the rows of one of them other ids, or leave it out."
                )
    kinds: dict[str, Kind] = {}
    for each in chosen.values():
        kinds |= each.kinds
    check_kinds(params, kinds)
    return chosen


def _choose(name: str, told: DatasetParams, asked: Sequence[Wanted], seed: int) -> Chosen:
    from hauberk.data.sources import load

    try:
        loaded = load(
            told.source,
            told.where,
            split=told.split,
            revision=told.revision,
            allow_partial=told.allow_partial,
            shares=told.shares,
            seed=seed,
            **told.options,
        )
        outline = [*loaded.outline()]
    except HauberkError as error:
        raise type(error)(f"datasets.{name}: {error}") from None
    _check_suites(name, told, {sample.suite for sample, _ in outline})
    of_split = {(each.split, each.suite): each for each in asked}
    places: dict[tuple[str, str], list[Sample]] = {}
    for sample, _ in outline:
        if sample.suite in told.suites and (sample.split, sample.suite) in of_split:
            places.setdefault((sample.split, sample.suite), []).append(sample)
    ids: list[str] = []
    rows = {}
    for place, each in of_split.items():
        if each.suite not in told.suites or each.split not in told.splits:
            continue
        size = min(each.size, told.limit or each.size)
        taken = sorted(places.get(place, []), key=lambda sample: _drawn(sample, seed))[:size]
        if not taken:
            raise BadData(
                f"datasets.{name}: of its {len(outline)} samples none is of {each.suite!r} and the "
                f"split {each.split!r}, which {each.key} asks for; give that split a larger share."
            )
        ids += [sample.sample_id for sample in taken]
        rows["/".join(place)] = len(taken)
    used = frozenset(ids)
    _check_samples(name, told, (sample for sample, _ in outline if sample.sample_id in used))
    kinds = {suite: _kind(outline, suite) for suite in told.suites}
    return Chosen(loaded, used, kinds, rows)


def _check_suites(name: str, told: DatasetParams, there: Iterable[str]) -> None:
    if absent := sorted(set(told.suites) - set(there)):
        raise BadData(
            f"datasets.{name}.suites: {absent} are not in it; it has {', '.join(sorted(there))}.  "
            "Correct params.yaml."
        )


def _check_samples(name: str, told: DatasetParams, samples: "Iterable[Sample]") -> None:
    from hauberk.data.samples import check_samples
    from hauberk.evaluation.utility import check

    found = list(samples)
    try:
        check_samples(found, Path(told.where or told.source))
        check([sample for sample in found if sample.expected == "answer"])
    except BadData as error:
        raise BadData(f"datasets.{name}: {error}") from None


def _drawn(sample: "Sample", seed: int) -> tuple[str, str]:
    """Order samples by chance, twins side by side."""
    return hashlib.sha256(f"{seed}/rows/{sample.pair_id}".encode()).hexdigest(), sample.sample_id


def _kind(outline: "Sequence[tuple[Sample, bool]]", suite: str) -> Kind:
    from hauberk.data.samples import GRADED

    members = [(sample, pictured) for sample, pictured in outline if sample.suite == suite]
    return Kind(
        expected=members[0][0].expected,
        pictured=all(pictured for _, pictured in members),
        told=all(sample.caption for sample, _ in members),
        graded=members[0][0].expected == "answer"
        and any(sample.details.get("metric") in GRADED for sample, _ in members),
    )


def _write(name: str, data: Chosen, folder: Path) -> None:
    """Write the suites of a data set among those of others, and its manifest."""
    from hauberk.data.sources.loading import MANIFEST

    apart = folder / f".{name}"
    for path in data.loaded.write(apart, data.ids):
        place = folder / path.parent.name / path.name
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
    (folder / "manifests").mkdir(exist_ok=True)
    (apart / MANIFEST).rename(folder / "manifests" / f"{name}.json")
    shutil.rmtree(apart)


def _said(data: Chosen) -> dict[str, Any]:
    told = data.loaded.manifest
    names = ("dataset", "split", "revision", "licence", "rows_present", "rows_expected")
    return {name: getattr(told, name) for name in names} | {"missing": len(told.missing)}


def _overlaps(params: Params, folder: Path, chosen: Sequence[Chosen]) -> dict[str, int]:
    """Count the test samples of data sets on which something is fitted as well, by kind.

    Raises
    ------
    BadData
        If there are any, unless `contamination` lets them be.
    """
    from hauberk.data.contamination import contamination, difference_hash, text_hash
    from hauberk.data.samples import stream_suite

    said: dict[str, tuple[str, bytes]] = {}
    beside: Counter[tuple[str, bytes]] = Counter()
    plain: set[str] = set()

    def streamed(*, test: bool) -> "Iterator[Sample]":
        for place in sorted({place for each in chosen for place in each.rows}):
            if place.startswith("test/") == test:
                yield from stream_suite(folder / f"{place}.parquet")

    def noted(samples: "Iterator[Sample]") -> "Iterator[Sample]":
        for sample in samples:
            said[sample.sample_id] = sample.suite, text_hash(sample.question)
            if sample.image is not None:
                beside[said[sample.sample_id]] += 1
                if difference_hash(sample.image) is None:
                    plain.add(sample.sample_id)
            yield sample

    near = params.contamination.near
    table = contamination(streamed(test=False), noted(streamed(test=True)), near=near)
    # Words that a suite says beside several pictures, such as "do what the picture says", tell no
    # sample from another, and neither does a blank picture.
    telling = [
        beside[said[one]] <= 1 if kind == "text" else one not in plain
        for kind, one in zip(table["kind"], table["evaluated"], strict=True)
    ]
    table = table.loc[telling]  # of an empty list it keeps the columns
    if len(table) and params.contamination.refuse:
        raise BadData(_refusal(table))
    return {str(kind): int(n) for kind, n in table["kind"].value_counts().items()}


def _refusal(table: "pd.DataFrame") -> str:
    shown = table.head(_SHOWN).to_string(index=False)
    more = f"\n... and {len(table) - _SHOWN} more" if len(table) > _SHOWN else ""
    return (
        f"{table['evaluated'].nunique()} test samples are fitted on as well, in words, in pictures "
        f"or nearly so:\n{shown}{more}\nGive twins and repeated pictures one pair_id, so that they "
        "fall into one split; take the data sets apart; or say `contamination: {refuse: false}` in "
        "params.yaml, and the card of the data tells how many there are."
    )


if __name__ == "__main__":
    main("prepare_data", run)
