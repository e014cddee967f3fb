"""A folder that a data set was downloaded, cloned or saved to: its tables and its pictures."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from hauberk.data.pictures import Picture
from hauberk.data.tables import TABLES, Row, read_object, read_rows
from hauberk.errors import BadData

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_SAVED = "data"
"""What `datasets` calls the files of a data set that it saves; the folder then bears the split."""


class Folder:
    """The files of a data set; which of its tables were read, and what was found missing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tables: set[Path] = set()
        """Those that were read so far."""
        self.missing: set[str] = set()
        """Files that were looked for and not found, as others say that there are."""

    def name(self, path: Path) -> str:
        """Call a file by its place in the folder."""
        return path.relative_to(self.root).as_posix()

    def rows(self, *paths: Path) -> Iterator[Row]:
        """Read tables row by row, one after the other."""
        for path in paths:
            self.tables.add(path)
            yield from read_rows(path, self.name(path))

    def find(self, *names: str) -> Path | None:
        """Find a file by its name, wherever it lies; of several, the one nearest to the top.

        Raises
        ------
        BadData
            If two are equally near.
        """
        for name in names:
            found = sorted(self.root.rglob(name), key=lambda path: (len(path.parts), path))
            if len(found) > 1 and len(found[0].parts) == len(found[1].parts):
                both = " and ".join(map(self.name, found[:2]))
                raise BadData(f"{self.root}: holds both {both}; leave one of them.")
            if found:
                return found[0]
        return None

    def file(self, *names: str) -> Path:
        """Find a file by one of its names, as :meth:`find` does.

        Raises
        ------
        BadData
            If there is none.
        """
        found = self.find(*names)
        if found is None:
            raise self.lacks(names)
        return found

    def split(self, split: str, *within: str) -> list[Path]:
        """Find the tables of a split, as the hub and `datasets` name them.

        Parameters
        ----------
        split : name of the split
        within : folders that the tables lie in, at any depth, such as the name of a configuration

        Raises
        ------
        BadData
            If the folder is a data set that `datasets` saved, of another split, or two tables are
            the same part of the split.
        """
        state = self.root / "state.json"
        if state.is_file():
            saved = read_object(state, state.name).get("_split")
            if saved not in (None, split):
                raise BadData(
                    f"{self.root}: was saved by `datasets` as the split {saved!r}, not {split!r}; "
                    "save that one, or all splits together."
                )
        tables = [
            path
            for path in sorted(self.root.rglob("*"))
            if path.suffix.lower() in (".parquet", ".arrow")
            and not path.name.startswith("cache-")  # what `datasets` computed from the tables
            and set(within) <= set(path.relative_to(self.root).parts[:-1])
            and self._is_of(path, split)
        ]
        self._refuse_copies(tables)
        return tables

    def _refuse_copies(self, tables: Sequence[Path]) -> None:
        """Refuse the same part twice: in two folders, in two formats, or cut into other shards."""
        parts: dict[str, Path] = {}
        for path in tables:
            part = _SHARD.sub(r"-\1", path.stem)
            if part in parts:
                raise BadData(
                    f"{self.root}: holds both {self.name(parts[part])} and {self.name(path)}, "
                    "which are the same part of the data set; leave one of them."
                )
            parts[part] = path

    def _is_of(self, path: Path, split: str) -> bool:
        stem = _SHARD.sub("", path.stem)
        if stem == _SAVED:
            return path.parent in (self.root, path.parents[1] / split)
        return stem == split or stem.endswith(f"-{split}")  # the cache puts a name before it

    def rows_of(self, split: str, *within: str) -> Iterator[Row]:
        """Read the tables of a split as :meth:`split` finds them; shards that lack are noted.

        Raises
        ------
        BadData
            If there is no table at all.
        """
        tables = self.split(split, *within)
        if not tables:
            raise self.lacks(["/".join((*within, f"{split}-00000-of-NNNNN.parquet"))])
        self.missing |= self._absent(tables)
        yield from self.rows(*tables)

    def _absent(self, tables: Sequence[Path]) -> set[str]:
        """Name the shards that others of their kind say there are."""
        told: set[str] = set()
        for path in tables:
            if shard := _SHARD.search(path.stem):
                head = path.stem[: shard.start()]
                told |= {
                    self.name(path.with_stem(f"{head}-{index:05d}-of-{shard[2]}"))
                    for index in range(int(shard[2]))
                }
        return told - set(map(self.name, tables))

    def picture(self, row: Row, column: str, *under: str) -> Picture:
        """Hand out the picture of a row: embedded in it, or a file that it names.

        Parameters
        ----------
        row, column : where it is named
        under : folders in this one that a file may lie in; the folder itself where none is given

        Raises
        ------
        BadData
            If the name leads out of the folder or is none that a file can have, or there is
            neither.
        """
        if isinstance(row.values.get(column), str):
            return self.picture_named(row, row.text(column), *under)
        return row.picture(column)

    def picture_named(self, row: Row, name: str, *under: str) -> Picture:
        """Find the file of a picture by a name that was made of what a row says."""
        relative = _inside(name, row)
        places = [self.root / place / relative for place in under or ("",)]
        try:
            content = next((place for place in places if place.is_file()), places[0])
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise row.wrong(f"the path {name[:60]!r} can be that of no file ({why})") from None
        return Picture(f"{row.where}: {self.name(content)}", content)

    def lacks(self, names: Sequence[str]) -> BadData:
        """Make the error that says which file is not there."""
        there = sorted(
            self.name(path) for path in self.root.rglob("*") if path.suffix.lower() in TABLES
        )
        seen = f"of tables it holds {', '.join(there[:5])}" if there else "it holds no table"
        more = f" and {len(there) - 5} more" if len(there) > 5 else ""
        return BadData(
            f"{self.root}: holds no {' or '.join(names)}; {seen}{more}.  Download the data set "
            "into this folder, and unpack its archives."
        )


def _inside(name: str, row: Row) -> PurePosixPath:
    """Read a path of a table, which may not lead out of the folder."""
    slashed = name.replace("\\", "/")
    path = PurePosixPath(slashed)
    outside = ".." in path.parts or any(PureWindowsPath(part).drive for part in path.parts)
    if path.is_absolute() or outside or "//" in slashed or "\0" in name:
        raise BadData(
            f"{row.where}: the path {name!r} leads out of the folder of the data set; name a file "
            "inside it."
        )
    return path
