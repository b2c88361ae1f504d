"""Faults in a dataset's pictures, instructions, and in its division into episodes.

Only some pictures are decoded, at an eighth of their size. Those that are equal then are equal, as
a camera's noise differs from picture to picture.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.lib.recfunctions import repack_fields
from PIL import Image

from machinery import oxe
from machinery.frames import FrameTable
from machinery.survey_numbers import Finding, Sample

PICTURES = 2000  # of each camera that are decoded
HUNG = 10  # frames after which a picture should have changed
SIDE = 16  # pixels of a decoded picture


# ---- Pictures ------------------------------------------------------------------------------------


def picture_findings(table: FrameTable, sample: Sample, moved: np.ndarray) -> Iterator[Finding]:
    """moved: (N,) bool, has the robot moved since the frame before?"""
    cameras = [number for number, key in enumerate(table.cameras) if key]
    chosen = np.linspace(0, len(sample.rows) - 1, min(PICTURES, len(sample.rows))).astype(int)
    shown = {camera: look(table, sample.rows[chosen], camera) for camera in cameras}
    for camera in cameras:
        key = table.cameras[camera]
        empty = [*blank(sample, key, chosen, shown[camera])]
        yield from empty or hung(sample, key, chosen, shown[camera], moved)
    for one, other in combinations(cameras, 2):
        plain = shown[one].std((1, 2)) > 3  # not NaN, and not of one color
        # compression and other sizes change a mean by less than 2 of 255
        same = abs(shown[one] - shown[other])[plain].mean((1, 2)) < 2
        if len(same) > 2 and same.mean() > 0.5:
            keys = table.cameras
            text = (f"{keys[one]} and {keys[other]} show the same pictures in {same.mean():.0%} of "
                    "the frames")
            yield sample.finding("equal_cameras", keys[one], text,
                                 "leave one out of the recipe, or correct the recording")


def look(table: FrameTable, rows: np.ndarray, camera: int, side: int = SIDE) -> np.ndarray:
    """(R, side, side) gray pictures, float32 in 0..255. NaN for one that is missing or broken."""
    from machinery.images import decode_native  # here: it imports PyTorch

    pictures = np.full((len(rows), side, side), np.nan, np.float32)
    for number, row in enumerate(rows):
        try:
            data = table.read_image(int(row), camera)
            picture = Image.open(io.BytesIO(data))
            if picture.format == "JPEG":
                picture.draft("L", (side, side))  # it decodes an eighth of the pixels
            else:
                picture = Image.fromarray(decode_native(data))
            pictures[number] = picture.convert("L").resize((side, side), Image.Resampling.BOX)
        except (ValueError, OSError, SyntaxError):  # data.py --check names it
            continue
    return pictures


def blank(sample: Sample, key: str, chosen: np.ndarray, shown: np.ndarray) -> Iterator[Finding]:
    """Pictures that are black, white or of one color. chosen: which frames are shown."""
    mean = shown.mean((1, 2))
    one_color = shown.std((1, 2)) < 1.5  # noise of a sensor behind a cap
    share = one_color.sum() / max((~np.isnan(mean)).sum(), 1)
    if share > 0.01 and one_color.sum() > 1:
        bad = np.zeros(len(sample.rows), bool)
        bad[chosen[one_color]] = True
        level = np.median(mean[one_color])
        name = ("black", "of one color", "white")[np.digitize(level, [12, 243])]
        text = (f"the pictures of {key} are {name} in {share:.0%} of those looked at, "
                f"{sample.where(bad)}")
        yield sample.finding("blank", key, text, "leave the camera out of the recipe, or these "
                             "episodes", bad, "high" if share > 0.1 else "medium")


def hung(sample: Sample, key: str, chosen: np.ndarray, shown: np.ndarray, moved: np.ndarray
         ) -> Iterator[Finding]:
    """The same picture some time later, though the robot has moved. chosen: which frames are shown.
    """
    later = -(-HUNG * len(chosen) // len(moved))  # pictures, that is at least HUNG frames
    way = np.cumsum(moved)[chosen]
    same = (shown[later:] == shown[:-later]).all((1, 2))
    same &= way[later:] - way[:-later] >= 0.7 * HUNG
    same &= sample.episode[chosen[later:]] == sample.episode[chosen[:-later]]
    if same.sum() > max(3, 0.01 * len(chosen)):
        bad = np.zeros(len(moved), bool)
        bad[chosen[later:][same]] = True
        text = (f"{key} shows the same picture again and again while the robot moves, "
                f"{sample.where(bad)}: the camera hung")
        yield sample.finding("camera_hung", key, text, "leave these episodes out", bad,
                             "high" if same.mean() > 0.02 else "medium")


# ---- Episodes that occur twice -------------------------------------------------------------------


def twin_findings(sample: Sample, held_out: np.ndarray) -> Iterator[Finding]:
    """Episodes of which most frames occur in another one, too. held_out: (E,) bool."""
    pairs = find_twins(sample)
    across = held_out[pairs[:, 0]] != held_out[pairs[:, 1]]
    for kind, some in (("held_out_seen", pairs[across]), ("episode_twice", pairs[~across])):
        if len(some):
            named = ", ".join(f"{one} = {other}" for one, other in sample.numbers[some[:3]])
            text = f"{len(some)} of {len(held_out)} episodes are copies of others ({named})"
            text += ", one held out, one trained on" * (kind == "held_out_seen")
            copies = np.isin(sample.episode, some[:, 1])
            severity = "high" if kind == "held_out_seen" or copies.mean() > 0.1 else "medium"
            yield sample.finding(kind, "episode", text, "leave the copies out", copies, severity)


def find_twins(sample: Sample) -> np.ndarray:
    """Pairs of episodes, (P, 2), that have half of their frames in common: the same numbers, and
    pictures whose files have the same length, which others hardly have so often."""
    fields = [name for name in sample.frames.dtype.names if name not in ("offset", "instruction")]
    content = repack_fields(sample.frames[fields])
    content = content.view(f"V{content.dtype.itemsize}")
    key = np.unique(content, return_inverse=True)[1]
    order = np.lexsort((sample.episode, key))
    owner = sample.episode[order]
    # neighbors in this order with one key are the same frame
    equal = (np.diff(key[order]) == 0) & (np.diff(owner) != 0)
    pairs = np.stack([owner[:-1], owner[1:]], axis=1)[equal]
    pairs, shared = np.unique(pairs, axis=0, return_counts=True)
    return pairs[shared >= np.maximum(3, 0.5 * sample.count[pairs].min(1))]


def held_out_episodes(table: FrameTable, numbers: np.ndarray) -> np.ndarray:
    """Which of these episodes of a table are held out, (E,) bool."""
    first, count = oxe.kept_episodes(table, train=False)
    return np.isin(table.first_frames[numbers], first[count > 0])


# ---- Instructions --------------------------------------------------------------------------------


def language_findings(table: FrameTable, sample: Sample, held_out: np.ndarray) -> Iterator[Finding]:
    """Frames and episodes without an instruction, one for all, misspelled ones, and those that only
    held-out episodes have. held_out: (E,) bool."""
    texts = table.instructions
    number = sample.frames["instruction"]
    missing = np.array([not text.strip() for text in texts])[number]
    labeled = table.episodes["labeled"][sample.numbers]

    def finding(kind: str, bad: np.ndarray | None, text: str, cure: str):
        return sample.finding(kind, "instruction", text, cure, bad, "medium")

    if missing.any():
        within = (missing & labeled[sample.episode]).sum()
        text = (f"{(~labeled).sum()} of {len(labeled)} episodes have no instruction, and {within} "
                "frames have no instruction, but others of their episode have one")
        yield finding("unlabeled", missing, text, "such episodes are left out, such frames trained "
                      "on without one; write one into every step")
    # which episodes have which text
    pairs = np.unique(np.stack([number[~missing], sample.episode[~missing]]), axis=1)
    count = np.bincount(pairs[0], minlength=len(texts))  # of episodes
    trained = np.bincount(pairs[0], ~held_out[pairs[1]], len(texts))
    known = np.flatnonzero(count)
    if len(known) == 1 and labeled.sum() > 1:
        text = f"all {labeled.sum()} episodes have one instruction, {texts[known[0]]!r}"
        yield finding("one_instruction", None, text,
                      "a policy will ignore it; name what differs between episodes")
    unseen = known[trained[known] == 0]
    if len(unseen) and not held_out.all():
        names = ", ".join(repr(texts[n]) for n in unseen[:3])
        yield finding("only_held_out", np.isin(number, unseen), f"{len(unseen)} instructions are "
                      f"only in held-out episodes, as {names}, and never trained on",
                      "put some of their episodes into train")
    alike = misspelled(texts, count, known)
    if alike:
        shown = ", ".join(f"{texts[a]!r} ({count[a]} episodes) and {texts[b]!r} ({count[b]})"
                          for a, b in alike[:3])
        yield finding("misspelled", np.isin(number, [b for _, b in alike]), "instructions that "
                      f"differ by a letter or a sign: {shown}", "write them alike")


def misspelled(texts: list[str], count: np.ndarray, known: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of instructions, (the more frequent, the other), that are the same but for spaces and
    punctuation, or but for one letter of a word that no other instruction has."""
    known = known[np.argsort(-count[known], kind="stable")][:2000].tolist()
    plain = {n: " ".join(re.findall(r"\w+", texts[n].lower())) for n in known}  # as prompts are
    words = Counter(word for text in {*plain.values()} for word in {*text.split()})
    seen = {}  # {a text without one of its letters: the most frequent of these texts}
    alike = []
    for n in known:
        text = plain[n]
        # texts that differ by a letter, or by two exchanged, have one of these in common
        shorter = {text[:k] + text[k + 1 :] for k in range(len(text) + 1)}
        for other in {seen.setdefault(form, n) for form in shorter} - {n}:
            new = {*text.split()} - {*plain[other].split()}
            new = [word for word in new if words[word] == 1 and not re.search(r"\d", word)]
            once = count[n] == 1 and count[other] > 2
            rare = new and (once or count[n] <= 0.2 * count[other])
            spaced = text == plain[other] and texts[n].lower() != texts[other].lower()
            if rare or spaced:
                alike.append((other, n))
    return alike
