"""Curves as a PNG, drawn with Pillow: episodes for eval_vla.py, and the numbers of a training.

    python -m machinery.plots runs/demo+n1+b32+x7    draws its curves.png, as its training did
"""

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from machinery.files import read_metrics

COLORS = ("#444444", "darkorange", "#2a7fc0")
WIDTH, HEIGHT = 480, 150  # pixels of a panel
LEFT, TOP = 76, 56  # margins
KEYS = "loss accuracy l1 learning_rate grad_norm samples_per_second".split()
SERIES = {"training": "{}", "held-out": "eval/{}",
          "most frequent bin": "eval/{}_of_most_frequent_bin"}


def draw_curves(columns: list[tuple[str, str, list[str], dict]], path: Path) -> None:
    """Columns of panels: (heading, what x is, names, {label: (x (R,), y (R, names))}) each. NaN and
    infinity are left out."""
    height = TOP + HEIGHT * max(len(names) for _, _, names, _ in columns)
    sheet = Image.new("RGB", (WIDTH * len(columns), height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(13)  # at 11 and 14, its spaces almost vanish
    for i, (heading, unit, names, curves) in enumerate(columns):
        left = i * WIDTH + LEFT
        pen.multiline_text((left, 10), heading, "black")
        for j, name in enumerate(names):
            top = TOP + j * HEIGHT
            pen.text((left, top), name, "black")
            draw_panel(pen, left, top, unit, {label: np.stack([x, y[:, j]], 1)[np.isfinite(y[:, j])]
                                              for label, (x, y) in curves.items()})
    sheet.save(path)


def draw_panel(pen: ImageDraw.ImageDraw, left: int, top: int, unit: str, curves: dict) -> None:
    """Curves {label: points (R, 2)}, with three numbers of each axis."""
    bottom = top + HEIGHT - 28
    size = np.array([WIDTH - LEFT - 20, 52 - HEIGHT])  # to the right and up
    points = np.concatenate([*curves.values()])
    low = points.min(0)
    span = np.maximum(np.ptp(points, 0), 1e-6)
    for share in (0, 0.5, 1):
        x, y = (left, bottom) + share * size
        first, second = low + share * span
        pen.line((left, y, left + size[0], y), "#dddddd")
        pen.text((left - 6, y), f"{second:.3g}", "gray", anchor="rm")
        pen.text((x, bottom + 4), f"{first:.4g}{unit * (share == 0.5)}", "gray", anchor="ma")
    for i, (label, points) in enumerate(curves.items()):
        pixels = (left, bottom) + (points - low) / span * size
        pen.line(pixels.ravel().tolist(), COLORS[i], 2)
        for point in pixels.tolist():
            pen.circle(point, 1.5, COLORS[i])
        if len(points):
            pen.text((left + 150 + 80 * i, top), label, COLORS[i])


def draw_training(run_dir: Path) -> None:
    """curves.png, from metrics.jsonl."""
    metrics = read_metrics(run_dir)
    steps = [line["step"] for line in metrics]
    columns = []
    for heading, keys in ((run_dir.name, KEYS[:3]), ("", KEYS[3:])):
        curves = {}
        for label, form in SERIES.items():
            rows = [[line.get(form.format(key), math.nan) for key in keys] for line in metrics]
            curves[label] = steps, np.array(rows)
        columns.append((heading, " steps", keys, curves))
    draw_curves(columns, run_dir / "curves.png")


if __name__ == "__main__":
    draw_training(Path(sys.argv[1]))
