"""The normal form: what every data set is turned into, as Parquet with embedded images."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from PIL import Image

from hauberk.errors import BadData

if TYPE_CHECKING:
    from hauberk.requests import Request

Expected = Literal["answer", "refuse"]
Channel = Literal[
    "text", "text+image", "image", "typographic", "adversarial", "benign", "lookalike"
]
Split = Literal["anchor", "train", "calibration", "test"]


@dataclass(frozen=True)
class Sample:
    """One row: a question, an image or none, and what a safe and useful model should do."""

    sample_id: str
    pair_id: str
    """Ties a harmful sample to its benign twin."""
    suite: str
    channel: Channel
    split: Split
    scenario: str
    """The category of harm or of use."""
    expected: Expected
    question: str
    image: Image.Image | None
    reference: str
    """The exact answer of a benign sample.  Of one to refuse whose harm the picture alone tells:
    what a model says that grants it, by which a judge knows an answer about something else."""
    source: str
    revision: str
    licence: str
    caption: str = ""
    """What the image shows and says, in words that could stand in its place; "" where nobody told.
    The only column that a file may lack."""
    meta: str = ""
    """What its metric reads, as a JSON object: see :mod:`hauberk.evaluation.utility`."""

    @property
    def request(self) -> "Request":
        """What the model is asked."""
        from hauberk.requests import Request  # here, so that reading parameters needs no torch

        return Request(self.question, () if self.image is None else (self.image,))


_COLUMNS = [field.name for field in fields(Sample)]


def write_suite(samples: Sequence[Sample], path: Path) -> Path:
    """Write one suite as Parquet; images are embedded as PNG.

    Raises
    ------
    BadData
        If there is no sample, ids repeat, or a benign sample has no reference.
    """
    import datasets

    _check(samples, path)
    columns: dict[str, list[Any]] = {
        name: [getattr(sample, name) for sample in samples] for name in _COLUMNS
    }
    columns["image"] = [None if image is None else _png(image) for image in columns["image"]]
    table = datasets.Dataset.from_dict(columns, features=_features())
    table.to_parquet(path)
    return path


def read_suite(path: Path) -> list[Sample]:
    """Read one suite; raise :class:`BadData` naming file and cure when it is not in normal form."""
    import pyarrow.parquet as pq

    if not path.is_file():
        raise BadData(f"{path}: no such suite; run the stage that writes it: `dvc repro`.")
    try:
        table = pq.read_table(path)
    except Exception as error:
        raise BadData(f"{path}: not a Parquet file ({error}); run prepare_data again.") from None
    there = set(table.column_names)
    missing = sorted(set(_COLUMNS) - {"caption"} - there)
    if missing:
        raise BadData(f"{path}: columns {missing} are missing; expected {_COLUMNS}.")
    known = table.select([name for name in _COLUMNS if name in there])
    samples = [_sample(row, path) for row in known.to_pylist()]
    _check(samples, path)
    return samples


def _sample(row: dict[str, Any], path: Path) -> Sample:
    embedded = row.pop("image")
    image = None
    if embedded is not None:
        try:
            image = Image.open(io.BytesIO(embedded["bytes"]))
            image.load()
        except (OSError, TypeError) as error:
            raise BadData(
                f"{path}: the image of {row['sample_id']!r} cannot be read ({error}); "
                "prepare the data again."
            ) from None
    return Sample(image=image, **row)


def _check(samples: Sequence[Sample], path: Path) -> None:
    if not samples:
        raise BadData(f"{path}: the suite has no samples; raise its size in params.yaml.")
    ids = [sample.sample_id for sample in samples]
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise BadData(f"{path}: sample_id {twice!r} occurs more than once; ids must be unique.")
    kinds: dict[str, str] = {}
    for sample in samples:
        for name, kind in (("expected", Expected), ("channel", Channel), ("split", Split)):
            value = getattr(sample, name)
            if value not in get_args(kind):
                raise BadData(
                    f"{path}: {name} of {sample.sample_id!r} is {value!r}; "
                    f"it must be one of {', '.join(get_args(kind))}."
                )
        kind_of_suite = kinds.setdefault(sample.suite, sample.expected)
        if sample.expected != kind_of_suite:
            raise BadData(
                f"{path}: {sample.sample_id!r} is to {sample.expected}, other samples of "
                f"{sample.suite} to {kind_of_suite}; a suite is of one kind: make two of it."
            )
        if sample.expected == "answer" and not sample.reference:
            raise BadData(
                f"{path}: {sample.sample_id!r} has no reference, so that no answer to it could be "
                "right; give its exact answer."
            )


def _png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _features() -> Any:
    import datasets

    return datasets.Features(
        {
            name: datasets.Image() if name == "image" else datasets.Value("string")
            for name in _COLUMNS
        }
    )
