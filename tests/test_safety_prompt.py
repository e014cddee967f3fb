"""The visual safety prompt as it is deployed: where pictures go, what is kept and refused."""

import copy
import hashlib
import json
import shutil
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hauberk.bundle import CARD, Card, _canonical, binding_of, check_binding, read_card
from hauberk.defenses.safety_prompt import FRAME, Geometry, SafetyPrompt
from hauberk.errors import BadRequest, TamperedBundle, UnsupportedRequest, WrongModel
from hauberk.files import file_hash
from hauberk.requests import Request, encode, respond

GEOMETRY = Geometry(96, 96, (12, 10, 16, 14))
COVER = replace(GEOMETRY, fit="cover", ground=(0, 128, 255))
ONE_SIDED = Geometry(96, 96, (0, 0, 24, 0))
GEOMETRIES = [GEOMETRY, COVER, ONE_SIDED]
PREFIX = "look first . "


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def frame_of(geometry=GEOMETRY, seed=1):
    return tensor_of(noise(geometry.width, geometry.height, seed))


def tensor_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def answers(tiny, requests, defense):
    said = respond(tiny.model, tiny.processor, requests, defense, max_new_tokens=5)
    return [answer.text for answer in said]


@pytest.fixture
def prompt():
    return SafetyPrompt(frame_of(), GEOMETRY, PREFIX)


# --- where the frame is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"margins": (0, 0, 0, 0)}, "are no frame; give four widths"),
        ({"margins": (12, -1, 12, 12)}, "are no frame; give four widths"),
        ({"margins": (48, 0, 48, 0)}, "leave no room for an image on a canvas of 96 x 96 pixels"),
        ({"margins": (0, 90, 0, 20)}, "leave no room for an image on a canvas of 96 x 96 pixels"),
        ({"height": 20}, "leave no room for an image on a canvas of 20 x 96 pixels"),
        ({"margins": (12, 12)}, r"\(96, 96, 12, 12\) are no height, width and four margins"),
        ({"height": 96.0}, "are no height, width and four margins in whole pixels"),
        ({"fit": "crop"}, "'crop' is not one of shrink, cover"),
        ({"ground": (256, 0, 0)}, r"\(256, 0, 0\) is no colour; give three values of 0..255"),
        ({"ground": (-1, 0, 0)}, "is no colour"),
        ({"ground": (0.5, 0, 0)}, "is no colour"),
        ({"ground": (1.0, 0, 0)}, "is no colour"),
        ({"ground": (1, 2)}, "is no colour"),
    ],
)
def test_a_geometry_without_a_frame_or_room_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(GEOMETRY, **changes)


def test_a_geometry_is_the_same_from_a_card_in_json():
    for geometry in GEOMETRIES:
        again = Geometry(**json.loads(json.dumps(asdict(geometry))))
        assert again == geometry
        assert hash(again) == hash(geometry)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rim_and_inside_make_up_the_canvas(geometry):
    top, right, bottom, left = geometry.margins
    assert geometry.rim.shape == (geometry.height, geometry.width)
    assert not geometry.rim[geometry.inside].any()
    inside = (geometry.height - top - bottom) * (geometry.width - left - right)
    assert int((~geometry.rim).sum()) == inside
    sides = geometry.rim[0], geometry.rim[:, -1], geometry.rim[-1], geometry.rim[:, 0]
    assert [bool(side.all()) for side in sides] == [margin > 0 for margin in geometry.margins]


