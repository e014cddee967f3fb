"""Requests as somebody at the shell gives them: in words and pictures, or as a file of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hauberk.data.pictures import read_picture
from hauberk.errors import BadData, BadRequest
from hauberk.requests import Request

_FIELDS = ("text", "image", "system")


def request_of(text: str, images: Sequence[Path] = (), system: str | None = None) -> Request:
    """Make a request of words and files of pictures.

    Raises
    ------
    BadRequest
        If there are no words.
    BadData
        If a picture cannot be read.
    """
    if not text.strip():
        raise BadRequest(f"text: {text!r} asks nothing; give the words of the request.")
    return Request(text, tuple(read_picture(path) for path in images), system)


def read_requests(path: Path) -> list[Request]:
    """Read JSON lines: objects with ``text``, and with ``image`` and ``system`` where there are.

    ``image`` is the path of a picture, or a list of them, from the folder of the file.

    Raises
    ------
    BadData
        Naming the line, if one is no such object or its picture cannot be read; or if there is
        none.
    """
    try:
        # not splitlines: JSON may hold other ends of lines within a text, such as U+2028
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"{path}: cannot be read ({error}); give JSON lines in UTF-8.") from None
    found = list(_requests(lines, path))
    if not found:
        raise BadData(f'{path}: holds no request; write one a line, such as {{"text": "Hello"}}.')
    return found


def _requests(lines: Sequence[str], path: Path) -> Iterator[Request]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            told = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadData(f"{where}: no JSON ({error}); write one object a line.") from None
        if not isinstance(told, dict):
            raise BadData(
                f"{where}: {line.strip()[:60]!r} is no object; write text, image, system."
            )
        if unknown := sorted(told.keys() - set(_FIELDS)):
            raise BadData(f"{where}: unknown {unknown}; known are {', '.join(_FIELDS)}.")
        try:
            images = [path.parent / name for name in _names(told)]
            yield request_of(_text(told, "text") or "", images, _text(told, "system"))
        except (BadData, BadRequest) as error:
            raise BadData(f"{where}: {error}") from None


def _text(told: Mapping[str, Any], name: str) -> str | None:
    value = told.get(name)
    if value is not None and not isinstance(value, str):
        raise BadData(f"{name} is {value!r}; a text is right.")
    return value


def _names(told: Mapping[str, Any]) -> list[str]:
    value = told.get("image") or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadData(f"image is {value!r}; a path is right, or a list of paths.")
    return names
