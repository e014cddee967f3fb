"""Loading a data set: looked through once, whole, before its first sample is handed out."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from hauberk.data.pictures import decode
from hauberk.data.samples import NAME, Sample, Split, writing_suite
from hauberk.data.shares import check_shares, share_of
from hauberk.data.sources.folder import Folder
from hauberk.data.sources.hub import locate
from hauberk.data.sources.source import Asked, Item, Source
from hauberk.errors import BadData
from hauberk.files import file_hash

MANIFEST = "manifest.json"
_AHEAD = 16
"""Pictures that are decoded before they are asked for: of 1000 x 1000 pixels, 48 MB."""
_NAMED = 3
"""Missing things that a message names."""
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Manifest:
    """What was loaded, from what, and what was not there."""

    dataset: str
    split: str
    options: Mapping[str, Any]
    seed: int
    revision: str
    """Of the hub or as told; else a hash of the tables that were read."""
    licence: str
    gated: bool
    rows_expected: int | None
    """As its authors publish it; None where they do not, or where options leave rows out."""
    rows_verified: bool
    """Whether that number was found in a source of theirs; if not, nothing is refused by it."""
    rows_present: int
    missing: list[str]
    allow_partial: bool
    files: Mapping[str, str]
    """sha256 of every table and every file of a picture."""

    @property
    def is_whole(self) -> bool:
        """Whether there is all of it and no more, as far as anybody surely told how much it is."""
        told = self.rows_expected if self.rows_verified else None
        return not self.missing and told in (None, self.rows_present)

    def save(self, folder: Path) -> Path:
        """Write it as JSON beside the suites."""
        path = folder / MANIFEST
        told = json.dumps(asdict(self), indent=2, sort_keys=True, default=str, ensure_ascii=False)
        path.write_text(f"{told}\n", encoding="utf-8")
        return path


@dataclass(frozen=True)
class Loaded:
    """A data set in the normal form: an iterable of samples, which can be run through again.

    Pictures are decoded as they are reached, so that memory does not grow with the number of rows.
    """

    manifest: Manifest
    source: Source = field(repr=False)
    folder: Folder = field(repr=False)
    asked: Asked = field(repr=False)
    shares: Mapping[Split, float] = field(repr=False)

    def __iter__(self) -> Iterator[Sample]:
        for sample, _ in self._decoded():
            yield sample

    def outline(self) -> Iterator[tuple[Sample, bool]]:
        """Give every sample without its picture, which is not opened, and whether it has one."""
        for item in self._items():
            yield self._bare(item), item.picture is not None

    def write(self, out: Path, keep: Collection[str] | None = None) -> list[Path]:
        """Write every suite as ``out/SPLIT/SUITE.parquet`` and the manifest beside them.

        Files of pictures are embedded as they are, after they were found to be whole.

        Parameters
        ----------
        out : folder that is not there yet
        keep : sample ids; of all others no picture is opened.  None for all samples

        Returns
        -------
        list of Path
            The suites.

        Raises
        ------
        BadData
            If ``out`` exists, or a picture cannot be read; nothing is written then.
        """
        if out.exists():
            raise BadData(f"{out}: exists; give a new folder, or remove this one.")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            self._write(partial, keep)
            self.manifest.save(partial)
            partial.chmod(0o755)  # mkdtemp makes folders that nobody else may enter
            partial.replace(out)
        except BaseException:
            shutil.rmtree(partial)
            raise
        return sorted(out.rglob("*.parquet"))

    def _write(self, folder: Path, keep: Collection[str] | None) -> None:
        writers: dict[tuple[str, str], Callable[[Sample, bytes | None], None]] = {}
        with ExitStack() as stack:
            for sample, encoded in self._decoded(keep):
                place = (sample.split, sample.suite)
                if place not in writers:
                    _check_name(sample.suite, sample.sample_id)
                    (folder / sample.split).mkdir(exist_ok=True)
                    path = folder / sample.split / f"{sample.suite}.parquet"
                    writers[place] = stack.enter_context(writing_suite(path))
                writers[place](sample, encoded)

    def _items(self) -> Iterator[Item]:
        for item in self.source.read(self.folder, self.asked):
            if item.picture is None or item.picture.is_there:
                yield item

    def _decoded(
        self, keep: Collection[str] | None = None
    ) -> Iterator[tuple[Sample, bytes | None]]:
        items = (item for item in self._items() if keep is None or self._id(item) in keep)
        yield from _ahead(self._sample, items)

    def _sample(self, item: Item) -> tuple[Sample, bytes | None]:
        if item.picture is None:
            return self._bare(item), None
        encoded = item.picture.encoded()
        image = decode(encoded, item.picture.where)
        told = {"image_sha256": hashlib.sha256(encoded).hexdigest()}
        if item.expected == "answer":  # uses are measured picture by picture
            told["group"] = item.meta.get("group", told["image_sha256"])
        return replace(self._bare(item, **told), image=image), encoded

    def _id(self, item: Item) -> str:
        return f"{self.manifest.dataset}-{self.manifest.split}-{item.key}"

    def _bare(self, item: Item, **more: str) -> Sample:
        """Make a sample of an item, without its picture."""
        meta = {**item.meta, **more}
        told = self.manifest
        pair = f"{told.dataset}-{item.pair or item.key}"
        return Sample(
            sample_id=self._id(item),
            pair_id=pair,
            suite=item.suite,
            channel=item.channel,
            split=share_of(pair, self.shares, self.asked.seed),
            scenario=item.scenario,
            expected=item.expected,
            question=item.question,
            image=None,
            reference=item.reference,
            source=told.dataset,
            revision=told.revision,
            licence=told.licence,
            caption=item.caption,
            meta=json.dumps(meta, ensure_ascii=False, sort_keys=True) if meta else "",
        )


def load_source(
    name: str,
    source: Source,
    where: str | Path,
    *,
    split: str | None,
    options: Mapping[str, Any],
    revision: str | None,
    allow_partial: bool,
    shares: Mapping[Split, float] | None,
    seed: int,
) -> Loaded:
    """Look a data set through and hand it out; :func:`hauberk.data.sources.load` tells more."""
    asked = source.asked(name, split, seed, options)
    shares = shares or {"train" if asked.split == "train" else "test": 1.0}
    check_shares(shares)
    files = [pattern.format(split=asked.split) for pattern in source.files]
    root, commit = locate(where, files, revision)
    folder = Folder(root)
    present, missing, hashes = _look_through(source, folder, asked)
    for path in sorted(folder.tables):
        hashes[folder.name(path)] = file_hash(path)
    manifest = Manifest(
        dataset=name,
        split=asked.split,
        options=dict(asked.options),
        seed=seed,
        revision=commit or revision or _tables_hash(folder, hashes),
        licence=source.licence,
        gated=source.gated,
        rows_expected=source.rows(asked),
        rows_verified=source.rows_verified(asked),
        rows_present=present,
        missing=missing,
        allow_partial=allow_partial,
        files=hashes,
    )
    _refuse_partial(manifest, root)
    return Loaded(manifest, source, folder, asked, shares)


def _look_through(
    source: Source, folder: Folder, asked: Asked
) -> tuple[int, list[str], dict[str, str]]:
    """Read every row, and hash every file of a picture, without decoding any."""
    keys: dict[str, str] = {}
    present = 0
    missing: list[str] = []
    hashes: dict[str, str] = {}
    for item in source.read(folder, asked):
        _check_name(item.suite, item.where)
        _check_texts(item)
        if item.key in keys:
            raise BadData(
                f"{item.where}: the id {item.key!r} occurs before, in {keys[item.key]}; ids must "
                "be unique: remove one of the rows, or download the file again."
            )
        keys[item.key] = item.where
        if item.picture is not None and not item.picture.is_there:
            missing.append(item.picture.where)
            continue
        present += 1
        if item.picture is not None and isinstance(item.picture.content, Path):
            name = _named(item.picture.content, folder, asked)
            hashes[name] = file_hash(item.picture.content)
    return present, [*sorted(folder.missing), *missing], hashes


def _check_name(suite: str, where: str) -> None:
    if not NAME.fullmatch(suite):
        raise BadData(
            f"{where}: the suite is {suite[:100]!r}; as it names a file, it must be of at most 100 "
            "letters (a to z), digits, '_', '-' and '.', and not begin with '.': rename it."
        )


def _check_texts(item: Item) -> None:
    """Refuse halves of characters, which JSON can spell and no file can hold."""
    shown = item.picture.where if item.picture is not None else ""
    texts = (item.key, item.question, item.scenario, item.reference, item.pair, item.caption, shown)
    try:
        json.dumps([*texts, item.meta], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise BadData(
            f"{ascii(item.where)[1:-1]}: holds {half}, half of a character; correct the file, or "
            "download it again."
        ) from None


def _named(path: Path, folder: Folder, asked: Asked) -> str:
    """Call a file by its place in the data set's folder, or in the one that an option names."""
    for option, home in asked.options.items():
        if isinstance(home, Path) and path.is_relative_to(home):
            return f"{option}/{path.relative_to(home).as_posix()}"
    return folder.name(path)


