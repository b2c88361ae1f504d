"""A camera's picture as policies expect it when they act.

Read fit: the ways of OpenVLA's image processors. The rest is OpenVLA-OFT's way, computed like
TensorFlow: it writes the picture as a JPEG and reads it again, as its training data were. Then come
Lanczos to 224 pixels and the middle 90% of the area. These policies are read to 5e-5, so a pixel
that is off by one shows: sums are float32, in TensorFlow's order.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from machinery.images import decode_native, encode, resize_image

SIDE = 224  # pixels of OpenVLA-OFT, whatever the model's own image_size


def fit(image: np.ndarray, size: int, strategy: str, fill: Sequence[int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) by image_resize_strategy.

    "lanczos" is the resize of training data. The others are bicubic and OpenVLA's processors use
    them for acting: "resize-naive", "resize-crop" (cut off the longer side) and "letterbox" (pad
    with the color `fill`).
    """
    if strategy == "lanczos" or image.shape[:2] == (size, size):
        return resize_image(image, size)
    image = Image.fromarray(image)
    width, height = image.size
    if strategy == "letterbox":
        longest = max(width, height)
        left, top = (longest - width) // 2, (longest - height) // 2
        image = ImageOps.expand(image, (left, top), tuple(fill))
        width, height = image.size  # one pixel off square if the difference was odd
    shape = (size, size)
    if strategy != "resize-naive":  # the shorter side becomes `size`
        shape = (size * width // min(width, height), size * height // min(width, height))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.array(image.crop((left, top, left + size, top + size)))


# ---- OpenVLA-OFT ---------------------------------------------------------------------------------


def prepare_oft(image: np.ndarray, size: int, crop: bool) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8."""
    if image.shape[:2] != (SIDE, SIDE):
        image = decode_native(encode(image, "jpeg", quality=95, subsampling=2))
        x = stretch(stretch(torch.from_numpy(image).float()).transpose(0, 1)).transpose(0, 1)
        image = x.round().clamp_(0, 255).byte().numpy()
    if crop:
        image = middle(image)
    if size != SIDE:  # the model's processor
        image = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return image


def stretch(x: torch.Tensor) -> torch.Tensor:
    """(n, W, 3) float32 -> (SIDE, W, 3) by Lanczos with three lobes."""
    places, weights = taps(len(x))
    x = x.flatten(1)
    result = torch.zeros(SIDE, x.shape[1])
    for place, weight in zip(places, weights, strict=True):
        result += x[place].mul_(weight[:, None])  # addcmul would round once, not twice
    return result.unflatten(1, (-1, 3))


@functools.lru_cache(maxsize=16)
def taps(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are summed for each of SIDE rows, out of n, and their weights: (taps, SIDE)."""
    f = np.float32
    step = f(1) / (f(SIDE) / f(n))  # from one output pixel to the next
    wide = max(step, f(1))
    center = (np.arange(SIDE, dtype=f) + f(0.5)) * step
    first = np.maximum(np.ceil(center - f(3) * wide - f(0.5)), 0).astype(int)
    last = np.minimum(np.floor(center + f(3) * wide - f(0.5)), n - 1).astype(int)
    source = first[:, None] + np.arange((last - first).max() + 1)  # (SIDE, taps)
    distance = np.abs((source.astype(f) + f(0.5) - center[:, None]) * (f(1) / wide))
    d = np.maximum(distance, f(1e-3))
    weights = f(3) * sine(f(np.pi) * d) * sine(f(np.pi) * d / f(3)) / (f(np.pi) * f(np.pi) * d * d)
    weights[distance <= 1e-3] = 1
    weights[(distance > 3) | (source > last[:, None])] = 0
    weights = weights.T * (f(1) / sum(weights.T))
    return torch.from_numpy(np.minimum(source, n - 1).T), torch.from_numpy(weights)


def sine(x: np.ndarray) -> np.ndarray:
    """Rounded as C's; NumPy's of float32 is less exact."""
    return np.sin(x.astype(np.float64)).astype(np.float32)


def middle(image: np.ndarray) -> np.ndarray:
    """The middle 90% of the area, stretched to the same size with bilinear interpolation."""
    f = np.float32
    edge = f(len(image) - 1)
    side = np.sqrt(f(0.9))
    top = (f(1) - side) / f(2)
    at = top * edge + np.arange(len(image), dtype=f) * ((top + side - top) * edge / edge)
    low = np.floor(at)
    high, part = (torch.from_numpy(values) for values in (np.ceil(at).astype(int), at - low))
    low = torch.from_numpy(low.astype(int))
    x = torch.from_numpy(image).transpose(0, 1).float() * f(1 / 255)
    for _ in range(2):  # the columns, then the rows
        x = x.flatten(1)
        x = x[low] + (x[high] - x[low]).mul_(part[:, None])
        x = x.unflatten(1, (-1, 3)).transpose(0, 1)
    return x.transpose(0, 1).clamp(0, 1).mul_(255.5).clamp_(max=255).byte().numpy()
