"""Tables of other people: Parquet, Arrow, CSV, JSON and JSON lines, read row by row.

A row hands out what is asked of it by name and kind, and says where it stands when it cannot; so a
loader reads like the description of its data set, and every complaint names file, row and cure.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hauberk.data.pictures import Picture
from hauberk.errors import BadData

TABLES = (".parquet", ".arrow", ".csv", ".jsonl", ".json")
_BATCH = 16
"""Rows of Parquet and Arrow that are held at a time."""
_ROW_LIMIT = 2**24
"""Characters of one cell of CSV: above the 131,072 of Python's `csv`, below all memory."""
_INTEGER = re.compile(r"-?[0-9]{1,18}")
"""What 64 bits hold for certain, as whole numbers of Parquet do."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    values: Mapping[str, Any]
    where: str
    """For people: file and row."""
    key: str
    """Its name in a JSON object of objects, its number from 0 elsewhere."""

    def has(self, name: str) -> bool:
        """Tell whether there is such a column, with something in it."""
        return self.values.get(name) not in (None, "")

    def first(self, *names: str) -> str:
        """Find the first of some columns that the table has: what other editions call it."""
        for name in names:
            if name in self.values:
                return name
        raise self.wrong(
            f"has no column {' or '.join(map(repr, names))}, only {sorted(self.values)}"
        )

    def text(self, name: str) -> str:
        """Hand out a text that is not empty."""
        value = self._value(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{name!r} is {_short(value)}; it must be a text that says something")
        return value

    def any_text(self, name: str) -> str:
        """Hand out a text, which may be empty and may say nothing."""
        value = self._value(name)
        if not isinstance(value, str):
            raise self.wrong(f"{name!r} is {_short(value)}; it must be a text")
        return value

    def optional(self, name: str) -> str:
        """Hand out a text, or "" where the column is absent or empty."""
        return self.text(name) if self.has(name) else ""

    def id(self, *names: str) -> str:
        """Hand out a name or number that tells rows apart, of the first such column."""
        name = self.first(*names)
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise self.wrong(f"{name!r} is {_short(value)}; it must be a whole number or a text")
        return str(value)

    def integer(self, name: str) -> int:
        """Hand out a whole number, which CSV writes as text."""
        value = self._value(name)
        if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(f"{name!r} is {_short(value)}; it must be a whole number")
        return value

    def flag(self, name: str) -> bool:
        """Hand out true or false, which CSV writes as text."""
        value = self._value(name)
        words = {"true": True, "false": False}
        known = words.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(known, bool):
            raise self.wrong(f"{name!r} is {_short(value)}; it must be true or false")
        return known

    def texts(self, name: str) -> list[str]:
        """Hand out a list of texts, which may be empty and may say nothing."""
        value = self._value(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(f"{name!r} is {_short(value)}; it must be a list of texts")
        return value

    def rows(self, name: str) -> list["Row"]:
        """Hand out a list of objects, each as a row of its own."""
        value = self._value(name)
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.wrong(f"{name!r} is {_short(value)}; it must be a list of objects")
        return [
            Row(each, f"{self.where}, {name}[{index}]", str(index))
            for index, each in enumerate(value)
        ]

    def row(self, name: str) -> "Row":
        """Hand out an object, which some tables hold as a text of JSON."""
        value = self._value(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        if not isinstance(value, dict):
            raise self.wrong(f"{name!r} is {_short(self._value(name))}; it must be an object")
        return Row(value, f"{self.where}, {name}", self.key)

    def picture(self, name: str) -> Picture:
        """Hand out an embedded picture, as `datasets` stores one."""
        value = self._value(name)
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(encoded, bytes) or not encoded:
            raise self.wrong(
                f"{name!r} is {_short(value)}; it must be a picture with its bytes, as "
                "`datasets` embeds it when it saves a data set"
            )
        return Picture(f"{self.where}, {name}", encoded)

    def wrong(self, what: str) -> BadData:
        """Make the error that says what is wrong with this row."""
        return BadData(f"{self.where}: {what}; correct the file, or download it again.")

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise self.wrong(f"has no column {name!r}, only {sorted(self.values)}")
        return self.values[name]


def read_rows(path: Path, name: str) -> Iterator[Row]:
    """Read a table row by row, whatever its format.

    Parameters
    ----------
    path : of a file that ends in one of :data:`TABLES`
    name : of the file, for people

    Yields
    ------
    Row
        Of Parquet and Arrow a few are held at a time; a file of JSON is held whole.

    Raises
    ------
    BadData
        If it is empty, is not what its name says, or is no UTF-8.
    """
    readers = {
        ".parquet": _parquet, ".arrow": _arrow, ".csv": _csv, ".jsonl": _json_lines, ".json": _json,
    }  # fmt: skip
    count = 0
    for row in readers[path.suffix.lower()](path, name):
        count += 1
        yield row
    if not count:
        raise BadData(f"{name}: holds no rows; download it again.")


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with _readable(name, "a Parquet file"):
        # No buffering ahead, which would hold a whole group of rows, pictures and all.
        file = pq.ParquetFile(path, pre_buffer=False)
    with file:
        yield from _batches(file.iter_batches(_BATCH), name, "a Parquet file")


def _arrow(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa

    kind = "a file of `datasets`"
    with _readable(name, kind):
        file = pa.memory_map(str(path))
    with file:
        with _readable(name, kind):
            stream = pa.ipc.open_stream(file)
        yield from _batches(_sliced(stream), name, kind)


def _sliced(batches: Iterable[Any]) -> Iterator[Any]:
    """Cut batches of 1000 rows, as `datasets` writes them, into pieces that may be held."""
    for batch in batches:
        yield from (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))


def _batches(batches: Iterator[Any], name: str, kind: str) -> Iterator[Row]:
    number = 0
    while True:
        with _readable(name, kind):
            batch = next(batches, None)
            rows = batch.to_pylist() if batch is not None else []
        if batch is None:
            return
        for values in rows:
            yield Row(values, f"{name}, row {number}", str(number))
            number += 1


@contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    """Say of whatever a broken file makes pyarrow raise which file it was."""
    try:
        yield
    except Exception as error:
        raise BadData(
            f"{name}: is not {kind}, or is cut off ({error}); download it again."
        ) from None


def _csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(_ROW_LIMIT)
    lines = _lines(path, name)
    reader = csv.DictReader(lines, strict=True)
    number = 0
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise BadData(
                f"{name}, line {reader.line_num}: is no CSV ({error}); quote the cell, or download "
                "the file again."
            ) from None
        _refuse_repeated(reader.fieldnames or (), name)
        if values is None:
            return
        if None in values or None in values.values():
            raise BadData(
                f"{name}, row {number} (line {reader.line_num}): has "
                f"{'more' if None in values else 'fewer'} cells than the header, which is "
                f"{reader.fieldnames}; quote cells that hold a comma, or download the file again."
            )
        yield Row(values, f"{name}, row {number} (line {reader.line_num})", str(number))
        number += 1


def _refuse_repeated(header: Sequence[str], name: str) -> None:
    """Refuse a column that occurs twice, of which Python would keep the last."""
    twice = sorted(column for column, times in Counter(header).items() if times > 1)
    if twice:
        raise BadData(
            f"{name}, header: the columns {twice} occur more than once; leave one of each, or "
            "download the file again."
        )


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(_lines(path, name), 1):
        if not line.strip():
            continue
        where = f"{name}, row {number} (line {line_number})"
        yield Row(_object(line, where), where, str(number))
        number += 1


def _object(text: str, where: str) -> dict[str, Any]:
    value = _parsed(text, where)
    if not isinstance(value, dict):
        raise BadData(f"{where}: is {_short(value)}; it must be a JSON object {{...}}.")
    return value


def _json(path: Path, name: str) -> Iterator[Row]:
    if _is_lines(path, name):
        yield from _json_lines(path, name)
        return
    found = read_json(path, name)
    named = found.items() if isinstance(found, dict) else enumerate(found)
    for key, values in named:
        where = f"{name}, {repr(key) if isinstance(found, dict) else f'row {key}'}"
        if not isinstance(values, dict):
            raise BadData(f"{where}: is {_short(values)}; it must be a JSON object {{...}}.")
        yield Row(values, where, str(key))


def _is_lines(path: Path, name: str) -> bool:
    """Tell a file of JSON lines that is called .json, as those of POPE are, by its first two."""
    begin = list(islice((line for line in _lines(path, name) if line.strip()), 2))
    try:
        return len(begin) == 2 and all(isinstance(json.loads(line), dict) for line in begin)
    except ValueError:
        return False


def read_json(path: Path, name: str) -> dict[str, Any] | list[Any]:
    """Read a whole file of JSON that holds an object or a list.

    Raises
    ------
    BadData
        If it is no JSON, no UTF-8, or holds something else.
    """
    found = _parsed("".join(_lines(path, name)), name)
    if not isinstance(found, dict | list):
        raise BadData(f"{name}: is {_short(found)}; it must be a JSON object or a list.")
    return found


def read_object(path: Path, name: str) -> dict[str, Any]:
    """Read a whole file of JSON that holds an object.

    Raises
    ------
    BadData
        If it is no JSON, no UTF-8, or holds something else.
    """
    found = read_json(path, name)
    if not isinstance(found, dict):
        raise BadData(
            f"{name}: is {_short(found)}; it must be a JSON object {{...}}; download it again."
        )
    return found


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{where}: is no JSON ({error}); download the file again.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that occurs twice, of which Python would keep the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} occurs more than once")
        found[name] = value
    return found


def _lines(path: Path, name: str) -> Iterator[str]:
    """Read the lines of a file in UTF-8, with or without a byte order mark."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line in file:
                number += 1
                yield line
    except UnicodeDecodeError as error:
        raise BadData(
            f"{name}, after line {number}: is not UTF-8 ({error}); save it as UTF-8, for example "
            "with `iconv -f latin1 -t utf-8`."
        ) from None
    except OSError as error:
        raise BadData(f"{name}: cannot be read ({error}); put the file there.") from None


def _short(value: Any) -> str:
    """Show the beginning of a value, and nothing of a picture's bytes."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
