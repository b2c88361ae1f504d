"""Images: decode, resize, crop and augment them as OpenVLA does with TensorFlow."""

import io

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError


def decode_image(data: bytes, size: int) -> np.ndarray:
    """JPEG or PNG bytes -> (size, size, 3) uint8. No bytes give a black image."""
    return resize_image(decode_native(data), size) if data else np.zeros((size, size, 3), np.uint8)


def decode_native(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> (H, W, 3) uint8.

    JPEGs are decoded with the fast DCT and plain upsampling, as TensorFlow's decode_image does; the accurate
    ones differ from it on two thirds of all values.
    """
    if data.startswith(b"\xff\xd8"):  # whatever comes after its end, which simplejpeg.is_jpeg minds
        return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=False)
    try:
        image = Image.open(io.BytesIO(data))
        if image.mode == "I;16":  # depth, for example: its upper eight bits, as TensorFlow
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        return np.array(image.convert("RGB"))
    except (UnidentifiedImageError, SyntaxError):  # which tells where in memory it lies; of a broken PNG
        raise ValueError(f"no JPEG or PNG that can be read: it begins with {data[:8]!r}") from None


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) by Lanczos, whatever its aspect ratio: OpenVLA's training data."""
    if image.shape[:2] == (size, size):
        return image
    try:
        x = torch.from_numpy(image).permute(2, 0, 1)[None]
        x = F.interpolate(x, (size, size), mode="lanczos", antialias=True)
        return x[0].permute(1, 2, 0).numpy()
    except (ValueError, NotImplementedError):  # before PyTorch 2.15; Pillow: within 1, four times as slow
        return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


CROP_SIDE = 0.9**0.5  # the crop keeps 90 % of the area


def crop(image: np.ndarray, top: float, left: float, size: int) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, size, size) float32 in 0..1: the part that begins at (top, left), given as
    fractions of the sides, and is CROP_SIDE of them long; bilinear, as tf.image.crop_and_resize."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    y_grid, x_grid = (torch.linspace(-1, 1, size) * CROP_SIDE + (2 * offset + CROP_SIDE - 1)
                      for offset in (top, left))
    grid = torch.stack(torch.broadcast_tensors(x_grid, y_grid[:, None]))  # (2, size, size)
    return F.grid_sample(x, grid.permute(1, 2, 0)[None], align_corners=True)[0].mul_(1 / 255)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3): what a model trained on random crops is shown when it acts."""
    x = crop(image, (1 - CROP_SIDE) / 2, (1 - CROP_SIDE) / 2, size).clamp_(0, 1)
    return x.mul_(255.5).clamp_(max=255).byte().permute(1, 2, 0).numpy()


def draw_augmentation(uniform: np.ndarray) -> dict[str, float]:
    """Parameters for `augment` in OpenVLA's ranges, from six numbers in 0..1. OpenVLA's crops always lie on
    the image's diagonal, because it draws both offsets with one seed; ours are independent."""
    ranges = {"top": (0, 1 - CROP_SIDE), "left": (0, 1 - CROP_SIDE), "brightness": (-0.2, 0.2),
              "contrast": (0.8, 1.2), "saturation": (0.8, 1.2), "hue": (-0.05, 0.05)}
    return {name: low + u * (high - low)
            for (name, (low, high)), u in zip(ranges.items(), uniform.tolist(), strict=True)}


def augment(image: np.ndarray, top: float, left: float, brightness: float, contrast: float, saturation: float,
            hue: float) -> np.ndarray:
    """(S, S, 3) uint8 -> the same: crop at (top, left) and resize back, then brightness, contrast,
    saturation, hue, as OpenVLA does with TensorFlow (dlimp's augment_image); hue as a fraction of the
    circle."""
    x = crop(image, top, left, len(image)).add_(brightness).clamp_(0, 1)  # (3, S, S)
    mean = x.mean((1, 2), keepdim=True)
    x = x.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1).numpy()

    # to hue, value and chroma (= saturation x value), by sorting instead of branching, and back
    r, g, b = x
    high, low = np.maximum(g, b), np.minimum(g, b)
    value, other = np.maximum(r, high), np.minimum(r, high)
    chroma = value - np.minimum(other, low)
    swapped, below = (g < b).view(np.int8), (r < high).view(np.int8)
    sextant = below * (12 * swapped - 2) - 6 * swapped  # which part of the colour circle this order means
    h = np.abs((other - low) / np.maximum(chroma, np.float32(1e-9)) + sextant) + np.float32(6 * hue)
    h -= np.float32(6) * np.floor(h * np.float32(1 / 6))
    chroma = np.minimum(chroma * np.float32(saturation), value)
    x = 2 - np.abs(h - np.array([3, 2, 4], np.float32)[:, None, None])
    x[0] = 1 - x[0]
    x = x.clip(0, 1, out=x) * chroma + (value - chroma)
    return np.minimum(x * 255.5, 255).astype(np.uint8).transpose(1, 2, 0)


def contact_sheet(tiles: list[tuple[np.ndarray, str]], columns: int = 4) -> Image.Image:
    """Images (H, W, 3) uint8, each with a caption of a few lines below it, as one picture."""
    height, width = max(t.shape[0] for t, _ in tiles), max(max(t.shape[1] for t, _ in tiles), 240)
    cell = height + 14 * max(caption.count("\n") + 1 for _, caption in tiles) + 8
    sheet = Image.new("RGB", (width * min(columns, len(tiles)), cell * -(-len(tiles) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (tile, caption) in enumerate(tiles):
        x, y = i % columns * width, i // columns * cell
        sheet.paste(Image.fromarray(tile), (x, y))
        pen.multiline_text((x + 2, y + height + 2), caption, fill="black")
    return sheet
