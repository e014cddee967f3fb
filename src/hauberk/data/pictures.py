"""Pictures of a user's own: a folder of files, read in one order whatever the file system's is."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hauberk.errors import BadData, BadRequest
from hauberk.files import file_hash
from hauberk.requests import as_rgb

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def picture_files(folder: Path) -> list[Path]:
    """List the pictures of a folder and of all folders in it, by name.

    Raises
    ------
    BadData
        If there is none.
    """
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    files = sorted((path for path in found if path.is_file()), key=lambda path: path.as_posix())
    if not files:
        raise BadData(
            f"{folder}: holds no picture; put files ending in {', '.join(SUFFIXES)} there, in "
            "folders of it as well."
        )
    return files


def read_picture(path: Path) -> Image.Image:
    """Read one picture whole, as 8-bit colours.

    Raises
    ------
    BadData
        If it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return as_rgb(image)
    except (OSError, SyntaxError, ValueError, BadRequest, Image.DecompressionBombError) as error:
        raise BadData(f"{path}: cannot be read as a picture ({error}); replace it.") from None


def folder_hash(folder: Path, files: Sequence[Path]) -> str:
    """sha256 of the names in a folder with the sha256 of each file, in their order."""
    lines = [f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