# --- pictures in it ---------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_image_of_the_size_of_its_place_is_put_there_bit_by_bit(geometry):
    inside = slice(0, 96), slice(0, 96)
    if geometry.fit == "shrink":
        inside = geometry.inside
    size = [part.stop - part.start for part in inside]
    image = noise(size[1], size[0])
    canvas = geometry.place(image)
    assert not canvas[:, geometry.rim].any()
    shown = tensor_of(image)
    if geometry.fit == "cover":
        shown = shown[:, geometry.inside[0], geometry.inside[1]]
    assert torch.equal(canvas[:, geometry.inside[0], geometry.inside[1]], shown)


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    geometry=st.sampled_from(GEOMETRIES),
)
def test_a_picture_of_any_size_is_wholly_inside_on_the_ground(width, height, geometry):
    """Red on the ground: a red part in the middle, of its aspect up to a pixel."""
    canvas = geometry.place(Image.new("RGB", (width, height), (200, 0, 7)))
    assert not canvas[:, geometry.rim].any()
    inside = canvas[:, geometry.inside[0], geometry.inside[1]].permute(1, 2, 0)
    red = (inside == torch.tensor([200, 0, 7])).all(-1)
    ground = (inside == torch.tensor(geometry.ground)).all(-1)
    assert red.any()
    assert bool((red | ground).all())
    if geometry.fit == "shrink":
        rows, columns = red.any(1).sum().item(), red.any(0).sum().item()
        assert int(red.sum()) == rows * columns
        scale = min(red.shape[0] / height, red.shape[1] / width)
        assert rows == pytest.approx(max(1, height * scale), abs=0.51)
        assert columns == pytest.approx(max(1, width * scale), abs=0.51)
        around = [
            line.flip(0).int().argmax() - line.int().argmax() for line in (red.any(0), red.any(1))
        ]
        assert all(abs(uneven) <= 1 for uneven in around)


@pytest.mark.parametrize("size", [(1, 1), (5000, 20), (20, 5000), (96, 96), (72, 68), (640, 480)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_thin_or_tiny_picture_is_still_to_be_seen_and_others_are_padded_as_pillow_does(
    size, geometry
):
    image = noise(*size)
    canvas = geometry.place(image)
    inside = canvas[:, geometry.inside[0], geometry.inside[1]]
    assert (inside.permute(1, 2, 0) != torch.tensor(geometry.ground)).any()
    if max(size) < 5000:
        rows, columns = (
            geometry.inside if geometry.fit == "shrink" else (slice(0, 96), slice(0, 96))
        )
        place = columns.stop - columns.start, rows.stop - rows.start
        padded = ImageOps.pad(image, place, Image.Resampling.BICUBIC, color=geometry.ground)
        expected = torch.zeros_like(canvas)
        expected[:, rows, columns] = tensor_of(padded)
        assert torch.equal(canvas, expected.masked_fill(geometry.rim, 0))


def of_mode(mode):
    """A red picture, or a light grey one where the mode has no colours."""
    if mode.startswith("I;16"):
        return Image.fromarray(np.full((40, 30), 200 * 257, np.uint16)).convert("I").convert(mode)
    return Image.new("RGB", (30, 40), (200, 0, 0)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "shown"),
    [
        ("RGB", (200, 0, 0)),
        ("RGBA", (200, 0, 0)),
        ("CMYK", (200, 0, 0)),
        ("P", (200, 0, 0)),
        ("YCbCr", (200, 0, 0)),
        ("HSV", (200, 0, 0)),
        ("L", (60, 60, 60)),
        ("LA", (60, 60, 60)),
        ("1", None),
        ("I;16", (200, 200, 200)),
    ],
)
def test_a_picture_of_every_mode_is_framed_in_its_colours(prompt, mode, shown):
    image = of_mode(mode)
    framed = prompt.framed(image)
    assert (framed.mode, framed.size) == ("RGB", (96, 96))
    middle = np.array(framed)[40, 46]
    if shown is None:  # of black and white only
        return
    limit = 6 if mode in ("P", "YCbCr", "HSV") else 1
    assert abs(middle.astype(int) - shown).max() <= limit


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_picture_that_does_not_say_what_is_white_is_refused(prompt, mode):
    request = Request("what ?", (Image.new(mode, (30, 40)),))
    for work in (lambda: prompt.rewrite(request), lambda: GEOMETRY.place(request.images[0])):
        with pytest.raises(BadRequest, match=f"mode '{mode}' does not say which value is white"):
            work()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_frame_is_around_every_picture_and_nowhere_else(geometry):
    frame, image = frame_of(geometry), noise(50, 70)
    framed = tensor_of(SafetyPrompt(frame, geometry).framed(image))
    assert torch.equal(framed, torch.where(geometry.rim, frame, geometry.place(image)))
    again = tensor_of(SafetyPrompt(frame, geometry).framed(noise(50, 70, seed=9)))
    assert torch.equal(again[:, geometry.rim], framed[:, geometry.rim])
    assert not torch.equal(again, framed)


def test_what_a_frame_holds_inside_is_not_kept():
    frame = frame_of()
    changed = torch.where(GEOMETRY.rim, frame, 255 - frame)
    one, other = (SafetyPrompt(each, GEOMETRY) for each in (frame, changed))
    assert torch.equal(one.frame, other.frame)
    assert torch.equal(frame, frame_of())  # what was given is not written to


# --- requests ---------------------------------------------------------------------------------


def test_a_request_of_text_alone_comes_back_as_the_same_object(prompt):
    request = Request("how do i draw a lamp ?", system="be short .")
    assert prompt.rewrite(request) is request


def test_the_prefix_stands_before_the_question_and_all_else_is_kept(prompt):
    images = noise(96, 96), noise(20, 30)
    request = Request("what is it ?", images, system="be short .", begun="it")
    changed = prompt.rewrite(request)
    assert (changed.text, changed.system, changed.begun) == (
        f"{PREFIX}what is it ?",
        "be short .",
        "it",
    )
    assert [image.tobytes() for image in changed.images] == [
        prompt.framed(image).tobytes() for image in images
    ]
    assert request.images == images


def test_a_prefix_alone_leaves_pictures_as_they_are(prompt):
    request = Request("what is it ?", (noise(20, 30),))
    alone = prompt.without_frame()
    changed = alone.rewrite(request)
    assert changed.images[0] is request.images[0]
    assert changed.text == f"{PREFIX}what is it ?"
    assert prompt.with_prefix("").rewrite(request).text == "what is it ?"
    assert torch.equal(prompt.with_prefix("other ").frame, prompt.frame)
    with pytest.raises(ValueError, match="there is no frame, only a prefix"):
        alone.picture()


def test_neither_frame_nor_prefix_is_refused(prompt):
    for work in (
        lambda: SafetyPrompt(None, GEOMETRY),
        lambda: prompt.without_frame().with_prefix(""),
        lambda: SafetyPrompt(frame_of(), GEOMETRY).without_frame(),
    ):
        with pytest.raises(ValueError, match="neither frame nor prefix"):
            work()


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, 96, 96),
        torch.zeros(3, 96, 95, dtype=torch.uint8),
        torch.zeros(96, 96, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 96, 96, dtype=torch.uint8),
    ],
)
def test_a_frame_of_another_type_or_shape_is_refused_with_what_is_right(wrong):
    with pytest.raises(ValueError, match=r"is wrong, \(3, 96, 96\) of torch.uint8 is right"):
        SafetyPrompt(wrong, GEOMETRY)


