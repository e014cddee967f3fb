"""Pictures of a user's own: files, or bytes of a table, read in one way whatever they come from."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from hauberk.errors import BadData, BadRequest
from hauberk.files import file_hash

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened, whatever its name ends in.  EPS is not among them: Pillow would start Ghostscript
on it."""


@dataclass(frozen=True)
class Picture:
    """A picture that is not read yet: where it lies, and the way to its bytes."""

    where: str
    """For people: a file, or the row of a table."""
    content: bytes | Path
    """What its file holds, or the file."""

    @property
    def is_there(self) -> bool:
        """Whether its file exists."""
        return isinstance(self.content, bytes) or self.content.is_file()

    def encoded(self) -> bytes:
        """Read the bytes of its file.

        Raises
        ------
        BadData
            If the file cannot be read.
        """
        if isinstance(self.content, bytes):
            return self.content
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise BadData(f"{self.where}: cannot be read ({error}); put the file there.") from None

    def decoded(self) -> Image.Image:
        """Read it whole, upright, as 8-bit colours; of a moving picture, its beginning.

        Raises
        ------
        BadData
            If it is no picture, is cut off, or is larger than Pillow deems safe.
        """
        return decode(self.encoded(), self.where)


def decode(encoded: bytes, where: str) -> Image.Image:
    """Decode the bytes of a picture's file as :meth:`Picture.decoded` does."""
    from hauberk.requests import as_rgb  # here, so that reading suites needs no torch

    image = upright(encoded, where)
    try:
        return as_rgb(image)
    except BadRequest as error:
        raise _unreadable(where, error) from None


def upright(encoded: bytes, where: str) -> Image.Image:
    """Decode the bytes of a picture's file whole and upright, in the colours that it has.

    Raises
    ------
    BadData
        As :meth:`Picture.decoded` does.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            _check_size(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # whatever a broken file makes a decoder raise
        raise _unreadable(where, error) from None


def _unreadable(where: str, error: Exception) -> BadData:
    return BadData(f"{where}: cannot be read as a picture ({error}); replace it.")


def _check_size(image: Image.Image) -> None:
    """Refuse what Pillow only warns of: a small file that says it holds a vast picture."""
    limit = Image.MAX_IMAGE_PIXELS
    width, height = image.size
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels are more than {limit}")


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
    """Read one picture whole, upright, as 8-bit colours.

    Raises
    ------
    BadData
        If it cannot be read.
    """
    return Picture(str(path), path).decoded()


def folder_hash(folder: Path, files: Sequence[Path]) -> str:
    """sha256 of the names in a folder with the sha256 of each file, in their order."""
    lines = [f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
