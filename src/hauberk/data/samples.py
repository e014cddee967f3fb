"""The normal form: what every data set is turned into, as Parquet with embedded images."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from PIL import Image

from hauberk.data.pictures import upright
from hauberk.errors import BadData

if TYPE_CHECKING:
    from hauberk.requests import Request

Expected = Literal["answer", "refuse", "hedge"]
"""``hedge``: neither harmful nor harmless, such as asking for legal advice; a good answer answers
with care.  Counted in no rate of harm and in no rate of use."""
Channel = Literal[
    "text", "text+image", "image", "typographic", "adversarial", "benign", "lookalike"
]
Split = Literal["anchor", "train", "calibration", "test"]
Metric = Literal[
    "exact", "vqa", "textvqa", "mme", "pope", "choice", "judged", "relative", "refusal"
]  # fmt: skip
"""How an answer to a benign sample is scored.  ``refusal``: only whether it refuses is measured,
as in sets of over-refusal, whose requests have no one right answer."""
GRADED: tuple[Metric, ...] = ("judged", "relative")
"""Only a judge that compares it with the reference can tell how good an answer is."""


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
    A column that a file may lack, as it may lack ``meta``."""
    meta: str = ""
    """A JSON object with what else a data set tells, or "" for none; see :attr:`details`."""

    @property
    def request(self) -> "Request":
        """What the model is asked."""
        from hauberk.requests import Request  # here, so that reading parameters needs no torch

        return Request(self.question, () if self.image is None else (self.image,))

    @property
    def details(self) -> dict[str, Any]:
        """What ``meta`` says.

        Keys that every data set uses alike: ``metric`` (one of :data:`Metric`), ``answers`` (what
        counts as right, a list of texts), ``choices`` (what may be chosen, in the order of their
        letters), ``group`` (what is scored and resampled together: of use, the questions on one
        picture), ``ocr_tokens`` (a list of texts), ``goal`` (what a request to refuse is after, in
        plain words, for a judge) and ``image_sha256`` (of the picture's file).
        """
        return dict(json.loads(self.meta)) if self.meta else {}


NAME = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,100}")
"""What a suite may be called, as it names a file, also in other file systems."""
_COLUMNS = [field.name for field in fields(Sample)]
_OPTIONAL = {"caption", "meta"}
_ROW_GROUP = 16 * 2**20
"""Bytes of pictures and texts that are held before they are written.  A suite of less is one row
group, as `datasets` would write it; its own limit, 100 MB, would be memory that streaming needs."""
_READ = 16
"""Rows read at a time: of pictures of 1 MB each, 16 MB."""


def write_suite(samples: Iterable[Sample], path: Path) -> Path:
    """Write one suite as Parquet; images are embedded as PNG.

    An iterator is written as it runs, so that memory does not grow with its length.

    Raises
    ------
    BadData
        If there is no sample, ids repeat, or a sample is not in normal form; nothing is left then.
    """
    # A list is known before its end; of suites without meta the bytes are as they always were.
    lacks_meta = isinstance(samples, Sequence) and not any(sample.meta for sample in samples)
    with writing_suite(path, meta=not lacks_meta) as add:
        for sample in samples:
            add(sample, None)
    return path


@contextmanager
def writing_suite(
    path: Path, *, meta: bool = True
) -> Iterator[Callable[[Sample, bytes | None], None]]:
    """Write one suite sample by sample; the file is there at the end, whole, or not at all.

    Parameters
    ----------
    path : of the Parquet file
    meta : whether the file has the column ``meta``

    Yields
    ------
    add : function of a sample and the file of its picture
        The bytes of a picture's file are embedded as they are; without them, the sample's image as
        PNG.

    Raises
    ------
    BadData
        As :func:`write_suite` does.
    """
    import pyarrow as pa

    columns = _COLUMNS if meta else [name for name in _COLUMNS if name != "meta"]
    checks, rows, held = _Checks(path), [], 0
    partial = path.with_name(f"{path.name}.partial")
    try:
        with _parquet(partial, columns) as file:

            def add(sample: Sample, encoded: bytes | None) -> None:
                nonlocal held
                checks.add(sample)
                row = {name: getattr(sample, name) for name in columns}
                if encoded is not None or sample.image is not None:
                    row["image"] = {"bytes": encoded or _png(sample.image), "path": None}
                    held += len(row["image"]["bytes"])
                held += sum(len(value) for value in row.values() if isinstance(value, str))
                rows.append(row)
                if held >= _ROW_GROUP:
                    flush()

            def flush() -> None:
                nonlocal held
                file.write_table(pa.Table.from_pylist(rows, schema=file.schema))
                rows.clear()
                held = 0

            yield add
            checks.finish()
            if rows:
                flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_suite(path: Path) -> list[Sample]:
    """Read one suite; raise :class:`BadData` naming file and cure when it is not in normal form."""
    return list(stream_suite(path))


def stream_suite(path: Path) -> Iterator[Sample]:
    """Read one suite sample by sample, with memory that does not grow with its length.

    Raises
    ------
    BadData
        Where the file is not in normal form; when the first such sample is reached.
    """
    import pyarrow.parquet as pq

    if not path.is_file():
        raise BadData(f"{path}: no such suite; run the stage that writes it: `dvc repro`.")
    checks = _Checks(path)
    try:
        file = pq.ParquetFile(path)
    except Exception as error:
        raise BadData(f"{path}: not a Parquet file ({error}); run prepare_data again.") from None
    with file:
        there = set(file.schema_arrow.names)
        missing = sorted(set(_COLUMNS) - _OPTIONAL - there)
        if missing:
            raise BadData(f"{path}: columns {missing} are missing; expected {_COLUMNS}.")
        for row in _rows(file, [name for name in _COLUMNS if name in there], path):
            sample = _sample(row, path)
            checks.add(sample)
            yield sample
    checks.finish()