# --- models -----------------------------------------------------------------------------------


def test_the_processor_feeds_a_framed_picture_as_it_is(any_tiny, prompt):
    """What differs between black and white is the inside, to the pixel: nothing is resampled."""
    shown = [
        Request("what ?", (Image.new("RGB", (72, 68), colour),)) for colour in ("black", "white")
    ]
    one, other = (
        encode(any_tiny.processor, [prompt.rewrite(request)])["pixel_values"] for request in shown
    )
    rim = GEOMETRY.rim.float().mean().item()
    assert (one == other).float().mean().item() == pytest.approx(rim)


def test_a_picture_gives_other_answers_in_a_frame_and_the_model_is_as_it_was(any_tiny, prompt):
    requests = any_tiny.pictured[:4] + any_tiny.plain[:2] + any_tiny.varied
    before = answers(any_tiny, requests, None)
    framed = answers(any_tiny, requests, prompt)
    assert framed[:4] != before[:4]
    assert framed[4:6] == before[4:6]
    assert answers(any_tiny, [prompt.rewrite(request) for request in requests], None) == framed
    assert answers(any_tiny, requests, None) == before


# --- bundles ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(any_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "bundle"
    binding = binding_of(any_tiny.model, any_tiny.processor)
    data = [{"id": "anchor/text_image", "sha256": "ab" * 32}]
    prompt = SafetyPrompt(frame_of(COVER), COVER, PREFIX)
    prompt.save(folder, binding, data=data, measurements={"unsafe_rate": 0.25},
                extra_files={"history.json": "[]\n"})  # fmt: skip
    return folder


