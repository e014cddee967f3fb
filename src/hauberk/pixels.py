"""Pixels: what an image processor makes of a picture, as a function that gradients pass through.

Processors work on 8-bit pictures, outside of automatic differentiation.  :func:`pixel_input`
repeats what they do to a picture that they neither resample nor crop: rescale, normalise, lay out.
An attack on a picture and the training of a frame around it both start there.  Not every setting
of every processor is repeated: :func:`check_pixel_input` compares with the real one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedModel, ProcessorMixin

from hauberk.errors import ResampledPicture, UnknownFamily

Size = tuple[int, int]
"""Height and width in pixels."""

APART = 1e-3
"""Rounding stays below it, where float32 is used; one step of 8 bits is 1/255 or more."""


@dataclass(frozen=True)
class Layout:
    """How one class of image processors feeds a picture."""

    sizes: Callable[[Any, int, int], list[Size]]
    """What a picture of some height and width is resampled and cropped to, in this order."""
    arrange: Callable[[Any, Tensor], dict[str, Tensor]]
    """Lays out normalised pictures as the model takes them."""
    cut: Callable[[Any, Tensor], Tensor] = lambda _, pixels: pixels
    """Cuts pictures in [0, 1] into those that are normalised."""
    resamples: bool = False
    """Whether those that are cut besides are resampled: back ends round on the way, each in its own
    manner, so that single pixels may be off by a step of 8 bits."""


def pixel_input(processor: ProcessorMixin, pixels: Tensor) -> dict[str, Tensor]:
    """Turn pictures into what the model takes in their place, differentiably.

    Parameters
    ----------
    processor : one whose image processor has a row in :data:`LAYOUTS`
    pixels : Tensor (n, 3, height, width), float, in [0, 1]
        8-bit values divided by 255.

    Returns
    -------
    dict of str to Tensor
        What the image processor returns for the same pictures, but for what no model takes:
        ``pixel_values`` in the dtype and on the device of ``pixels``, and with flat patches
        ``image_grid_thw``.

    Raises
    ------
    UnknownFamily
        If the class of the image processor has no row.
    ResampledPicture
        If the processor would resample or crop pictures of this size; see :func:`as_fed`.
    """
    images, layout = _layout_of(processor)
    height, width = pixels.shape[-2:]
    sizes = layout.sizes(images, height, width)
    if any(size != (height, width) for size in sizes):
        fed = " x ".join(map(str, sizes[-1]))
        raise ResampledPicture(
            f"pictures of {height} x {width} pixels are resampled or cropped by "
            f"{type(images).__name__}, which no gradient passes; give pictures of {fed}, as "
            "hauberk.pixels.as_fed makes them."
        )
    pixels = layout.cut(images, pixels) * _scale(images)
    if images.do_normalize:
        mean, std = (
            torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)
            for values in (images.image_mean, images.image_std)
        )
        pixels = (pixels - mean) / std
    return layout.arrange(images, pixels)


def check_pixel_input(
    processor: ProcessorMixin, pixels: Tensor, real: Mapping[str, Tensor]
) -> None:
    """Check that :func:`pixel_input` makes of some pictures what the real processor made of them.

    Parameters
    ----------
    processor, pixels : as :func:`pixel_input` takes them
    real : what ``processor`` made of the same pictures, whatever else it holds

    Raises
    ------
    UnknownFamily
        If the two differ in shape, or by more than :data:`APART`: on average, where a thumbnail is
        resampled, and then in no pixel by more than a step of 8 bits.
    ResampledPicture
        As :func:`pixel_input` raises it.
    """
    images, layout = _layout_of(processor)
    height, width = pixels.shape[-2:]
    inputs = pixel_input(processor, pixels)
    apart = mean = APART * _scale(images)
    if layout.resamples and len(inputs["pixel_values"]) > len(pixels):
        apart += _scale(images) / 255 / (min(images.image_std) if images.do_normalize else 1)
    for name, made in inputs.items():
        given = real[name].to(made)
        if made.shape != given.shape:
            how = f"{name} of shape {tuple(made.shape)} instead of {tuple(given.shape)}"
        elif (off := (made - given).abs()).max() > apart or off.float().mean() > mean:
            how = f"{name} that differs by up to {off.max():.3g}"
        else:
            continue
        raise UnknownFamily(
            f"hauberk.pixels makes {how} from what {type(processor.image_processor).__name__} "
            f"makes of the same pictures of {height} x {width} pixels, so that gradients would be "
            "those of another input than the model's; set the processor as models of its family "
            "do, or teach its row in LAYOUTS of hauberk/pixels.py this setting."
        )


def as_fed(processor: ProcessorMixin, image: Image.Image) -> Image.Image:
    """Crop and resample a picture to the size that the processor feeds as it is.

    Raises
    ------
    UnknownFamily
        If the class of the image processor has no row in :data:`LAYOUTS`.
    """
    images, layout = _layout_of(processor)
    height, width = layout.sizes(images, image.height, image.width)[-1]
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Take no gradient of any weight while the ``with`` block runs, so that only pixels get one."""
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        for weight, _ in before:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, required in before:
            weight.requires_grad_(required)


