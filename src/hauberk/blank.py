"""Pictures that mean nothing: what only the presence of an image is measured with."""

from typing import Literal, get_args

import numpy as np
from PIL import Image

BlankKind = Literal["white", "black", "mean", "uniform", "gaussian"]
BLANK_KINDS: tuple[BlankKind, ...] = get_args(BlankKind)


def blank_image(
    size: tuple[int, int],
    kind: BlankKind = "white",
    *,
    mean: tuple[int, int, int] = (128, 128, 128),
    seed: int = 0,
) -> Image.Image:
    """Make an RGB image that means nothing (CMRM section 3; its authors name blank and noise).

    Parameters
    ----------
    size : (width, height) in pixels
    kind : white, black, ``mean`` (the processor's mean colour, zeros after normalisation),
        ``uniform`` noise on 0..255, or ``gaussian`` noise about 127.5 with a deviation of 64,
        clipped to 0..255.  The authors give no deviation; 64, a quarter of the range, is our
        choice: wide, and one value in 20 clipped.
    mean : red, green and blue in 0..255, for ``mean``; see :func:`hauberk.requests.mean_color`
    seed : of the noise; the same seed and size give the same picture

    Returns
    -------
    Image
        Of mode RGB.

    Raises
    ------
    ValueError
        If the kind is not one of :data:`BLANK_KINDS`.
    """
    width, height = size
    if kind in ("white", "black", "mean"):
        color = {"white": (255, 255, 255), "black": (0, 0, 0), "mean": mean}[kind]
        return Image.new("RGB", size, color)
    generator = np.random.default_rng(seed)
    if kind == "uniform":
        noise = generator.integers(0, 256, (height, width, 3))
    elif kind == "gaussian":
        noise = generator.normal(127.5, 64.0, (height, width, 3)).round().clip(0, 255)
    else:
        raise ValueError(f"blank image {kind!r} is not one of {', '.join(BLANK_KINDS)}.")
    return Image.fromarray(noise.astype(np.uint8), "RGB")