@pytest.fixture
def bundle(saved, tmp_path):
    """A copy to do damage to."""
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def sign(folder, **changes):
    """Write a card whose own hash and those of the files are right, as an attacker can."""
    content = json.loads((folder / CARD).read_text()) | changes
    content["files"] = {
        path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.name != CARD
    }
    del content["card_sha256"]
    content["card_sha256"] = hashlib.sha256(_canonical(content)).hexdigest()
    (folder / CARD).write_bytes(_canonical(content))


def read(folder):
    return SafetyPrompt.read(*read_card(folder))


def loaded(folder, tiny):
    """As hauberk.load does it."""
    home, card = read_card(folder)
    check_binding(card, tiny.model, tiny.processor)
    return SafetyPrompt.load(home, card, tiny.model, tiny.processor)


def test_a_bundle_gives_back_the_same_frame_pictures_and_answers(any_tiny, saved):
    prompt = SafetyPrompt(frame_of(COVER), COVER, PREFIX)
    requests = any_tiny.pictured[:4] + any_tiny.plain[:2] + any_tiny.varied
    expected = answers(any_tiny, requests, prompt)
    for again in (read(saved), loaded(saved, any_tiny)):
        assert torch.equal(again.frame, prompt.frame)
        assert (again.geometry, again.prefix) == (prompt.geometry, prompt.prefix)
        for image in (request.images[0] for request in any_tiny.varied):
            assert again.framed(image).tobytes() == prompt.framed(image).tobytes()
        assert answers(any_tiny, requests, again) == expected
    assert expected != answers(any_tiny, requests, None)


def test_what_is_deployed_is_a_picture_that_any_program_shows(saved):
    with Image.open(saved / FRAME) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (96, 96))
        whole = tensor_of(picture)
    assert torch.equal(whole[:, COVER.rim], frame_of(COVER)[:, COVER.rim])
    ground = torch.tensor(COVER.ground, dtype=torch.uint8)[:, None]
    assert torch.equal(whole[:, ~COVER.rim], ground.expand(3, int((~COVER.rim).sum())))


def test_the_card_tells_what_the_frame_is_and_what_it_was_made_from(saved):
    home, card = read_card(saved)
    assert card.method == SafetyPrompt.method
    assert card.parameters["prefix"] == PREFIX
    assert Geometry(**card.parameters["geometry"]) == COVER
    assert card.data == [{"id": "anchor/text_image", "sha256": "ab" * 32}]
    assert card.measurements == {"unsafe_rate": 0.25}
    assert set(card.files) == {FRAME, "history.json"}
    assert (home / "history.json").read_text() == "[]\n"


def test_a_prefix_alone_comes_back_without_a_picture(tiny, tmp_path):
    binding = binding_of(tiny.model, tiny.processor)
    SafetyPrompt(None, GEOMETRY, PREFIX).save(tmp_path / "bundle", binding, data=[])
    again = read(tmp_path / "bundle")
    assert (again.frame, again.prefix, again.geometry) == (None, PREFIX, GEOMETRY)
    assert read_card(tmp_path / "bundle")[1].files == {}


