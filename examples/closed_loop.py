"""Shared by the examples' closed loops: count successes, compute intervals, and draw them."""

import contextlib
import io
import json
import math
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageSequence

from machinery.config import UserError

SIDE = 240  # side of a film's image in pixels
LOOK = 80  # milliseconds of film for each look at the scene


def open_folder(path: Path, conditions: dict) -> None:
    """Make a folder of results, or continue with it if the conditions are the same. Raises
    UserError if they are not."""
    path.mkdir(parents=True, exist_ok=True)
    known = path / "conditions.json"
    if known.exists() and json.loads(known.read_text()) != conditions:
        raise UserError(f"{path} holds results of other conditions, {known.read_text()}: choose "
                        "another --out, or remove it")
    known.write_text(json.dumps(conditions))


def versions(packages: Sequence[str]) -> str:
    """"mujoco 3.3.0 ...", those that are installed. Another version is another simulator: the same policy
    succeeds more or less often in it."""
    found = []
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return " ".join(found)


def compare_versions(simulator: str, recording: dict) -> None:
    """Print a line if the demonstrations are from other versions. recording: a dataset's recording.json."""
    recorded = recording.get("simulator", simulator)
    if recorded != simulator:
        print(f"warning: this simulator is {simulator}, but the demonstrations were recorded with {recorded}: "
              "the policy may succeed less often for this reason")


def wilson(successes: int, trials: int) -> list[float]:
    """The 95% interval of a success rate (Wilson, 1927)."""
    z, p = 1.96, successes / trials
    center, half = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return [round(min(1.0, max(0.0, (center + sign * half) / (1 + z * z / trials))), 4) for sign in (-1, 1)]


def rate(outcomes: list[bool]) -> dict:
    """Whether each episode succeeded -> {successes, trials, rate, interval}."""
    successes, trials = sum(outcomes), len(outcomes)
    return {"successes": successes, "trials": trials, "rate": successes / trials,
            "interval": wilson(successes, trials)}


def row(name: str, entry: dict, width: int = 32) -> str:
    """A table row: a rate's name, the rate, its interval, the counts."""
    low, high = entry["interval"]
    counts = f"{entry['successes']}/{entry['trials']}"
    return f"{name:{width}s} {entry['rate']:6.1%}  [{low:.1%}, {high:.1%}]  {counts}"


def draw_chart(title: str, bars: list[tuple[str, dict, str]], path: Path, left: int = 220) -> None:
    """Draw rates with their intervals. bars: (name, rate, color); left: pixels for the names."""
    font, line, width = ImageFont.load_default(12), 16, 400
    chart = Image.new("RGB", (left + width + 70, line * (len(bars) + 2)), "white")
    pen = ImageDraw.Draw(chart)
    pen.text((8, 2), title, "black", font)
    for i, (name, entry, color) in enumerate(bars):
        y = line * (i + 1) + 4
        low, high = (left + int(width * edge) for edge in entry["interval"])
        pen.text((8, y), name, "black", font)
        pen.rectangle((left, y + 2, left + int(width * entry["rate"]), y + 12), color)
        pen.line((low, y + 7, high, y + 7), "black")
        pen.text((left + width + 8, y), f"{entry['rate']:.0%}", "black", font)
    chart.save(path)


def encode_film(pictures: list[Image.Image], last: int = LOOK, pace: int = 1, quality: int = 90) -> bytes:
    """Images -> an animated WebP that shows each image for `pace` looks, and the last for `last`
    ms."""
    encoded, durations = io.BytesIO(), [LOOK * pace] * (len(pictures) - 1) + [last]
    pictures[0].save(encoded, "webp", save_all=True, append_images=pictures[1:], duration=durations, loop=0,
                     quality=quality, minimize_size=True)
    return encoded.getvalue()


def read_film(path: Path, side: int) -> list[Image.Image]:
    """A trial's film -> an image for each look. (WebP stores repeated images only once.)"""
    return [picture for frame in ImageSequence.Iterator(Image.open(path))
            for picture in [frame.convert("RGB").resize((side, side))] * (frame.info["duration"] // LOOK)]


def draw_films(films: list[tuple[str, Path, bool]], out: Path, length: int = 80) -> None:
    """Films side by side, as an animation: a green frame after success, a red one at the end of a
    failure. Failures are long, and are cut at one and a half times the longest success.

    films: (instruction, output of encode_film, success).
    """
    few = len(films) <= 12
    columns, side = (min(3, len(films)), SIDE) if few else (10, 96)
    films = [(textwrap.wrap(words, 34) if few else [], read_film(path, side), success)
             for words, path, success in films]
    # height above each image
    line = max(17 * len(words) + 7 for words, _, _ in films) if few else 0
    longest = max(len(film) for _, film, _ in films)
    solved = max((len(film) for _, film, success in films if success), default=longest)
    shown = min(longest, 3 * solved // 2)
    pace, font, sheets = -(-shown // length), ImageFont.load_default(14), []
    for moment in [*range(0, shown, pace), longest - 1]:
        sheet = Image.new("RGB", (side * columns, (side + line) * -(-len(films) // columns)), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (words, film, success) in enumerate(films):
            x, y = i % columns * side, i // columns * (side + line)
            sheet.paste(film[min(moment, len(film) - 1)], (x, y + line))
            pen.multiline_text((x + 4, y + 2), "\n".join(words), "black", font)
            if moment >= len(film) - 1:
                color = "#00c000" if success else "#e00000"
                pen.rectangle((x, y + line, x + side - 1, y + line + side - 1), outline=color, width=4)
        sheets.append(sheet)
    (out / "rollouts.webp").write_bytes(encode_film(sheets, last=2000, pace=pace, quality=60))
    sheets[-1].save(out / "rollouts_end.png")