def _rows(file: Any, columns: Sequence[str], path: Path) -> Iterator[dict[str, Any]]:
    batches = file.iter_batches(_READ, columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            raise BadData(
                f"{path}: not a Parquet file ({error}); run prepare_data again."
            ) from None
        if batch is None:
            return
        yield from batch.to_pylist()


def _sample(row: dict[str, Any], path: Path) -> Sample:
    embedded = row.pop("image")
    if embedded is None:
        return Sample(image=None, **row)
    encoded = embedded.get("bytes") if isinstance(embedded, dict) else None
    where = f"{path}: the image of {row['sample_id']!r}"
    if not isinstance(encoded, bytes):
        raise BadData(f"{where} has no bytes; prepare the data again.")
    return Sample(image=upright(encoded, where), **row)


def check_samples(samples: Iterable[Sample], where: Path) -> None:
    """Refuse what could not be written as suites, before any picture is read.

    Raises
    ------
    BadData
        Naming ``where`` and the sample.
    """
    checks = _Checks(where)
    for sample in samples:
        checks.add(sample)


class _Checks:
    """Whether samples, one after the other, make a file in normal form."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ids: set[str] = set()
        self._kinds: dict[str, str] = {}
        self._channels: dict[str, str] = {}

    def add(self, sample: Sample) -> None:
        path = self.path
        if sample.sample_id in self._ids:
            raise BadData(
                f"{path}: sample_id {sample.sample_id!r} occurs more than once; ids must be unique."
            )
        self._ids.add(sample.sample_id)
        for name, kind in (("expected", Expected), ("channel", Channel), ("split", Split)):
            value = getattr(sample, name)
            if value not in get_args(kind):
                raise BadData(
                    f"{path}: {name} of {sample.sample_id!r} is {value!r}; "
                    f"it must be one of {', '.join(get_args(kind))}."
                )
        kind_of_suite = self._kinds.setdefault(sample.suite, sample.expected)
        if sample.expected != kind_of_suite:
            raise BadData(
                f"{path}: {sample.sample_id!r} is to {sample.expected}, other samples of "
                f"{sample.suite} to {kind_of_suite}; a suite is of one kind: make two of it."
            )
        channel = self._channels.setdefault(sample.suite, sample.channel)
        if sample.channel != channel:
            raise BadData(
                f"{path}: the channel of {sample.sample_id!r} is {sample.channel}, that of other "
                f"samples of {sample.suite} {channel}; a suite is of one channel: make two of it."
            )
        details = _details(sample, path)
        if sample.expected == "answer" and not sample.reference and not _scored_otherwise(details):
            raise BadData(
                f"{path}: {sample.sample_id!r} has no reference, so that no answer to it could be "
                "right; give its exact answer, or say in `meta` how else it is scored, such as "
                '{"metric": "refusal"} where only a refusal would be wrong.'
            )

    def finish(self) -> None:
        if not self._ids:
            raise BadData(f"{self.path}: the suite has no samples; raise its size in params.yaml.")


def _details(sample: Sample, path: Path) -> Mapping[str, Any]:
    try:
        details = json.loads(sample.meta) if sample.meta else {}
    except ValueError:
        details = None
    if not isinstance(details, dict):
        raise BadData(
            f"{path}: meta of {sample.sample_id!r} is {sample.meta[:60]!r}; it must be a JSON "
            "object, or empty."
        )
    metric = details.get("metric")
    if metric is not None and metric not in get_args(Metric):
        raise BadData(
            f"{path}: the metric of {sample.sample_id!r} is {metric!r}; it must be one of "
            f"{', '.join(get_args(Metric))}."
        )
    return details


def _scored_otherwise(details: Mapping[str, Any]) -> bool:
    """Tell whether something other than one exact answer says what is right, or nothing can."""
    return bool(details.get("answers")) or details.get("metric") == "refusal"


def _png(image: Image.Image | None) -> bytes:
    assert image is not None
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@contextmanager
def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Open a Parquet file with the settings of `datasets`, so that both write the same bytes."""
    import datasets
    import pyarrow.parquet as pq
    from datasets.config import DEFAULT_CDC_OPTIONS

    kinds = {
        name: datasets.Image() if name == "image" else datasets.Value("string") for name in columns
    }
    texts = [name for name in columns if name != "image"]
    pictures = ("image.bytes", "image.path")  # compressed already
    with pq.ParquetWriter(
        path,
        datasets.Features(kinds).arrow_schema,
        compression=dict.fromkeys(texts, "snappy") | dict.fromkeys(pictures, "none"),
        use_dictionary=texts,
        column_encoding=dict.fromkeys(pictures, "PLAIN"),
        use_content_defined_chunking=DEFAULT_CDC_OPTIONS,
        write_page_index=True,
    ) as writer:
        yield writer
        writer.add_key_value_metadata({"content_defined_chunking": json.dumps(DEFAULT_CDC_OPTIONS)})
