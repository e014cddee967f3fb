"""What was fitted on and is evaluated on is found, however it was copied."""

import io
import random
from dataclasses import replace

import pytest
from PIL import Image, ImageDraw

from hauberk.blank import blank_image
from hauberk.data.contamination import (
    NEAR,
    contamination,
    difference_hash,
    pixel_hash,
    text_hash,
)
from hauberk.data.lab import build_suite
from hauberk.errors import BadData

FIRST = build_suite("text", "test", 1, seed=0)[0]


def shapes(seed, side=256):
    rng = random.Random(seed)

    def color():
        return tuple(rng.randrange(256) for _ in range(3))

    image = Image.new("RGB", (side, side), color())
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, width, height = (rng.randrange(20, side // 2) for _ in range(4))
        form = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        form((x, y, x + width, y + height), fill=color())
    return image


def saved(image, form, **options):
    image.save(buffer := io.BytesIO(), form, **options)
    return Image.open(buffer)


def samples(side, pictures, questions=None):
    return [
        replace(
            FIRST,
            sample_id=f"{side}-{index}",
            question=questions[index] if questions else f"{side} {index}",
            image=image,
        )
        for index, image in enumerate(pictures)
    ]


def found(fitted, evaluated, **options):
    table = contamination(fitted, evaluated, **options)
    return [tuple(row) for row in table.itertuples(index=False)]


def test_nothing_in_common_is_an_empty_table_with_its_columns():
    table = contamination(
        samples("a", map(shapes, range(5))), samples("b", map(shapes, range(5, 9))), refuse=True
    )
    assert list(table.columns) == ["kind", "evaluated", "fitted", "bits", "matches"]
    assert len(table) == 0


def test_the_same_text_is_found_whatever_its_case_marks_and_spacing():
    asked = samples("a", [None, None], ["What  is THIS?", "Something else."])
    again = samples("b", [None], ["what is this"])
    assert found(asked, again) == [("text", "b-0", "a-0", 0, 1)]
    assert text_hash("Ｗｈａｔ is — this?!") == text_hash("what is this")
    assert text_hash("what is that") != text_hash("what is this")


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is C++ ?", "What is C#?"), ("2 + 2", "2 * 2"), ("$5", "€5"), ("कि", "का"), ("5%", "5")],
)
def test_symbols_tell_texts_apart(one, other):
    assert text_hash(one) != text_hash(other)
    assert text_hash(one) == text_hash(f"  {one.upper()} !")


def test_texts_without_words_are_nobodys():
    assert found(samples("a", [None] * 3, ["", "?!", "++"]), samples("b", [None], ["++"])) == []


def test_one_prompt_beside_other_pictures_is_another_question():
    """FigStep asks everything in the same words; only what is written in the picture differs."""
    ask = ["the list"] * 3
    fitted = samples("a", [shapes(1), shapes(2), None], ask)
    assert found(fitted, samples("b", [shapes(3)], ask)) == []
    assert found(fitted, samples("b", [None], ask)) == [("text", "b-0", "a-2", 0, 1)]
    assert found(fitted, samples("b", [shapes(2)], ask)) == [
        ("text", "b-0", "a-1", 0, 1), ("picture", "b-0", "a-1", 0, 1),
    ]  # fmt: skip


def test_the_same_pixels_are_the_same_picture_whatever_the_file():
    image = shapes(1)
    copies = samples("b", [saved(image, "BMP"), image.convert("RGBA"), shapes(2)])
    assert found(samples("a", [image, image]), copies) == [
        ("picture", "b-0", "a-0", 0, 2),
        ("picture", "b-1", "a-0", 0, 2),
    ]
    assert pixel_hash(Image.new("L", (2, 8))) != pixel_hash(Image.new("L", (8, 2)))


def test_a_smaller_and_a_compressed_copy_are_near_and_other_pictures_are_not():
    pictures = [shapes(seed) for seed in range(60)]
    copies = [saved(image.resize((140, 140)), "JPEG", quality=60) for image in pictures]
    rows = found(samples("a", pictures), samples("b", copies))
    right = {(f"b-{index}", f"a-{index}") for index in range(60)}
    assert {(row[1], row[2]) for row in rows} <= right
    assert len(rows) >= 57
    assert all(row[0] == "near_picture" and 0 <= row[3] <= NEAR and row[4] == 1 for row in rows)
    assert found(samples("a", pictures), samples("b", copies), near=-1) == []


def test_pictures_of_one_colour_are_the_same_only_if_they_are():
    white, black = (blank_image((32, 32), kind) for kind in ("white", "black"))
    assert difference_hash(white) is None
    assert found(samples("a", [white]), samples("b", [black])) == []
    assert found(samples("a", [white]), samples("b", [white])) == [("picture", "b-0", "a-0", 0, 1)]


def test_an_overlap_is_refused_where_it_must_not_be():
    image = shapes(1)
    with pytest.raises(BadData, match=r"1 evaluated samples were fitted on: 1 by picture.*'b-0'"):
        contamination(samples("a", [image]), samples("b", [image]), refuse=True)


def test_many_pictures_are_compared_in_blocks_as_one_by_one(monkeypatch):
    fitted, evaluated = samples("a", map(shapes, range(9))), samples("b", map(shapes, range(4, 12)))
    whole = found(fitted, evaluated, near=60)
    monkeypatch.setattr("hauberk.data.contamination._BLOCK", 3)
    assert found(fitted, evaluated, near=60) == whole
    assert whole
