"""A folder of one's own pictures is read in one order, whole, and known by its bytes."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFile

from hauberk.data.pictures import Picture, decode, folder_hash, picture_files, read_picture
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


def vast():
    """A small file that says it holds 20,000 x 20,000 pixels."""
    Image.new("1", (20_000, 20_000)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [300_000_000, 100_000_000])
def test_a_small_file_of_a_vast_picture_is_refused_before_it_is_decoded(monkeypatch, limit):
    """Below twice its limit Pillow only warns."""
    encoded = vast()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("was decoded"))
    with pytest.raises(BadData, match=r"some: cannot be read as a picture \(.*pixels.*replace it"):
        decode(encoded, "some")


def test_a_picture_on_its_side_is_turned_upright(tmp_path):
    path = tmp_path / "some.jpg"
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the left: what is left is above
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    upright = np.asarray(read_picture(path))
    assert upright.shape == (16, 8, 3)
    assert upright[:7].min() > 250
    assert upright[9:].max() < 5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_every_mode_becomes_8_bit_colours(mode):
    form = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    image = Image.new(mode, (4, 6), 1 if mode != "I;16" else 65535)
    image.save(buffer := io.BytesIO(), form)
    read = decode(buffer.getvalue(), "some")
    assert (read.mode, read.size) == ("RGB", (4, 6))


def test_a_palette_that_lets_through_is_read_without_a_warning():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(buffer := io.BytesIO(), "PNG", transparency=bytes([0, 128]))
    assert decode(buffer.getvalue(), "some").getpixel((0, 0)) == (0, 0, 255)


def test_of_a_moving_picture_the_beginning_is_read():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    assert decode(buffer.getvalue(), "some").getpixel((0, 0)) == (255, 0, 0)


def test_a_drawing_that_would_start_another_program_is_no_picture():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    with pytest.raises(BadData, match=r"some: cannot be read as a picture"):
        decode(eps, "some")


def test_a_picture_knows_whether_its_file_is_there(tmp_path):
    gone = Picture("row 1: some.png", tmp_path / "some.png")
    assert not gone.is_there
    with pytest.raises(BadData, match=r"row 1: some\.png: cannot be read .*put the file there"):
        gone.encoded()
    assert Picture("row 2", whole("PNG")).is_there
