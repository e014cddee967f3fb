"""Pixels: the differentiable copy of an image processor makes what the real one makes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)
from transformers.image_utils import OPENAI_CLIP_STD as CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hauberk.errors import ResampledPicture, UnknownFamily
from hauberk.pixels import APART, LAYOUTS, as_fed, check_pixel_input, frozen, pixel_input
from hauberk.requests import encode

SQUARE = {"crop_size": {"height": 48, "width": 48}, "size": {"shortest_edge": 48}}
PADDED = {"height": 60, "width": 60}
FLAT = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 32**2, "longest_edge": 96**2}}
TILED = {"size": {"height": 48, "width": 48}, "crop_to_patches": True, "max_patches": 4}
FED = [
    (CLIPImageProcessor, SQUARE, (48, 48)),
    (CLIPImageProcessorPil, SQUARE, (48, 48)),
    (CLIPImageProcessorPil, {**SQUARE, "size": {"height": 48, "width": 48}}, (48, 48)),
    (CLIPImageProcessorPil, {"size": {"shortest_edge": 48}, "do_center_crop": False}, (48, 64)),
    (
        CLIPImageProcessorPil,
        {"size": {"height": 48, "width": 56}, "do_center_crop": False, "crop_size": None},
        (48, 56),
    ),
    (SiglipImageProcessor, {"size": {"height": 48, "width": 56}}, (48, 56)),
    (SiglipImageProcessorPil, {"size": {"height": 48, "width": 56}}, (48, 56)),
    (Qwen2VLImageProcessor, FLAT, (48, 80)),
    (Qwen2VLImageProcessorPil, FLAT, (48, 80)),
    (Qwen2VLImageProcessorPil, {**FLAT, "temporal_patch_size": 1, "merge_size": 1}, (40, 56)),
    (GotOcr2ImageProcessor, TILED, (48, 48)),
    (GotOcr2ImageProcessorPil, TILED, (48, 48)),
]
"""Image processors, and a height and width that each feeds as it is."""
IN_TILES = [
    (GotOcr2ImageProcessor, TILED, (48, 96)),
    (GotOcr2ImageProcessor, TILED, (96, 96)),
    (GotOcr2ImageProcessorPil, TILED, (96, 48)),
    (GotOcr2ImageProcessorPil, TILED, (96, 96)),
    (GotOcr2ImageProcessorPil, {**TILED, "min_patches": 3}, (48, 144)),
]
"""The same for those that feed it in several tiles and a thumbnail."""


class Around:
    """Stands for a processor of which only the image processor matters."""

    def __init__(self, image_processor):
        self.image_processor = image_processor


def noise(height, width, number=2, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), np.uint8)
    return [Image.fromarray(value) for value in values]


def pixels_of(images):
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2) / 255


def assert_same(made, real, resampled=0):
    """Compare inputs, of which the last square of every so many may be off by a step of 8 bits."""
    for name, values in made.items():
        expected = real[name].to(values.dtype)
        if resampled:
            values, expected = (each.unflatten(0, (-1, resampled)) for each in (values, expected))
            off = (values[:, -1] - expected[:, -1]).abs()
            assert off.max() < 1 / 255 / min(CLIP_STD) + 1e-4
            assert off.mean() < APART / 2
            values, expected = values[:, :-1], expected[:, :-1]
        torch.testing.assert_close(values, expected, atol=2e-6, rtol=0)


def squares_of(real):
    """In how many squares one picture is fed, the last of which is a thumbnail; 0 for none."""
    number = int(real["num_patches"][0]) if "num_patches" in real else 1
    return number if number > 1 else 0


@pytest.mark.parametrize("plain", [{}, {"do_normalize": False}, {"do_rescale": False}])
@pytest.mark.parametrize(("kind", "settings", "size"), FED + IN_TILES)
def test_pictures_become_what_the_real_processor_makes_of_them(kind, settings, size, plain):
    images = kind(**settings, **plain)
    real = images(noise(*size), return_tensors="pt")
    made = pixel_input(Around(images), pixels_of(noise(*size)))
    # a number of tiles is for the processor's own use, no model takes it
    assert set(real) - {"num_patches"} == set(made)
    if plain == {"do_rescale": False}:  # values to 255 / 0.26, of which 2e-6 is beyond float32
        made = {name: values / 255 for name, values in made.items()}
        real |= {name: real[name] / 255 for name in made}
    assert_same(made, real, squares_of(real))


@pytest.mark.parametrize("kind", [GotOcr2ImageProcessor, GotOcr2ImageProcessorPil])
def test_a_thumbnail_is_right_also_where_bicubic_weights_leave_the_scale(kind):
    """Black and white: both back ends resample one side first, and clip before the other."""
    harsh = [image.point(lambda value: 255 * (value > 127)) for image in noise(96, 96)]
    images = kind(**TILED)
    real = images(harsh, return_tensors="pt")
    check_pixel_input(Around(images), pixels_of(harsh), real)
    assert_same(pixel_input(Around(images), pixels_of(harsh)), real, 5)


def test_the_inputs_of_a_model_are_those_of_its_own_processor(any_tiny):
    requests = any_tiny.pictured
    inputs = encode(any_tiny.processor, requests)
    made = pixel_input(any_tiny.processor, pixels_of([r.images[0] for r in requests]))
    of_text = {name for name, values in inputs.items() if values.shape == inputs.input_ids.shape}
    assert set(made) | of_text == set(inputs)
    assert_same(made, inputs)


@pytest.mark.parametrize(("kind", "settings", "size"), FED)
def test_every_pixel_gets_the_gradient_of_what_it_becomes(kind, settings, size):
    images = kind(**settings)
    pixels = pixels_of(noise(*size)).double().requires_grad_()
    made = pixel_input(Around(images), pixels)["pixel_values"]
    assert made.dtype == torch.float64
    (gradient,) = torch.autograd.grad(made.sum(), pixels)
    said = getattr(images, "temporal_patch_size", 1)
    expected = said / torch.tensor(images.image_std).double().view(3, 1, 1)
    torch.testing.assert_close(gradient, expected.expand_as(gradient))


@pytest.mark.parametrize(("kind", "settings", "size"), IN_TILES)
def test_a_pixel_gets_the_gradients_of_its_tile_and_of_the_thumbnail(kind, settings, size):
    images = kind(**settings)
    pixels = (0.3 + 0.4 * pixels_of(noise(*size)).double()).requires_grad_()  # nothing is clipped
    made = pixel_input(Around(images), pixels)["pixel_values"]
    weights = torch.rand(made.shape, dtype=made.dtype, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((made * weights).sum(), pixels)
    weights = (weights / torch.tensor(images.image_std).view(3, 1, 1)).unflatten(0, (2, -1))
    height, width = size
    columns = width // 48
    rows = [
        torch.cat(list(weights[:, row * columns : (row + 1) * columns].unbind(1)), dim=-1)
        for row in range(height // 48)
    ]
    whole = interpolate(pixels, (48, 48), mode="bicubic", antialias=True)
    (of_thumbnail,) = torch.autograd.grad(whole, pixels, weights[:, -1])
    torch.testing.assert_close(gradient, torch.cat(rows, dim=-2) + of_thumbnail)


@pytest.mark.parametrize(
    ("kind", "settings", "size"),
    [
        (CLIPImageProcessorPil, SQUARE, (48, 64)),
        (CLIPImageProcessorPil, SQUARE, (96, 96)),
        (CLIPImageProcessorPil, {**SQUARE, "size": {"shortest_edge": 56}}, (48, 48)),
        (SiglipImageProcessorPil, {"size": {"height": 48, "width": 56}}, (56, 48)),
        (Qwen2VLImageProcessorPil, FLAT, (48, 50)),
        (Qwen2VLImageProcessorPil, FLAT, (16, 16)),
        (Qwen2VLImageProcessorPil, FLAT, (192, 192)),
        (GotOcr2ImageProcessorPil, TILED, (48, 100)),
        (GotOcr2ImageProcessorPil, TILED, (192, 192)),
        (GotOcr2ImageProcessorPil, {**TILED, "min_patches": 2}, (48, 48)),
        (GotOcr2ImageProcessorPil, {**TILED, "size": {"height": 48, "width": 96}}, (48, 96)),
    ],
)
def test_pictures_that_would_be_resampled_or_cropped_are_refused(kind, settings, size):
    height, width = size
    says = f"pictures of {height} x {width} pixels are resampled or cropped by {kind.__name__}"
    processor, pixels = Around(kind(**settings)), pixels_of(noise(height, width))
    for refuses in (pixel_input, lambda *given: check_pixel_input(*given, {})):
        with pytest.raises(ResampledPicture, match=says):
            refuses(processor, pixels)


def test_a_setting_that_is_not_repeated_is_refused_with_the_shapes():
    kind = CLIPImageProcessorPil
    processor = Around(kind(**SQUARE, do_pad=True, pad_size=PADDED))
    fed = as_fed(processor, noise(48, 48, number=1)[0])
    real = processor.image_processor([fed], return_tensors="pt")
    says = (
        rf"pixel_values of shape \(1, .* instead of \({len(real.pixel_values)}, .*{kind.__name__}"
    )
    with pytest.raises(UnknownFamily, match=says):
        check_pixel_input(processor, pixels_of([fed]), real)


@pytest.mark.parametrize(("kind", "settings", "size"), FED)
def test_what_is_repeated_passes_and_a_difference_of_less_than_one_step_of_8_bits_does_not(
    kind, settings, size
):
    processor, pixels = Around(kind(**settings)), pixels_of(noise(*size))
    real = processor.image_processor(noise(*size), return_tensors="pt")
    check_pixel_input(processor, pixels, real)
    one_step = 1 / 255 / max(processor.image_processor.image_std)
    assert one_step > 2 * APART
    real["pixel_values"].view(-1)[7] += one_step / 2
    says = rf"differs by up to {one_step / 2:.2g}\d* from what {kind.__name__} makes.*LAYOUTS"
    with pytest.raises(UnknownFamily, match=says):
        check_pixel_input(processor, pixels, real)


@pytest.mark.parametrize("plain", [{}, {"do_normalize": False}, {"do_rescale": False}])
@pytest.mark.parametrize(("kind", "settings", "size"), IN_TILES)
def test_beside_a_thumbnail_one_step_in_single_pixels_passes_and_more_or_many_do_not(
    kind, settings, size, plain
):
    processor, pixels = Around(kind(**settings, **plain)), pixels_of(noise(*size))
    real = processor.image_processor(noise(*size), return_tensors="pt")
    check_pixel_input(processor, pixels, real)
    one_step = 1 if "do_rescale" in plain else 1 / 255
    if "do_normalize" not in plain:
        one_step /= min(CLIP_STD)
    made = pixel_input(processor, pixels)["pixel_values"]
    for steps, first, passes in ((0.99, -1, True), (1.5, -1, False), (0.99, 0, False)):
        real["pixel_values"] = made.clone()
        real["pixel_values"].view(-1)[first:] += steps * one_step
        if passes:
            check_pixel_input(processor, pixels, real)
            continue
        with pytest.raises(UnknownFamily, match="differs by up to"):
            check_pixel_input(processor, pixels, real)


sides = st.integers(20, 200)


settings_of_pil = st.sampled_from([f for f in FED + IN_TILES if "Pil" in f[0].__name__])


@given(height=sides, width=sides, of=settings_of_pil)
def test_a_picture_of_any_size_can_be_made_one_that_is_fed_as_it_is(height, width, of):
    kind, settings, _ = of
    processor = Around(kind(**settings))
    (image,) = noise(height, width, number=1)
    fed = as_fed(processor, image)
    real = processor.image_processor([fed], return_tensors="pt")
    assert_same(pixel_input(processor, pixels_of([fed])), real, squares_of(real))
    assert as_fed(processor, fed) is fed


def test_a_processor_without_a_row_is_named_with_those_that_have_one():
    processor = Around(ViTImageProcessor())
    known = ", ".join(LAYOUTS)
    with pytest.raises(UnknownFamily, match=rf"ViTImageProcessor.*known are {known}.*LAYOUTS"):
        pixel_input(processor, torch.zeros(1, 3, 224, 224))
    with pytest.raises(UnknownFamily, match="ViTImageProcessor"):
        as_fed(processor, noise(8, 8)[0])


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_weights_need_no_gradient_inside_and_what_they_needed_after(any_tiny, error):
    weights = list(any_tiny.model.parameters())
    weights[3].requires_grad_(False)
    try:
        before = [weight.requires_grad for weight in weights]
        with pytest.raises(error) if error else frozen(any_tiny.model):
            with frozen(any_tiny.model):
                assert not any(weight.requires_grad for weight in weights)
                if error:
                    raise error
        assert [weight.requires_grad for weight in weights] == before
        assert sum(before) == len(weights) - 1
    finally:
        weights[3].requires_grad_(True)


def test_half_precision_stays_half_precision(tiny):
    pixels = pixels_of(tiny.pictured[0].images)
    assert pixel_input(tiny.processor, pixels.bfloat16())["pixel_values"].dtype == torch.bfloat16