def _scale(images: Any) -> float:
    """What the processor makes of white before it normalises: 1 in most."""
    return float(255 * images.rescale_factor) if images.do_rescale else 255.0


def _layout_of(processor: ProcessorMixin) -> tuple[Any, Layout]:
    images = processor.image_processor
    name = type(images).__name__.removesuffix("Pil")  # two back ends, one arithmetic
    if name not in LAYOUTS:
        raise UnknownFamily(
            f"pictures for {type(images).__name__} cannot be made differentiably; known are "
            f"{', '.join(LAYOUTS)}. Add a row to LAYOUTS in hauberk/pixels.py."
        )
    return images, LAYOUTS[name]


# --- one square: CLIP and SigLIP --------------------------------------------------------------


def _square_sizes(images: Any, height: int, width: int) -> list[Size]:
    size, short = images.size, min(height, width)
    resized = (size.height, size.width)
    if size.shortest_edge:
        resized = height * size.shortest_edge // short, width * size.shortest_edge // short
    if not images.do_center_crop:
        return [resized]
    return [resized, (images.crop_size["height"], images.crop_size["width"])]


def _plain(_: Any, pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels}


# --- flat patches with a grid: Qwen2-VL and Qwen2.5-VL ----------------------------------------


def _flat_sizes(images: Any, height: int, width: int) -> list[Size]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    size = smart_resize(
        height,
        width,
        factor=images.patch_size * images.merge_size,
        min_pixels=images.size["shortest_edge"],
        max_pixels=images.size["longest_edge"],
    )
    return [size]


def _flat(images: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Cut patches: neighbours that are merged after one another, each said for every frame."""
    side, merged = images.patch_size, images.merge_size
    n, channels, height, width = pixels.shape
    rows, columns = height // side, width // side
    cut = pixels.reshape(
        n, channels, rows // merged, merged, side, columns // merged, merged, side
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = cut.unsqueeze(6).expand(*cut.shape[:6], images.temporal_patch_size, side, side)
    grid = torch.tensor([[1, rows, columns]], device=pixels.device)
    return {
        "pixel_values": frames.reshape(n * rows * columns, -1),
        "image_grid_thw": grid.repeat(n, 1),
    }


# --- tiles and a thumbnail of them: InternVL ---------------------------------------------------


def _tile_sizes(images: Any, height: int, width: int) -> list[Size]:
    rows, columns = _tiles_of(images, height, width)
    return [(rows * images.size["height"], columns * images.size["width"])]


def _tiles_of(images: Any, height: int, width: int) -> tuple[int, int]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
        get_optimal_tiled_canvas,
    )

    if not images.crop_to_patches:
        return 1, 1
    tile = images.size["height"], images.size["width"]
    columns, rows = get_optimal_tiled_canvas(
        (height, width), tile, images.min_patches, images.max_patches
    )
    return rows, columns


def _tiled(images: Any, pixels: Tensor) -> Tensor:
    """Cut tiles, and put the whole picture behind them in the size of one, in 8 bits as well."""
    tile = images.size["height"], images.size["width"]
    n, channels, height, width = pixels.shape
    rows, columns = height // tile[0], width // tile[1]
    if rows * columns == 1:
        return pixels
    cut = pixels.reshape(n, channels, rows, tile[0], columns, tile[1])
    tiles = cut.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, channels, *tile)
    small = pixels
    for size in ((height, tile[1]), tile):  # both back ends go by way of an 8-bit picture
        small = _in_bytes(interpolate(small, size, mode="bicubic", antialias=True))
    return torch.cat([tiles, small[:, None]], dim=1).flatten(0, 1)


def _in_bytes(pixels: Tensor) -> Tensor:
    """Clamp to [0, 1], which bicubic weights overshoot, and round as if nothing were rounded."""
    pixels = pixels.clamp(0, 1)
    return pixels + ((pixels * 255).round() / 255 - pixels).detach()


LAYOUTS = {
    "CLIPImageProcessor": Layout(_square_sizes, _plain),
    "SiglipImageProcessor": Layout(_square_sizes, _plain),
    "Qwen2VLImageProcessor": Layout(_flat_sizes, _flat),
    "GotOcr2ImageProcessor": Layout(_tile_sizes, _plain, _tiled, resamples=True),
}
"""By the class of the image processor, of either back end."""
