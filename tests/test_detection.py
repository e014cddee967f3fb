"""How well unsafe patches are found: by who knows where they are, and by who does not."""

import numpy as np
import pytest
import torch

from hauberk.evaluation import detection
from hauberk.lab.scenes import SIDE

GRID = 3


@pytest.fixture(scope="module")
def pictures():
    return detection.planted("image_clutter", "calibration", size=12, seed=0, grid=GRID)


def knowing(pictures):
    """A detector that was told where the toxic things are."""
    return lambda images: torch.tensor(1 - pictures.shown[: len(images)])


def test_who_knows_where_things_are_is_always_right_and_the_opposite_always_wrong(pictures):
    scorers = {"knows": knowing(pictures), "lies": lambda images: -knowing(pictures)(images)}
    scorers["sees nothing"] = lambda images: torch.zeros(len(images), GRID**2)
    found = detection.compare(scorers, pictures)
    assert [round(found[name].value, 9) for name in scorers] == [1.0, 0.0, 0.5]
    assert all(one.low <= one.value <= one.high for one in found.values())


def test_patches_that_show_a_little_of_a_thing_are_of_neither_kind(pictures):
    shown = pictures.shown
    sides = (shown >= detection.COVERED).sum() + (shown == 0).sum()
    assert detection.measure(knowing(pictures), pictures).n == sides < shown.size


def test_every_picture_has_its_toxic_thing_somewhere(pictures):
    assert len(pictures.images) == len(pictures.shown) == 12
    assert {image.size for image in pictures.images} == {(SIDE, SIDE)}
    assert (pictures.shown.max(1) > 0).all()
    assert pictures.shown.max() <= 1


def test_a_picture_counts_as_found_if_a_patch_that_shows_the_thing_is_masked(pictures):
    clear = (pictures.shown >= detection.COVERED).any(1).mean()
    everything, nothing = float("inf"), float("-inf")
    assert detection.found(knowing(pictures), pictures, everything).value == clear > 0
    assert detection.found(knowing(pictures), pictures, nothing).value == 0
    wrong = detection.Planted(pictures.images, np.where(pictures.shown > 0, 0.0, 0.1))
    assert detection.found(knowing(pictures), wrong, everything).value == 0


def test_harmless_pictures_show_and_say_nothing_toxic():
    images = detection.harmless("calibration", size=40, seed=0)
    assert len(images) == 40
    scenes = [
        scene
        for suite in detection.HARMLESS_SUITES
        for scene, _ in zip(detection._scenes(suite, "calibration", 0), range(60), strict=False)
    ]
    toxic = [scene for scene in scenes if detection._toxic(scene)]
    assert toxic  # the suites have some, so that leaving them out does something
    drawn = {image.tobytes() for image in images}
    assert not drawn & {scene.draw().tobytes() for scene in toxic}
    share = detection.masked_share(
        lambda given: torch.arange(len(given) * 9).view(-1, 9), images, 35
    )
    assert (share.value, share.n) == (0.1, 360)


def test_pools_and_seeds_give_other_pictures():
    drawn = [
        detection.planted("image", pool, size=4, seed=seed, grid=2).images[0].tobytes()
        for pool, seed in (("calibration", 0), ("calibration", 1), ("test", 0), ("calibration", 0))
    ]
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


def test_a_suite_without_toxic_pictures_is_refused():
    with pytest.raises(ValueError, match=r"'image_twin': 0 of 40"):
        detection.planted("image_twin", "calibration", size=2, seed=0, grid=2)
