"""A folder of one's own pictures is read in one order, whole, and known by its bytes."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from hauberk.data.pictures import folder_hash, picture_files, read_picture
from hauberk.errors import BadData


def paint(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    for place, name in enumerate(["b.png", "a/z.JPG", "a/deep/y.webp", "c.jpeg"]):
        paint(tmp_path / name, place)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "d.png").mkdir()
    return tmp_path


def test_pictures_are_found_in_every_folder_in_the_order_of_their_names(folder):
    names = [path.relative_to(folder).as_posix() for path in picture_files(folder)]
    assert names == ["a/deep/y.webp", "a/z.JPG", "b.png", "c.jpeg"]
    for path in picture_files(folder):
        assert (read_picture(path).mode, read_picture(path).size) == ("RGB", (12, 9))


def test_a_folder_without_pictures_says_what_belongs_there(tmp_path):
    with pytest.raises(BadData, match=r"holds no picture; put files ending in \.jpeg, \.jpg, "):
        picture_files(tmp_path)


def hash_of(folder):
    return folder_hash(folder, picture_files(folder))


def test_a_folder_is_known_by_names_and_bytes_and_not_by_its_place(folder, tmp_path_factory):
    first = hash_of(folder)
    elsewhere = shutil.copytree(folder, tmp_path_factory.mktemp("other") / "copy")
    assert hash_of(elsewhere) == first
    (elsewhere / "b.png").rename(elsewhere / "e.png")
    renamed = hash_of(elsewhere)
    paint(elsewhere / "e.png", seed=9)
    changed = hash_of(elsewhere)
    (elsewhere / "e.png").unlink()
    assert len({first, renamed, changed, hash_of(elsewhere)}) == 4


def whole(form):
    Image.new("RGB", (64, 64), "red").save(buffer := io.BytesIO(), form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", whole("PNG")[:-30], whole("JPEG")[:300], whole("WEBP")[:30]],
    ids=["empty", "text", "a PNG cut off", "a JPEG cut off", "a WebP cut off"],
)
def test_a_file_that_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "some.png"
    path.write_bytes(content)
    with pytest.raises(BadData, match=r"some\.png: cannot be read as a picture \(.*; replace it"):
        read_picture(path)


def test_a_picture_that_does_not_say_what_white_is_is_named(tmp_path):
    path = tmp_path / "depth.png"
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path, "TIFF")
    with pytest.raises(BadData, match=r"depth\.png: cannot be read as a picture \(.*white"):
        read_picture(path)