def test_the_same_frame_is_saved_as_the_same_bytes(tiny, tmp_path):
    binding = binding_of(tiny.model, tiny.processor)
    for name in ("one", "two"):
        SafetyPrompt(frame_of(), GEOMETRY).save(tmp_path / name, binding, data=[])
    files = [
        {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


def test_a_changed_or_missing_frame_is_noticed(bundle):
    content = (bundle / FRAME).read_bytes()
    (bundle / FRAME).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(TamperedBundle, match=FRAME):
        read_card(bundle)
    (bundle / FRAME).unlink()
    with pytest.raises(TamperedBundle, match="no such file"):
        read_card(bundle)


def damage(kind, folder):
    told = json.loads((folder / CARD).read_text())["parameters"]
    picture, content = folder / FRAME, (folder / FRAME).read_bytes()
    if kind == "smaller picture":
        noise(96, 95).save(picture)
    elif kind == "no picture":
        picture.write_text("not a picture")
    elif kind == "cut":
        picture.write_bytes(content[: len(content) // 2])
    elif kind == "broken":  # the kind of a chunk
        picture.write_bytes(content.replace(b"IDAT", b"ID\x00T"))
    elif kind == "lying size":  # of 60000 x 60000 pixels
        header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + content[24:29]
        checksum = zlib.crc32(header).to_bytes(4, "big")
        picture.write_bytes(content[:12] + header + checksum + content[33:])
    elif kind == "missing":
        picture.unlink()
    else:
        changes = {
            "larger canvas": {"height": 100},
            "no room": {"margins": [50, 0, 50, 0]},
            "text": {"height": "96"},
            "three margins": {"margins": [1, 2, 3]},
            "another key": {"depth": 3},
        }
        told["geometry"] |= changes[kind]
    return told


@pytest.mark.parametrize(
    "kind",
    [
        "smaller picture", "no picture", "cut", "broken", "lying size", "missing", "larger canvas",
        "no room", "text", "three margins", "another key",
    ],
)  # fmt: skip
def test_a_signed_card_of_another_frame_than_its_picture_is_refused(bundle, kind):
    sign(bundle, parameters=damage(kind, bundle))
    with pytest.raises(TamperedBundle, match=r"it holds no frame of davsp \(.*download it again"):
        read(bundle)


@pytest.mark.parametrize("gone", ["geometry", "prefix", "framed"])
def test_a_card_that_does_not_tell_all_is_refused(bundle, gone):
    told = json.loads((bundle / CARD).read_text())["parameters"]
    del told[gone]
    sign(bundle, parameters=told)
    with pytest.raises(TamperedBundle, match=f"KeyError.*{gone}"):
        read(bundle)


def test_a_frame_of_a_bundle_is_applied_to_its_own_model_alone(any_tiny, saved):
    other = copy.deepcopy(any_tiny.model)
    with torch.no_grad():
        next(iter(other.get_decoder().layers.parameters())).mul_(1.5)
    prompt = loaded(saved, any_tiny)
    for each in (prompt, prompt.with_prefix("other "), prompt.without_frame()):
        with each.applied(any_tiny.model):
            pass
        with pytest.raises(WrongModel, match="weights: expected"):
            with each.applied(other):
                pass
    for free in (read(saved), SafetyPrompt(frame_of(), GEOMETRY)):
        with free.applied(other):  # a frame is only pixels
            pass
    with pytest.raises(WrongModel, match="weights: expected"):
        check_binding(read_card(saved)[1], other, any_tiny.processor)


def test_a_frame_that_is_no_png_by_its_content_is_never_opened(tmp_path, tiny, monkeypatch):
    """Of other formats some, such as EPS, would run a program to be read."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n%%EndComments\nshowpage\n"
    (tmp_path / "frame.png").write_bytes(eps)
    geometry = {"height": 96, "width": 96, "margins": [12] * 4}
    told = {"geometry": geometry, "prefix": "", "framed": True}
    card = Card("davsp", binding_of(tiny.model, tiny.processor), told, [])
    with pytest.raises(TamperedBundle, match="holds no frame"):
        SafetyPrompt.read(tmp_path, card)
    wrong = Card("davsp", card.binding, told | {"prefix": 5}, [])
    with pytest.raises(TamperedBundle, match="prefix 5 is no text"):
        SafetyPrompt.read(tmp_path, wrong)


# --- pictures that it was never shown ---------------------------------------------------------


def test_a_model_that_reads_a_picture_which_was_never_framed_is_stopped(tiny):
    request = Request("what is this ?", (Image.new("RGB", (96, 96), "red"),))
    defense = SafetyPrompt(frame_of(), GEOMETRY)
    inputs = encode(tiny.processor, [request])
    alone = encode(tiny.processor, [replace(request, images=())])
    before = tiny.model(**inputs).logits
    with defense.applied(tiny.model):
        tiny.model.generate(**alone, max_new_tokens=1)
        with pytest.raises(UnsupportedRequest, match=r"DAVSP.*hauberk\.respond"):
            tiny.model.generate(**inputs, max_new_tokens=1)
        tiny.model(**encode(tiny.processor, [defense.rewrite(request)]))
    assert torch.equal(tiny.model(**inputs).logits, before)


@pytest.mark.parametrize("given", [Image.new("RGB", (2, 2)), "picture.png", ["picture.png"]])
def test_a_request_says_how_pictures_are_given(given):
    with pytest.raises(TypeError, match=r"PIL\.Image\.open"):
        Request("what is this ?", given)


def test_one_request_is_no_list_of_them(tiny):
    with pytest.raises(TypeError, match=r"give a list: \[request\]"):
        respond(tiny.model, tiny.processor, Request("what is this ?"))
