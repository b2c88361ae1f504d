"""The page of doctor.py: one HTML file that a browser opens without a network.

report.html is the page: it draws the facts, data inside the file, which are made here: numbers,
texts and small pictures. Read `page_facts` for a dataset's, `write_causes` for a policy's.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from machinery.config import PROJECT
from machinery.files import atomic
from machinery.frames import FrameTable
from machinery.images import decode_native, encode
from machinery.peers import evenly
from machinery.survey_numbers import Sample, signals

PICTURES = 1000  # of all episodes, at even distances: about 6 MB
POINTS = 300  # of a curve
SIDE = 200  # pixels of a picture's longer side
COLUMNS = 100  # of a histogram


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
    pictures = min(PICTURES // (len(shown) * max(len(table.cameras), 1)), 80)
    episodes = [episode_facts(table, number, why, pictures) for number, why in shown.items()]
    cards = []
    for finding in findings:
        playable = [number for number in [*finding.episodes, *shown] if number in shown]
        cards.append(finding._asdict() | {"episode": playable[0]})
    count = table.episodes["count"]
    tiles = [[f"episodes in {split}", str((table.episodes["split"] == number).sum())]
             for number, split in enumerate(table.splits)]
    tiles += [["frames", f"{len(table.frames):,}"],
              ["frames per episode", f"{count.min()} to {count.max()}"],
              ["instructions", str(len(table.instructions))],
              ["cameras", ", ".join(filter(None, table.cameras)) or "none"]]
    return {"name": name, "subtitle": str(table.directory), "tiles": tiles, "findings": cards,
            "lists": lists, "episodes": episodes, "dims": dimensions(table, labels, kind)}


def write_causes(path: Path, name: str, examined: str, causes: Sequence) -> None:
    """The page of a policy: causes (causes.Cause), each beside its pictures."""
    cards = []
    for cause in causes:
        images = [[title, jpeg(image)] for title, image in cause.pictures]
        cards.append({"severity": "high" if cause.evidence > 0.5 else "medium", "text": cause.text,
                      "cure": cause.cure, "images": images})
    write_page(path, {"name": name, "subtitle": f"examined: {examined}", "findings": cards,
                      "tiles": [["causes found", str(len(cards))]]})


def dimensions(table: FrameTable, labels: tuple[list[str], list[str]], kind: str) -> list[dict]:
    """The histogram of each dimension of the actions and states, and the range low .. high that is
    divided into bins. `bins`: how many values each bin has; `used`: how many bins hold 90%."""
    found = []
    for signal, names in zip(signals(Sample(table), table, kind), labels, strict=False):
        low = np.where(signal.raw, -1, signal.low)
        high = np.where(signal.raw, 1, signal.high)
        for dim, values in enumerate(signal.values.T):
            counts, edges = np.histogram(values, COLUMNS)
            entry = {"of": signal.of, "index": dim, "label": names[dim], "counts": counts.tolist()}
            marks = {"min": edges[0], "max": edges[-1], "low": low[dim], "high": high[dim],
                     "q01": signal.quantiles[0, dim], "q99": signal.quantiles[4, dim]}
            entry |= {mark: float(rounded(value)) for mark, value in marks.items()}
            if signal.of == "action":
                inside = values.clip(low[dim], high[dim])
                bins, _ = np.histogram(inside, 255, (low[dim], high[dim]))
                share = np.cumsum(np.sort(bins)[::-1]) / len(values)
                entry |= {"bins": bins.tolist(), "used": int(np.searchsorted(share, 0.9)) + 1}
            found.append(entry)
    return found


rounded = np.vectorize(lambda value: float(f"{value:.4g}"), [float])  # for a short page


# ---- Episodes ------------------------------------------------------------------------------------


def episode_facts(table: FrameTable, number: int, why: str, most: int) -> dict:
    """Curves of one episode, and up to `most` pictures of each camera."""
    episode = table.episodes[number]
    first = int(episode["first"])
    count = int(episode["count"])
    rows = evenly(count, POINTS)
    frames = table.frames[first + rows]
    pictures = {}
    for camera, key in enumerate(table.cameras):
        if key:
            pictures[key] = [[frame, thumbnail(table, first + frame, camera)]
                             for frame in evenly(count, most).tolist()]
    facts = {"number": number, "count": count, "why": why, "rows": rows.tolist(),
             "text": table.instructions[frames["instruction"][0]], "pictures": pictures,
             "where": f"{table.splits[episode['split']]}, record {episode['record']} of "
                      f"{table.shards[episode['shard']]}",
             "action": rounded(frames["action"]).tolist(), "state": []}
    if "proprio" in frames.dtype.names:
        facts["state"] = rounded(frames["proprio"]).tolist()
    return facts


def thumbnail(table: FrameTable, row: int, camera: int) -> str:
    """A small JPEG in base64; "" if the picture cannot be read."""
    try:
        return jpeg(decode_native(table.read_image(row, camera)))
    except (ValueError, OSError):
        return ""


def jpeg(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE))
    return base64.b64encode(encode(np.array(image), "jpeg", quality=70)).decode()
