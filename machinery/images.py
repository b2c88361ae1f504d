"""Images: decode, resize, crop and augment them as OpenVLA does with TensorFlow.

PyTorch is imported where it is used: programs that only decode start without it, seconds earlier.
"""

import io
import textwrap

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError


def decode_image(data: bytes, size: int) -> np.ndarray:
    """JPEG or PNG bytes -> (size, size, 3) uint8. b"" gives a black image."""
    if not data:
        return np.zeros((size, size, 3), np.uint8)
    return resize_image(decode_native(data), size)


def decode_native(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> (H, W, 3) uint8. Raises ValueError or OSError.

    JPEGs are decoded with the fast DCT and plain upsampling, as in TensorFlow's decode_image. The
    accurate ones differ from it in two thirds of all values.
    """
    if data.startswith(b"\xff\xd8"):  # simplejpeg.is_jpeg would also look at the last bytes
        return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=False)
    try:
        image = Image.open(io.BytesIO(data))
        if image.mode == "I;16":  # e.g. depth: its upper eight bits, as in TensorFlow
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        return np.array(image.convert("RGB"))
    except (UnidentifiedImageError, SyntaxError):  # SyntaxError: a damaged PNG
        raise ValueError(f"not a readable JPEG or PNG: it begins with {data[:8]!r}") from None


def encode(image: np.ndarray, form: str, **options) -> bytes:
    """(H, W, 3) or (H, W) -> a JPEG or PNG file. options: Pillow's."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, form, **options)
    return file.getvalue()


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) by Lanczos, at any aspect ratio: OpenVLA's training data.
    """
    if image.shape[:2] == (size, size):
        return image
    import torch
    import torch.nn.functional as F

    try:
        x = torch.from_numpy(image).permute(2, 0, 1)[None]
        x = F.interpolate(x, (size, size), mode="lanczos", antialias=True)
        return x[0].permute(1, 2, 0).numpy()
    except (ValueError, NotImplementedError):  # an older PyTorch: Pillow differs by at most 1
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
        return np.array(resized)


# ---- Crops and colors ----------------------------------------------------------------------------

CROP_SIDE = 0.9**0.5  # crops keep 90% of the area


def crop(image: np.ndarray, top: float, left: float, size: int):
    """(H, W, 3) uint8 -> (3, size, size) float32 tensor in 0..1: the part from (top, left) on, of
    length CROP_SIDE, all as fractions of the sides. Bilinear, as tf.image.crop_and_resize."""
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    from_center = torch.linspace(-1, 1, size) * CROP_SIDE  # the image is -1..1
    x_grid = from_center + (2 * left + CROP_SIDE - 1)
    y_grid = from_center + (2 * top + CROP_SIDE - 1)
    grid = torch.stack(torch.broadcast_tensors(x_grid, y_grid[:, None]))  # (2, size, size)
    return F.grid_sample(x, grid.permute(1, 2, 0)[None], align_corners=True)[0].mul_(1 / 255)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3): for a model trained on random crops, when it acts."""
    x = crop(image, (1 - CROP_SIDE) / 2, (1 - CROP_SIDE) / 2, size).clamp_(0, 1)
    return x.mul_(255.5).clamp_(max=255).byte().permute(1, 2, 0).numpy()


AUGMENTATION = {  # OpenVLA's ranges
    "top": (0, 1 - CROP_SIDE),
    "left": (0, 1 - CROP_SIDE),
    "brightness": (-0.2, 0.2),
    "contrast": (0.8, 1.2),
    "saturation": (0.8, 1.2),
    "hue": (-0.05, 0.05),
}


def draw_augmentation(uniform: np.ndarray) -> dict[str, float]:
    """Arguments for `augment` from six numbers in 0..1. OpenVLA draws both offsets with one seed,
    so that its crops are always on the image's diagonal. Ours are independent."""
    drawn = {}
    for (name, (low, high)), u in zip(AUGMENTATION.items(), uniform.tolist(), strict=True):
        drawn[name] = low + u * (high - low)
    return drawn


def augment(image: np.ndarray, top: float, left: float, brightness: float, contrast: float,
            saturation: float, hue: float) -> np.ndarray:
    """(S, S, 3) uint8 -> the same: crop at (top, left) and resize back, then change brightness,
    contrast, saturation and hue (as a fraction of the circle), as OpenVLA does with TensorFlow
    (dlimp's augment_image)."""
    x = crop(image, top, left, len(image)).add_(brightness).clamp_(0, 1)  # (3, S, S)
    mean = x.mean((1, 2), keepdim=True)
    x = x.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1).numpy()

    # to hue, value and chroma (= saturation x value), by sorting the colors instead of branching
    r, g, b = x
    high = np.maximum(g, b)
    low = np.minimum(g, b)
    value = np.maximum(r, high)
    middle = np.minimum(r, high)  # or the smallest, if r is: then low is the middle one
    chroma = value - np.minimum(middle, low)
    swapped = (g < b).view(np.int8)
    below = (r < high).view(np.int8)
    sextant = below * (12 * swapped - 2) - 6 * swapped  # part of the color circle, by their order
    h = np.abs((middle - low) / np.maximum(chroma, np.float32(1e-9)) + sextant)
    h += np.float32(6 * hue)
    h -= np.float32(6) * np.floor(h * np.float32(1 / 6))
    chroma = np.minimum(chroma * np.float32(saturation), value)
    # and back
    x = 2 - np.abs(h - np.array([3, 2, 4], np.float32)[:, None, None])
    x[0] = 1 - x[0]
    x = x.clip(0, 1, out=x) * chroma + (value - chroma)
    return np.minimum(x * 255.5, 255).astype(np.uint8).transpose(1, 2, 0)


def contact_sheet(tiles: list[tuple[list[np.ndarray], str]], columns: int = 4) -> Image.Image:
    """Samples in one picture: their images (S, S, 3) uint8 side by side above a caption."""
    side = len(tiles[0][0][0])
    width = max(240, len(tiles[0][0]) * (side + 4)) + 8
    captions = ["\n".join(textwrap.fill(line, width // 7) for line in caption.splitlines())
                for _, caption in tiles]
    height = side + 16 * max(caption.count("\n") for caption in captions) + 30
    sheet = Image.new("RGB", (width * columns, height * -(-len(tiles) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(13)  # at 10, 11 and 14, its spaces almost vanish
    for i, (views, _) in enumerate(tiles):
        x = i % columns * width
        y = i // columns * height
        pen.multiline_text((x + 2, y + side + 2), captions[i], "black", spacing=2)
        for j, view in enumerate(views):
            sheet.paste(Image.fromarray(view), (x + j * (side + 4), y))
    return sheet
