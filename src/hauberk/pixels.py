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
    arrange: Callable[[Any, Tensor, Size], dict[str, Tensor]]
    """Lays out normalised pictures, which were of some size before they were cut, as the model
    takes them."""
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
        ``pixel_values`` in the dtype and on the device of ``pixels``; with flat patches
        ``image_grid_thw``; and where a model asks for the size of every picture ``image_sizes``.

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
    return layout.arrange(images, pixels, (height, width))


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
    if layout.resamples and inputs["pixel_values"].numel() > pixels.numel():
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


def layout_of(image_processor: str) -> Layout:
    """Find how a class of image processors, by name, feeds a picture.

    Raises
    ------
    UnknownFamily
        If it has no row in :data:`LAYOUTS`: pictures for it cannot be made differentiably.
    """
    name = image_processor.removesuffix("Pil")  # two back ends, one arithmetic
    if name not in LAYOUTS:
        raise UnknownFamily(
            f"pictures for {image_processor} cannot be made differentiably; known are "
            f"{', '.join(LAYOUTS)}. Add a row to LAYOUTS in hauberk/pixels.py."
        )
    return LAYOUTS[name]


def _layout_of(processor: ProcessorMixin) -> tuple[Any, Layout]:
    images = processor.image_processor
    return images, layout_of(type(images).__name__)


# --- one square: CLIP, SigLIP and their like ----------------------------------------------------


def _padded_sizes(images: Any, height: int, width: int) -> list[Size]:
    """Fill up to a square first, where the processor does."""
    if not images.do_pad:
        return _square_sizes(images, height, width)
    side = max(height, width)
    return [(side, side), *_square_sizes(images, side, side)]


def _square_sizes(images: Any, height: int, width: int) -> list[Size]:
    size, short = images.size, min(height, width)
    resized = (size.height, size.width)
    if size.shortest_edge:
        resized = height * size.shortest_edge // short, width * size.shortest_edge // short
    if not images.do_center_crop:
        return [resized]
    return [resized, (images.crop_size["height"], images.crop_size["width"])]


def _plain(_: Any, pixels: Tensor, size: Size) -> dict[str, Tensor]:
    return {"pixel_values": pixels}


# --- pictures of their own size: Pixtral ------------------------------------------------------


def _own_sizes(images: Any, height: int, width: int) -> list[Size]:
    """Shrink to the longest edge, then fill up whole patches."""
    ratio = max(height, width) / images.size["longest_edge"]
    if ratio > 1:
        height, width = int(height / ratio), int(width / ratio)
    high, wide = images.patch_size["height"], images.patch_size["width"]
    return [(-(-height // high) * high, -(-width // wide) * wide)]


def _sized(_: Any, pixels: Tensor, size: Size) -> dict[str, Tensor]:
    sizes = torch.tensor([size], device=pixels.device).repeat(len(pixels), 1)
    return {"pixel_values": pixels, "image_sizes": sizes}


# --- a thumbnail and tiles, and the size of the whole: LLaVA-NeXT -------------------------------


def _anyres_sizes(images: Any, height: int, width: int) -> list[Size]:
    from transformers.image_processing_utils import select_best_resolution

    best: Size = tuple(select_best_resolution((height, width), images.image_grid_pinpoints))
    return [best]


def _anyres_tiles(images: Any, pixels: Tensor) -> Tensor:
    """Cut tiles behind the whole picture in the size of one: (n, 1 + tiles, 3, side, side)."""
    tile = _tile_of(images)
    rows, columns = pixels.shape[-2] // tile[0], pixels.shape[-1] // tile[1]
    return torch.cat([_thumbnail(pixels, tile)[:, None], _cut(pixels, rows, columns)], dim=1)


def _tile_of(images: Any) -> Size:
    size = images.crop_size if images.do_center_crop else images.size
    return (size["height"], size["width"])


# --- flat patches with a grid: Qwen2-VL and its successors --------------------------------------


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


def _glm_sizes(images: Any, height: int, width: int) -> list[Size]:
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

    frames = images.temporal_patch_size
    size = smart_resize(
        frames,
        height,
        width,
        temporal_factor=frames,
        factor=images.patch_size * images.merge_size,
        min_pixels=images.size["shortest_edge"],
        max_pixels=images.size["longest_edge"],
    )
    return [size]


def _flat(images: Any, pixels: Tensor, size: Size) -> dict[str, Tensor]:
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
    rows, columns = pixels.shape[-2] // tile[0], pixels.shape[-1] // tile[1]
    if rows * columns == 1:
        return pixels
    tiles = _cut(pixels, rows, columns)
    return torch.cat([tiles, _thumbnail(pixels, tile)[:, None]], dim=1).flatten(0, 1)


def _cut(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """Cut pictures, row by row: (n, rows * columns, channels, height / rows, width / columns)."""
    n, channels, height, width = pixels.shape
    cut = pixels.reshape(n, channels, rows, height // rows, columns, width // columns)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def _thumbnail(pixels: Tensor, size: Size) -> Tensor:
    """Resample as both back ends do: one side first, and by way of an 8-bit picture."""
    for step in ((pixels.shape[-2], size[1]), size):
        pixels = _in_bytes(interpolate(pixels, step, mode="bicubic", antialias=True))
    return pixels


def _in_bytes(pixels: Tensor) -> Tensor:
    """Clamp to [0, 1], which bicubic weights overshoot, and round as if nothing were rounded."""
    pixels = pixels.clamp(0, 1)
    return pixels + ((pixels * 255).round() / 255 - pixels).detach()


LAYOUTS = {
    "CLIPImageProcessor": Layout(_square_sizes, _plain),
    "SiglipImageProcessor": Layout(_square_sizes, _plain),
    "LlavaImageProcessor": Layout(_padded_sizes, _plain),
    "DeepseekVLImageProcessor": Layout(_padded_sizes, _plain),
    "Gemma3ImageProcessor": Layout(_square_sizes, _plain),
    "PixtralImageProcessor": Layout(_own_sizes, _sized),
    "LlavaNextImageProcessor": Layout(_anyres_sizes, _sized, _anyres_tiles, resamples=True),
    "LlavaOnevisionImageProcessor": Layout(_anyres_sizes, _sized, _anyres_tiles, resamples=True),
    "Qwen2VLImageProcessor": Layout(_flat_sizes, _flat),
    "Glm4vImageProcessor": Layout(_glm_sizes, _flat),
    "GotOcr2ImageProcessor": Layout(_tile_sizes, _plain, _tiled, resamples=True),
}
"""By the class of the image processor, of either back end."""
