"""What a data set is to hauberk: where it comes from, and how its rows become samples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hauberk.data.pictures import Picture
from hauberk.data.samples import Channel, Expected
from hauberk.data.sources.folder import Folder
from hauberk.errors import BadParams


@dataclass(frozen=True)
class Item:
    """One row as its loader understands it, before it is a sample with a name and a split."""

    key: str
    """Tells the rows of a data set apart, whatever the options: a row that is asked in another way
    has another."""
    suite: str
    channel: Channel
    expected: Expected
    question: str
    where: str
    """For people: file and row."""
    picture: Picture | None = None
    scenario: str = ""
    reference: str = ""
    pair: str = ""
    """What it shares with its twins; the key where it has none."""
    caption: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What else is told: see :attr:`hauberk.data.samples.Sample.details`."""


@dataclass(frozen=True)
class Asked:
    """What of a data set is to be loaded."""

    split: str
    seed: int
    options: Mapping[str, Any]

    def __getitem__(self, option: str) -> Any:
        return self.options[option]


@dataclass(frozen=True)
class Option:
    """One thing that may be chosen: among some words, or of a type."""

    default: Any
    allowed: type | tuple[str, ...]
    what: str
    """What it chooses, in a few words."""

    def checked(self, name: str, value: Any) -> Any:
        """Check what was chosen; a folder becomes a path.

        Raises
        ------
        BadParams
            If it is not allowed.
        """
        if isinstance(self.allowed, tuple):
            right, wanted = value in self.allowed, f"one of {', '.join(self.allowed)}"
        elif self.allowed is Path:
            right, wanted = isinstance(value, str | Path) and Path(value).is_dir(), "a folder"
        else:
            right, wanted = type(value) is self.allowed, f"of type {self.allowed.__name__}"
        if not right and value != self.default:
            raise BadParams(f"option {name!r} ({self.what}) is {value!r}; it must be {wanted}.")
        return Path(value) if self.allowed is Path and value is not None else value


Read = Callable[[Folder, Asked], Iterator[Item]]


@dataclass(frozen=True)
class Source:
    """A data set, and the function that reads it wherever it lies."""

    title: str
    licence: str
    splits: tuple[str, ...]
    """Its own, the one that is evaluated on first."""
    rows: Callable[[Asked], int | None]
    """How many there are in all; None where its authors do not say."""
    files: tuple[str, ...]
    """What is needed of it, as patterns; ``{split}`` stands for the split."""
    read: Read
    hub: str = ""
    """Its id on the hub, if it is there."""
    gated: bool = False
    """Whether its terms must be accepted on the hub before it can be downloaded."""
    options: Mapping[str, Option] = field(default_factory=dict)
    rows_verified: Callable[[Asked], bool] = lambda asked: True
    """Whether ``rows`` was found in what its authors published; a number that is only remembered
    goes into the manifest, and no set is refused by it."""

    def asked(self, name: str, split: str | None, seed: int, options: Mapping[str, Any]) -> Asked:
        """Check what is asked of it.

        Raises
        ------
        BadParams
            If it has no such split or option, or an option cannot have this value.
        """
        split = self.splits[0] if split is None else split
        if split not in self.splits:
            raise BadParams(f"{name} has no split {split!r}; it has {', '.join(self.splits)}.")
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise BadParams(f"{name} has no options {unknown}; it has {known}.")
        chosen = {
            each: option.checked(each, options.get(each, option.default))
            for each, option in self.options.items()
        }
        return Asked(split, seed, chosen)


def sized(**rows: int) -> Callable[[Asked], int | None]:
    """Tell the rows of a data set by its split alone."""
    return lambda asked: rows.get(asked.split)


def only(*splits: str) -> Callable[[Asked], bool]:
    """Say that the rows of these splits alone are verified."""
    return lambda asked: asked.split in splits
