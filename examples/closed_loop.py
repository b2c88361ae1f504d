"""What the closed loops of the examples share: counting successes, with intervals, and showing them."""

import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from config import UserError

TILE = 96  # pixels, the side of a film's picture


def open_folder(path: Path, conditions: dict) -> None:
    """Make a folder of results, or go on with it if they were made under the same conditions. Raises
    UserError if not."""
    path.mkdir(parents=True, exist_ok=True)
    known = path / "conditions.json"
    if known.exists() and json.loads(known.read_text()) != conditions:
        raise UserError(f"{path} holds results made under other conditions, {known.read_text()}: choose "
                        "another --out, or remove it")
    known.write_text(json.dumps(conditions))


def wilson(successes: int, trials: int) -> list[float]:
    """The 95 % interval of a success rate (Wilson, 1927)."""
    z, p = 1.96, successes / trials
    centre, half = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return [round(min(1.0, max(0.0, (centre + sign * half) / (1 + z * z / trials))), 4) for sign in (-1, 1)]


def rate(outcomes: list[bool]) -> dict:
    """Did each episode succeed? -> {successes, trials, rate, interval}."""
    successes, trials = sum(outcomes), len(outcomes)
    return {"successes": successes, "trials": trials, "rate": successes / trials,
            "interval": wilson(successes, trials)}


def row(name: str, entry: dict, width: int = 32) -> str:
    """A line of a table: a rate's name, the rate, its interval, the counts."""
    low, high = entry["interval"]
    counts = f"{entry['successes']}/{entry['trials']}"
    return f"{name:{width}s} {entry['rate']:6.1%}  [{low:.1%}, {high:.1%}]  {counts}"


def draw_chart(title: str, bars: list[tuple[str, dict, str]], path: Path, left: int = 220) -> None:
    """Rates with their intervals as a picture. bars: (name, rate, colour); left: pixels for the names."""
    font, line, width = ImageFont.load_default(12), 16, 400
    chart = Image.new("RGB", (left + width + 70, line * (len(bars) + 2)), "white")
    pen = ImageDraw.Draw(chart)
    pen.text((8, 2), title, "black", font)
    for i, (name, entry, colour) in enumerate(bars):
        y = line * (i + 1) + 4
        low, high = (left + int(width * edge) for edge in entry["interval"])
        pen.text((8, y), name, "black", font)
        pen.rectangle((left, y + 2, left + int(width * entry["rate"]), y + 12), colour)
        pen.line((low, y + 7, high, y + 7), "black")
        pen.text((left + width + 8, y), f"{entry['rate']:.0%}", "black", font)
    chart.save(path)


def write_film(frames: list[bytes], path: Path) -> None:
    """JPEGs -> one picture with all of them in a row."""
    strip = Image.new("RGB", (TILE * len(frames), TILE))
    for i, frame in enumerate(frames):
        strip.paste(Image.open(io.BytesIO(frame)).resize((TILE, TILE)), (TILE * i, 0))
    strip.save(path, quality=90)


def draw_films(films: list[tuple[Path, bool]], out: Path, columns: int = 10, length: int = 40) -> None:
    """Films side by side, as an animation: a green border once the episode has succeeded, a red one once its
    time is up. films: (what write_film has written, did it succeed?)."""
    films = [(Image.open(path), success) for path, success in films]
    columns = min(columns, len(films))
    longest = max(film.width // TILE for film, _ in films)
    sheets = []
    moments = np.linspace(0, longest - 1, min(length, longest)).round().astype(int)
    for moment in [*moments.tolist(), *[longest] * 8]:  # the end stays for a second
        sheet = Image.new("RGB", (TILE * columns, TILE * -(-len(films) // columns)), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (film, success) in enumerate(films):
            x, y, last = i % columns * TILE, i // columns * TILE, film.width // TILE - 1
            at = TILE * min(moment, last)
            sheet.paste(film.crop((at, 0, at + TILE, TILE)), (x, y))
            if moment >= last:
                colour = "#00c000" if success else "#e00000"
                pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=colour, width=3)
        sheets.append(sheet)
    sheets[0].save(out / "rollouts.gif", save_all=True, append_images=sheets[1:], duration=120, loop=0)
    sheets[-1].save(out / "rollouts_end.png")