def _tables_hash(folder: Folder, hashes: Mapping[str, str]) -> str:
    names = sorted(map(folder.name, folder.tables))
    listed = "".join(f"{name} {hashes[name]}\n" for name in names)
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()[:16]}"


def _refuse_partial(manifest: Manifest, root: Path) -> None:
    if not manifest.rows_present:
        named = "; ".join(manifest.missing[:_NAMED]) or "no row is left by the options"
        raise BadData(f"{root}: nothing of {manifest.dataset} can be loaded: {named}.")
    if manifest.is_whole or manifest.allow_partial:
        return
    expected = manifest.rows_expected
    told = f" of {expected}" if expected is not None else ""
    if not manifest.missing and expected is not None and manifest.rows_present > expected:
        raise BadData(
            f"{root}: {manifest.dataset} has more than it should: {manifest.rows_present} rows"
            f"{told}, so that some may be there twice.  Leave one copy of every table in the "
            "folder, or say allow_partial=True, which the manifest records."
        )
    named = "".join(f"\n  missing: {what}" for what in manifest.missing[:_NAMED])
    more = len(manifest.missing) - _NAMED
    raise BadData(
        f"{root}: {manifest.dataset} is there in part: {manifest.rows_present} rows{told}, "
        f"{len(manifest.missing)} missing.  Fetch the rest, or say allow_partial=True, which the "
        f"manifest records.{named}{f'{chr(10)}  and {more} more' if more > 0 else ''}"
    )


def _ahead(work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Do a work on items in threads, a few ahead of what is asked for; results keep the order."""
    pool = ThreadPoolExecutor(os.cpu_count(), "pictures")
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
