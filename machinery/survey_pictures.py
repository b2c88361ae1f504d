"""Faults in a dataset's pictures, instructions, and in its division into episodes.

Equal pictures have files of equal length, which the frame table knows. Bytes are compared only if
lengths are suspicious, and only a few pictures per episode are decoded, at an eighth of their size.
"""

import io
import re
from collections import Counter
from itertools import combinations

import numpy as np
import simplejpeg
from PIL import Image

from machinery import oxe
from machinery.frames import FrameTable
from machinery.survey_numbers import Finding, Sample

EPISODES = 512  # whose pictures are decoded
PICTURES = 8  # of each camera in an episode
COMPARED = 400  # pairs of pictures whose bytes are compared
SIDE = 16  # pixels of a decoded picture


# ---- Pictures ------------------------------------------------------------------------------------


def picture_findings(table: FrameTable, sample: Sample, moved: np.ndarray) -> list[Finding]:
    """moved: (N,) bool, has the robot moved since the frame before?"""
    cameras = [number for number, key in enumerate(table.cameras) if key]
    few = np.arange(len(sample.numbers))[:: -(-len(sample.numbers) // EPISODES)]
    spread = np.linspace(0, 1, PICTURES)
    chosen = sample.first[few, None] + ((sample.count[few, None] - 1) * spread).astype(int)
    chosen = np.unique(chosen)
    shown = {camera: look(table, sample.rows[chosen], camera) for camera in cameras}
    found = []
    for camera in cameras:
        empty = blank(sample, table.cameras[camera], chosen, shown[camera])
        found += empty or hung(table, sample, camera, moved)
    for one, other in combinations(cameras, 2):
        found += equal_cameras(table, sample, one, other, shown[one], shown[other])
    return found


def look(table: FrameTable, rows: np.ndarray, camera: int) -> np.ndarray:
    """(R, SIDE, SIDE) gray pictures, float32 in 0..255. NaN for one that is missing or broken."""
    pictures = np.full((len(rows), SIDE, SIDE), np.nan, np.float32)
    for number, row in enumerate(rows):
        try:
            data = table.read_image(int(row), camera)
            if data:
                pictures[number] = small(data)
        except (ValueError, OSError, SyntaxError):  # data.py --check names it
            continue
    return pictures


def small(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> (SIDE, SIDE) gray."""
    if data.startswith(b"\xff\xd8"):
        gray = simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, fastupsample=True,
                                      min_height=SIDE, min_width=SIDE)[..., 0]
        picture = Image.fromarray(gray)
    else:
        picture = Image.open(io.BytesIO(data))
        if picture.mode == "I;16":
            picture = Image.fromarray((np.array(picture) >> 8).astype(np.uint8))
        picture = picture.convert("L")
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)


def blank(sample: Sample, key: str, chosen: np.ndarray, shown: np.ndarray) -> list[Finding]:
    """Pictures that are black, of one color, overexposed or dark. chosen: which frames are shown.
    """
    flat = shown.reshape(len(shown), -1)
    there = ~np.isnan(flat[:, 0])
    if there.sum() < 3:
        return []
    mean, deviation = flat.mean(1), flat.std(1)
    one_color = deviation < 1.5  # noise of a sensor behind a cap
    kinds = [("black", one_color & (mean < 12)), ("white", one_color & (mean > 243)),
             ("of one color", one_color & (mean >= 12) & (mean <= 243)),
             ("overexposed", ~one_color & ((flat > 250).mean(1) > 0.6)),
             ("nearly black", ~one_color & (np.quantile(flat, 0.9, axis=1) < 20))]
    found = []
    for name, which in kinds:
        share = which[there].mean()
        if share > 0.01 and which.sum() > 1:
            bad = np.zeros(len(sample.rows), bool)
            bad[chosen[which]] = True
            episodes = np.bincount(sample.episode, bad, len(sample.numbers))
            text = (f"the pictures of {key} are {name} in {share:.0%} of those looked at, in "
                    f"{sample.episodes(episodes)}")
            severity = "high" if share > 0.1 and name != "nearly black" else "medium"
            cure = "leave the camera out of the recipe, or these episodes"
            found.append(sample.finding("blank", key, (), bad, text, cure, severity))
    return found


def hung(table: FrameTable, sample: Sample, camera: int, moved: np.ndarray) -> list[Finding]:
    """The same picture again, though the robot moves."""
    key = table.cameras[camera]
    length = sample.frames["length"][:, camera]
    same = sample.joined & moved & (length > 0) & (length == np.roll(length, 1))
    if same.sum() < 0.01 * moved.sum() or not same.any():
        return []
    pairs = np.flatnonzero(same)
    pairs = pairs[np.linspace(0, len(pairs) - 1, min(COMPARED, len(pairs))).astype(int)]
    equal = [same_picture(table, sample.rows[row], camera, sample.rows[row - 1], camera)
             for row in pairs]
    if np.mean(equal) < 0.9:  # most of equal lengths are chance: only a long run is not
        same &= run_lengths(same) >= 5
        pairs = np.flatnonzero(same)[:COMPARED]
        equal = [same_picture(table, sample.rows[row], camera, sample.rows[row - 1], camera)
                 for row in pairs]
        if not len(pairs) or np.mean(equal) < 0.9:
            return []
    share = same.sum() / moved.sum()
    long = same & (run_lengths(same) >= 10)
    if long.sum() > max(20, 0.01 * moved.sum()):
        part = long.sum() / moved.sum()
        text = (f"{key} shows the same picture again and again while the robot moves, "
                f"{sample.where(long)}: the camera hung")
        severity = "high" if part > 0.02 else "medium"
        return [sample.finding("camera_hung", key, (), run_lengths(long), text,
                               "leave these episodes out", severity)]
    if share > 0.2:
        text = (f"{key} repeats the picture before in {share:.0%} of the frames in which the robot "
                "moves: it is slower than the recording")
        return [sample.finding("camera_slow", key, (), same, text,
                               "record at the camera's rate", "medium")]
    return []


def run_lengths(flags: np.ndarray) -> np.ndarray:
    """(N,) bool -> (N,) int: how many neighbors in a row are True, itself included; 0 if False."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(np.int8)))
    lengths = np.zeros(len(flags), int)
    for start, stop in edges.reshape(-1, 2):
        lengths[start:stop] = stop - start
    return lengths


def same_picture(table: FrameTable, row: int, camera: int, other_row: int, other: int) -> bool:
    try:
        data = table.read_image(int(row), camera)
        return data != b"" and data == table.read_image(int(other_row), other)
    except (ValueError, OSError):
        return False


def equal_cameras(table: FrameTable, sample: Sample, one: int, other: int, shown: np.ndarray,
                  shown_other: np.ndarray) -> list[Finding]:
    """Two cameras with the same pictures."""
    plain = (np.nanstd(shown, axis=(1, 2)) > 3) & ~np.isnan(shown_other[:, 0, 0])
    if plain.sum() < 3:
        return []
    # compression and other sizes change a mean by less than 2 of 255
    differ = np.abs(shown - shown_other)[plain].mean((1, 2))
    share = (differ < 2).mean()
    if share < 0.5:
        return []
    keys = table.cameras
    text = f"{keys[one]} and {keys[other]} show the same pictures in {share:.0%} of the frames"
    bad = np.zeros(len(sample.rows))
    return [sample.finding("equal_cameras", keys[one], (), bad, text,
                           "leave one out of the recipe, or correct the recording")]


# ---- Episodes that occur twice -------------------------------------------------------------------


def twin_findings(table: FrameTable, sample: Sample, held_out: np.ndarray) -> list[Finding]:
    """Episodes of which most frames occur in another one, too. held_out: (E,) bool."""
    columns = [sample.frames["action"].view(np.uint32).astype(np.uint64)]
    if "proprio" in sample.frames.dtype.names:
        columns.append(sample.frames["proprio"].view(np.uint32).astype(np.uint64))
    columns.append(sample.frames["length"].astype(np.uint64))
    key = np.zeros(len(sample.rows), np.uint64)
    with np.errstate(over="ignore"):
        for column in np.concatenate(columns, axis=1).T:
            key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
    order = np.lexsort((sample.episode, key))
    sorted_key, owner = key[order], sample.episode[order]
    # neighbors in this order with one key are the same frame
    pairs = np.flatnonzero((sorted_key[1:] == sorted_key[:-1]) & (owner[1:] != owner[:-1]))
    found = []
    votes = Counter(zip(owner[pairs].tolist(), owner[pairs + 1].tolist(), strict=True))
    twins = []
    for (one, other), shared in votes.items():
        if shared >= 0.5 * min(sample.count[one], sample.count[other]) and shared > 2:
            middle = order[pairs[(owner[pairs] == one) & (owner[pairs + 1] == other)][shared // 2]]
            place = np.flatnonzero(key == key[middle])
            partner = place[sample.episode[place] == other][0]
            rows = sample.rows[[middle, partner]]
            if all(same_picture(table, rows[0], camera, rows[1], camera)
                   for camera in range(len(table.cameras))):
                twins.append((one, other))
        if len(twins) > 1000:
            break
    if not twins:
        return []
    twins = np.array(twins)
    across = held_out[twins[:, 0]] != held_out[twins[:, 1]]
    for which, kind in ((across, "held_out_seen"), (~across, "episode_twice")):
        some = twins[which]
        if not len(some):
            continue
        doubled = np.zeros(len(sample.numbers), bool)
        doubled[some[:, 1]] = True
        named = ", ".join(f"{sample.numbers[a]} = {sample.numbers[b]}" for a, b in some[:3])
        text = f"{doubled.sum()} of {len(doubled)} episodes are copies of others ({named})"
        if kind == "held_out_seen":
            text += ", one held out, one trained on: evaluation is on frames seen in training"
        severity = "high" if kind == "held_out_seen" or doubled.mean() > 0.1 else "medium"
        found.append(sample.finding(kind, "episode", (), doubled[sample.episode], text,
                                    "leave the copies out", severity))
    return found


# ---- Instructions --------------------------------------------------------------------------------


def language_findings(table: FrameTable, sample: Sample, held_out: np.ndarray) -> list[Finding]:
    """Frames and episodes without an instruction, one for all, misspelled ones, and those that only
    held-out episodes have. held_out: (E,) bool."""
    texts = table.instructions
    number = sample.frames["instruction"]
    blank = np.array([not text.strip() for text in texts])
    missing = blank[number]
    labeled = table.episodes["labeled"][sample.numbers]
    found = []
    within = missing & labeled[sample.episode]
    if within.any():
        text = f"{within.sum()} frames have no instruction, but others of their episode have one"
        found.append(sample.finding("no_instruction", "instruction", (), within, text,
                                    "they are trained on without one; repeat it in every step",
                                    "high" if within.mean() > 0.2 else "medium"))
    if not labeled.all():
        bad = ~labeled[sample.episode]
        text = f"{(~labeled).sum()} of {len(labeled)} episodes have no instruction"
        found.append(sample.finding("unlabeled", "instruction", (), bad, text,
                                    "they are left out; write one into every step", "medium"))
    # which episodes have which text
    pairs = np.unique(np.stack([number[~missing], sample.episode[~missing]]), axis=1)
    count = np.bincount(pairs[0], minlength=len(texts))  # of episodes
    known = np.flatnonzero(count)
    if len(known) == 1 and labeled.sum() > 1:
        text = f"all {labeled.sum()} episodes have one instruction, {texts[known[0]]!r}"
        found.append(Finding("one_instruction", "medium", text,
                             "a policy will ignore it; name what differs between episodes",
                             "instruction"))
    seen = np.bincount(pairs[0], ~held_out[pairs[1]], len(texts)) > 0
    unseen = [n for n in known if not seen[n]]
    if unseen and not held_out.all():
        bad = np.isin(number, unseen)
        text = f"{quoted(texts, unseen)} only in held-out episodes: never trained on"
        found.append(sample.finding("only_held_out", "instruction", (), bad, text,
                                    "put some of their episodes into train", "medium"))
    once = [n for n in known if count[n] == 1]
    if once and np.median(count[known]) >= 5 and len(once) < 0.3 * len(known):
        usual = np.median(count[known])
        text = f"{quoted(texts, once)} in a single episode each, others in {usual:.0f}"
        found.append(sample.finding("rare_instruction", "instruction", (), np.isin(number, once),
                                    text, "record more of them, or correct the words", "medium"))
    alike = misspelled(texts, count, known)
    if alike:
        shown = ", ".join(f"{texts[a]!r} ({count[a]} episodes) and {texts[b]!r} ({count[b]})"
                          for a, b in alike[:3])
        bad = np.isin(number, [b for _, b in alike])
        found.append(sample.finding("misspelled", "instruction", (), bad,
                                    f"instructions that differ by a letter or a sign: {shown}",
                                    "write them alike", "medium"))
    return found


def quoted(texts: list[str], numbers: list[int]) -> str:
    shown = ", ".join(repr(texts[n]) for n in numbers[:3])
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"{shown}{more} {'is' if len(numbers) == 1 else 'are'}"


def misspelled(texts: list[str], count: np.ndarray, known: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of instructions, (the more frequent, the other), that are the same but for spaces and
    punctuation, or but for one letter of a word that no other instruction has."""
    def plain(text: str) -> str:  # prompts are in lower case
        return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())

    known = known[np.argsort(-count[known], kind="stable")][:2000]
    first = {}  # {text: its most frequent spelling}
    alike = []
    for n in known:
        other = first.setdefault(plain(texts[n]), n)
        if other != n and texts[n].lower() != texts[other].lower():
            alike.append((other, n))
    words = Counter(word for n in known for word in set(plain(texts[n]).split()))
    # texts without one of their words -> (word, text); few enough to compare those that agree
    gaps: dict[tuple, list] = {}
    for text, n in first.items():
        parts = text.split()
        for i, word in enumerate(parts):
            gap = (*parts[:i], None, *parts[i + 1 :])
            for other_word, other in gaps.get(gap, []):
                rare = words[word] == 1 and count[n] <= 0.2 * count[other]
                if rare and not re.search(r"\d", word) and one_edit(word, other_word):
                    alike.append((other, n))
            gaps.setdefault(gap, []).append((word, n))
    return alike


def one_edit(a: str, b: str) -> bool:
    """Do two words differ by one letter more, less or other, or by two that are exchanged?"""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    a, b = a[start:], b[start:]
    swapped = a[:2] == b[1::-1] and len(b) > 1 and a[2:] == b[2:]
    return swapped or a[1:] == b[1:] or a[1:] == b or a == b[1:]


def held_out_episodes(table: FrameTable, numbers: np.ndarray) -> np.ndarray:
    """Which of these episodes of a table are held out, (E,) bool."""
    first, count = oxe.kept_episodes(table, train=False)
    return np.isin(table.first_frames[numbers], first[count > 0])
