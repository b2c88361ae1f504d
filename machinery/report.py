"""The page of doctor.py: one HTML file that a browser opens without a network.

report.html holds the page itself. Its content is data inside the file: numbers, texts and small
pictures, which its script draws.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from action_tokenizer import ActionTokenizer, normalize
from machinery.config import PROJECT
from machinery.files import atomic
from machinery.frames import FrameTable
from machinery.images import decode_native
from machinery.survey_numbers import bounds

PICTURE_BYTES = 6 << 20  # of all pictures, before base64 adds a third
PICTURES = 80  # per episode and camera, at even distances
POINTS = 300  # of a curve
SIDE = 200  # pixels of a picture's longer side
ROWS = 200_000  # frames in a histogram
COLUMNS = 100  # of it


def write_page(path: Path, facts: dict) -> None:
    """facts: see `page_facts`. Text in them cannot end the script: every < is escaped."""
    template = (PROJECT / "machinery/report.html").read_text()
    data = json.dumps(facts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    with atomic(path) as scratch:
        scratch.write_text(template.replace("{{facts}}", data))


def page_facts(table: FrameTable, name: str, kind: str, labels: tuple[list[str], list[str]],
               findings: Sequence, lists: list[dict], shown: dict[int, str]) -> dict:
    """The content of a dataset's page.

    kind: of normalization; labels: of the actions' and states' dimensions; findings: of the survey;
    lists: tables below them, {title, note, columns, rows: [{cells, episode}]}; shown: {episode: why
    it can be played}
    """
    episodes = [episode_facts(table, number, why) for number, why in shown.items()]
    thin_out(episodes)
    dims = dimensions(table, "action", labels[0], kind)
    if "proprio" in table.frames.dtype.names:
        dims += dimensions(table, "state", labels[1], kind)
    cards = []
    for finding in findings:
        episode = next((number for number in finding.episodes if number in shown),
                       next(iter(shown), None))
        cards.append({"severity": finding.severity, "text": finding.text, "cure": finding.cure,
                      "of": finding.of, "dims": list(map(int, finding.dims)), "episode": episode})
    count = table.episodes["count"]
    tiles = [[f"episodes in {split}", str((table.episodes["split"] == number).sum())]
             for number, split in enumerate(table.splits)]
    tiles += [["frames", f"{len(table.frames):,}"],
              ["frames per episode", f"{count.min()} to {count.max()}"],
              ["instructions", str(len(table.instructions))],
              ["cameras", ", ".join(filter(None, table.cameras)) or "none"]]
    return {"name": name, "subtitle": str(table.directory), "tiles": tiles, "fps_shown": 10,
            "findings": cards, "lists": lists, "episodes": episodes, "dims": dims,
            "dims_note": "All values. Shaded: the range that the 256 bins divide. Dashed: the 1% "
                         "and 99% quantiles. The strip below: how often each bin is used."}


def write_causes(path: Path, name: str, examined: str, causes: Sequence) -> None:
    """The page of a policy: causes (causes.Cause), each beside its pictures."""
    cards = []
    for cause in causes:
        images = [[title, jpeg(Image.fromarray(image))] for title, image in cause.pictures]
        cards.append({"severity": "high" if cause.evidence > 0.5 else "medium", "text": cause.text,
                      "cure": cause.cure, "of": "", "dims": [], "episode": None, "images": images})
    write_page(path, {"name": name, "subtitle": f"examined: {examined}", "findings": cards,
                      "tiles": [["causes found", str(len(cards))]], "lists": [], "episodes": [],
                      "dims": []})


# ---- Dimensions ----------------------------------------------------------------------------------


def dimensions(table: FrameTable, of: str, labels: list[str], kind: str) -> list[dict]:
    """The histogram of each dimension of the actions or states, and the range that is divided into
    bins."""
    key = "action" if of == "action" else "proprio"
    stats = table.statistics[key]
    values = np.asarray(table.frames[key][:: len(table.frames) // ROWS + 1])  # (N, D)
    width = values.shape[1]
    mask = np.array(stats.get("mask", [True] * width))
    low, high = bounds(stats, kind)
    low = np.where(mask, low, -1)
    high = np.where(mask, high, 1)
    tokenizer = ActionTokenizer(512)
    bins = tokenizer.bin_index(tokenizer.encode(normalize(values, stats, kind)))
    found = []
    for d in range(width):
        label = labels[d] if d < len(labels) else of
        counts, _ = np.histogram(values[:, d], COLUMNS, (stats["min"][d], stats["max"][d] + 1e-12))
        label = label if "[" in label else f"{d} {label}"
        entry = {"of": of, "index": d, "label": label, "counts": counts.tolist(),
                 "low": rounded(low[d]), "high": rounded(high[d]), "bins": None, "used": None}
        entry |= {bound: rounded(stats[bound][d]) for bound in ("min", "max", "q01", "q99")}
        if of == "action":
            used = np.bincount(bins[:, d].astype(int).clip(0, 255), minlength=256)
            entry |= {"bins": used.tolist(), "used": int(bins_of_most(used))}
        found.append(entry)
    return found


def bins_of_most(used: np.ndarray) -> int:
    """How many bins hold 90% of all values, the fullest first: used (256,) counts."""
    share = np.cumsum(np.sort(used)[::-1]) / max(used.sum(), 1)
    return np.searchsorted(share, 0.9) + 1


def rounded(value: float) -> float:
    """To four digits, for a short page."""
    return float(f"{float(value):.4g}")


# ---- Episodes ------------------------------------------------------------------------------------


def episode_facts(table: FrameTable, number: int, why: str) -> dict:
    """Pictures and curves of one episode."""
    episode = table.episodes[number]
    first, count = int(episode["first"]), int(episode["count"])
    rows = np.unique(np.linspace(0, count - 1, POINTS).astype(int))
    curves = {"action": table.frames["action"][first + rows], "state": np.zeros((len(rows), 0))}
    if "proprio" in table.frames.dtype.names:
        curves["state"] = table.frames["proprio"][first + rows]
    pictures = {}
    for camera, key in enumerate(table.cameras):
        if key:
            frames = np.unique(np.linspace(0, count - 1, PICTURES).astype(int)).tolist()
            pictures[key] = [[frame, thumbnail(table, first + frame, camera)] for frame in frames]
    where = f"{table.splits[episode['split']]}, record {episode['record']} of "
    facts = {"number": int(number), "count": count, "why": why, "rows": rows.tolist(),
             "text": table.instructions[table.frames["instruction"][first]],
             "where": where + table.shards[episode["shard"]], "pictures": pictures}
    for of, values in curves.items():
        facts[of] = [[rounded(value) for value in row] for row in values]
    return facts


def thumbnail(table: FrameTable, row: int, camera: int) -> str:
    """A small JPEG in base64; "" if the picture cannot be read."""
    try:
        image = Image.fromarray(decode_native(table.read_image(row, camera)))
    except (ValueError, OSError):
        return ""
    return jpeg(image)


def jpeg(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "jpeg", quality=70)
    return base64.b64encode(encoded.getvalue()).decode()


def thin_out(episodes: list[dict]) -> None:
    """Remove pictures at even distances until the rest fits PICTURE_BYTES."""
    every = [pictures for episode in episodes for pictures in episode["pictures"].values()]
    size = sum(len(data) for pictures in every for _, data in pictures) * 3 / 4
    step = int(np.ceil(size / PICTURE_BYTES))
    if step > 1:
        for pictures in every:
            pictures[:] = pictures[::step]
