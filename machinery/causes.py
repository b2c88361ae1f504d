"""Why does a policy fail? What training saw is compared with what acting sees.

`seen` is a dataset of requests (serve_vla.py --record). For each way of preparing inputs wrongly,
the training frames are changed in this way: if the changed frames are more like the seen ones than
the unchanged ones are, this is the cause. Nothing has to be undone for that, so it also works for
black, cropped or compressed pictures. Read `find_causes`.
"""

import difflib
import io
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from act import Policy
from data import Mixture
from machinery.convention import dimension_names
from machinery.examine import BATCH, batches, log_likelihood, look, summary
from machinery.frames import FrameTable
from machinery.images import decode_native
from machinery.peers import distances

FRAMES = 160  # of each side
ENOUGH = 0.25  # evidence from which a cause is named, in 0..1


class Cause(NamedTuple):
    evidence: float  # 0..1, by which causes are ranked
    kind: str  # pictures, words, state, answers, model, training
    text: str  # the fault, in numbers
    cure: str
    pictures: tuple = ()  # (title, image) of a seen frame and of what training saw


# ---- Pictures ------------------------------------------------------------------------------------


def jpeg(image: np.ndarray) -> np.ndarray:
    """Compressed until it shows."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=10)
    return np.array(Image.open(file))


def resized(image: np.ndarray, scale: float) -> np.ndarray:
    """Made smaller, and large again."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((max(int(width * scale), 1), max(int(height * scale), 1)))
    return np.array(small.resize((width, height)))


def padded(image: np.ndarray) -> np.ndarray:
    """With black bars above and below, as a wide picture made square."""
    bar = image.shape[0] // 6
    return np.pad(image, ((bar, bar), (0, 0), (0, 0)))


def cropped(image: np.ndarray, share: float) -> np.ndarray:
    """The middle of it."""
    top, left = (int(side * (1 - share) / 2) for side in image.shape[:2])
    return image[top : image.shape[0] - top, left : image.shape[1] - left]


CHANGES: dict[str, tuple[Callable, str]] = {  # {fault: (of one picture, the cure)}
    "upside down": (lambda x: x[::-1], "turn it before sending: image[::-1]"),
    "mirrored": (lambda x: x[:, ::-1], "mirror it before sending: image[:, ::-1]"),
    "turned by 180 degrees": (lambda x: x[::-1, ::-1], "turn it: image[::-1, ::-1]"),
    "turned by 90 degrees": (np.rot90, "turn it: numpy.rot90(image, -1)"),
    "turned by -90 degrees": (lambda x: np.rot90(x, -1), "turn it: numpy.rot90(image)"),
    "red and blue swapped": (lambda x: x[..., ::-1], "send RGB, not BGR: image[..., ::-1]"),
    "black": (np.zeros_like, "check the camera: its picture is black"),
    "gray": (lambda x: x.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8), "send colors"),
    "cropped": (lambda x: cropped(x, 0.75), "send the complete picture"),
    "padded": (padded, "send the picture without bars"),
    "much compressed": (jpeg, "send PNG, or JPEG of quality 95"),
    "of a low resolution": (lambda x: resized(x, 0.2), "send the camera's full resolution"),
    "dark": (lambda x: (x * 0.4).astype(np.uint8), "check exposure and light"),
    "too bright": (lambda x: (x * 1.8).clip(0, 255).astype(np.uint8), "check exposure and light"),
}


def views_of(table: FrameTable, cameras: list[str], rows: np.ndarray) -> list[list[np.ndarray]]:
    """The pictures of frames `rows`, in the order of cameras (keys)."""
    order = [table.cameras.index(key) for key in cameras]
    return [[decode_native(table.read_image(int(row), camera)) for camera in order] for row in rows]


def features_of(policy: Policy, views: list[list[np.ndarray]]) -> np.ndarray:
    """Native pictures as acting prepares them -> (R, cameras, D) features."""
    parts = []
    for start in range(0, len(views), BATCH):
        some = [[policy.prepare_image(view) for view in frame]
                for frame in views[start : start + BATCH]]
        features = look(policy.vla, torch.from_numpy(np.array(some)).to(policy.vla.llm.device))
        each = [summary(features[:, [camera]]) for camera in range(features.shape[1])]
        parts.append(np.stack(each, axis=1))
    return np.concatenate(parts)


def nearest(seen: np.ndarray, trained: np.ndarray) -> float:
    """Mean squared distance of seen features (R, D) to the nearest of the trained."""
    return float(distances(seen, trained).min(1).mean())


def picture_causes(policy: Policy, trained: list, seen: list) -> list[Cause]:
    """Pictures that training did not see so. trained, seen: native pictures, [frame][camera]."""
    cameras = policy.cfg.cameras
    ours = features_of(policy, trained)
    theirs = features_of(policy, seen)
    found = []
    for place, camera in enumerate(cameras):
        plain = nearest(theirs[:, place], ours[:, place])
        usual = nearest(ours[::2, place], ours[1::2, place])
        best = ("", plain, "")
        few = [[frame[place]] for frame in trained]
        for name, (change, cure) in CHANGES.items():
            changed = [[np.ascontiguousarray(change(view)) for view in frame] for frame in few]
            distance = nearest(theirs[:, place], features_of(policy, changed)[:, 0])
            best = min(best, (name, distance, cure), key=lambda entry: entry[1])
        for other in range(len(cameras)):
            name = f"that of {cameras[other]}"
            distance = nearest(theirs[:, place], ours[:, other])
            swapped = (name, distance, "swap the cameras in the request")
            best = min(best, swapped, key=lambda entry: entry[1])
        name, distance, cure = best
        evidence = 1 - distance / max(plain, 1e-9)
        sides = (("acting sees", seen[0][place]), ("training saw", trained[0][place]))
        if evidence > ENOUGH and plain > 1.5 * usual:
            text = (f"the picture of {camera} is {name}: training's pictures, changed so, are "
                    f"{plain / max(distance, 1e-9):.1f} times as near to what acting sees")
            found.append(Cause(evidence, "pictures", text, cure, sides))
        elif plain > 4 * usual:
            text = (f"the picture of {camera} is unlike training's: {plain / usual:.1f} times as "
                    "far from them as they are from each other, and no known change explains it")
            found.append(Cause(ENOUGH, "pictures", text, "compare the two pictures", sides))
    return found


def frozen_causes(table: FrameTable, cameras: list[str]) -> list[Cause]:
    """Cameras that send the same picture again and again."""
    found = []
    for camera in cameras:
        place = table.cameras.index(camera)
        same = 0
        steps = 0
        for episode in table.episodes:
            rows = range(int(episode["first"]), int(episode["first"] + episode["count"]))
            pictures = [table.read_image(row, place) for row in rows]
            same += sum(a == b for a, b in itertools.pairwise(pictures))
            steps += len(pictures) - 1
        if steps and same > 0.5 * steps:
            text = f"the picture of {camera} is frozen: the same in {same} of {steps} steps"
            # less than a black picture, which is also always the same
            found.append(Cause(0.9 * same / steps, "pictures", text,
                               "read the camera anew for each step"))
    return found


# ---- Words ---------------------------------------------------------------------------------------


def word_causes(trained: list[str], seen: list[str]) -> list[Cause]:
    """Instructions that training did not contain. seen: one of each request."""
    known = set(trained)
    strange = [text for text in seen if text not in known]
    if not strange:
        return []
    text = max(set(strange), key=strange.count)
    plain = {" ".join(known.lower().strip(" .!").split()): known for known in trained}
    close = plain.get(" ".join(text.lower().strip(" .!").split()))
    why = "differs in capitals, spaces, or punctuation from"
    if close is None:
        close = max(trained, key=lambda known: difflib.SequenceMatcher(None, text, known).ratio())
        why = "is not in the training data; the most similar is"
    share = len(strange) / len(seen)
    text = f"the instruction {text!r} of {share:.0%} of the requests {why} {close!r}"
    return [Cause(0.5 + share / 2, "words", text, f"send {close!r}, or train on other words, too")]


# ---- State ---------------------------------------------------------------------------------------

UNITS = {57.29578: "degrees, training's in radians", 1 / 57.29578: "radians, training's in degrees",
         1000: "millimeters, training's in meters", 0.001: "meters, training's in millimeters",
         100: "percent, training's in 0..1", 0.01: "0..1, training's in percent",
         -1: "of the other sign"}
QUANTILES = np.linspace(0.05, 0.95, 10)


def state_causes(trained: np.ndarray, seen: np.ndarray, names: list[str]) -> list[Cause]:
    """States (R, P), (S, P) in standard form that are not as in training."""
    ours = np.quantile(trained, QUANTILES, axis=0)  # (10, P)
    theirs = np.quantile(seen, QUANTILES, axis=0)
    spread = np.ptp(ours, axis=0) + 1e-6

    def distance(a: np.ndarray, d: int) -> float:
        """Of quantiles (10,) to those that are seen, in their spread."""
        return float(np.abs(a - theirs[:, d]).mean() / max(np.ptp(a), 0.05 * spread[d], 1e-9))

    found: dict[tuple[str, str], list] = {}
    for d in range(trained.shape[1]):
        plain = distance(ours[:, d], d)
        still = np.ptp(seen[:, d]) < 1e-3 * spread[d] and np.ptp(trained[:, d]) > 0.1 * spread[d]
        readings = [(plain, "", "")]
        for factor, unit in UNITS.items():
            readings.append((distance(ours[:, d] * factor, d), f"are {unit}",
                             "send the states in the units of the recording"))
        for other in range(trained.shape[1]):
            if other != d:
                readings.append((distance(ours[:, other], d), "are in another order",
                                 "send the states in the order of the recording"))
        moved = ours[:, d] + np.median(theirs[:, d]) - np.median(ours[:, d])
        readings.append((distance(moved, d) + 0.1, "have an offset", "calibrate its zero"))
        best, what, cure = min(readings)
        if still and len(seen) > 8:
            best, what, cure = 0.0, "are frozen", "read the state anew for each step"
            plain = max(plain, 1.0)
        if what and plain > 0.6 and best < 0.5 * plain:
            found.setdefault((what, cure), []).append((1 - best / plain, names[d]))
    causes = []
    for (what, cure), entries in found.items():
        evidence = max(share for share, _ in entries)
        which = ", ".join(name for _, name in entries)
        causes.append(Cause(evidence, "state", f"the states {which} {what}", cure))
    return causes


# ---- Answers -------------------------------------------------------------------------------------


def answer_causes(own: np.ndarray, given: np.ndarray, names: list[str]) -> list[Cause]:
    """Answers (S, A) of this policy to the seen requests, and those that were given."""
    spread = np.ptp(own, axis=0) + 1e-6
    same = np.abs(own - given) < 0.02 * spread + 1e-6
    bad = np.flatnonzero(same.mean(0) < 0.8)
    if not len(bad):
        return []
    found: dict[tuple[str, str], list] = {}
    for d in bad:
        center = own[:, d] - own[:, d].mean()
        slope = float(center @ (given[:, d] - given[:, d].mean()) / max(center @ center, 1e-12))
        if np.ptp(own[:, d]) < 1e-6:  # a dimension that never moves
            slope = float(given[:, d].mean() / (own[:, d].mean() or 1.0))
        error = np.abs(given[:, d] - given[:, d].mean() - slope * center).mean()
        explained = error < 0.1 * np.abs(given[:, d] - given[:, d].mean()).mean() + 1e-9
        what, cure = "are those of another model", "serve this checkpoint"
        if explained and abs(slope + 1) < 0.05:
            what, cure = "have the other sign", "do not turn the answer round"
        elif explained:
            what = f"are {slope:.3g} times this policy's"
            cure = "act with the statistics of the training's dataset (unnorm_key)"
        found.setdefault((what, cure), []).append((1 - float(same[:, d].mean()), names[d]))
    return [Cause(max(share for share, _ in entries), "answers",
                  f"the answers {', '.join(n for _, n in entries)} {what}", cure)
            for (what, cure), entries in found.items()]


# ---- The model on its own training data ----------------------------------------------------------


def training_causes(policy: Policy, train: Mixture, held_out: Mixture | None) -> list[Cause]:
    """Faults that show in the loss of training and held-out frames."""
    device = policy.vla.llm.device
    losses = {}
    for name, mixture in (("train", train), ("held-out", held_out)):
        if mixture is None:
            continue
        index = np.linspace(0, mixture.sizes[0] - 1, min(FRAMES, mixture.sizes[0])).astype(int)
        rows = mixture.rows(np.zeros(len(index), int), index)
        every = []
        for batch in batches(mixture, rows, device):
            features = look(policy.vla, batch.pop("images"))
            order = torch.arange(len(features)).roll(len(features) // 2)
            plain = log_likelihood(policy.vla, features, **batch).mean(1)
            blind = log_likelihood(policy.vla, features[order], **batch).mean(1)
            every.append(torch.stack([-plain, -blind]).float().cpu().numpy())
        losses[name] = np.concatenate(every, axis=1).mean(1)
    loss, blind = losses["train"]
    found = []
    if loss > 0.7 * np.log(256):
        text = (f"the loss on its own training frames is {loss:.2f} nats per token, "
                f"{np.log(256):.2f} without any learning")
        found.append(Cause(1.0, "model", text,
                           "train longer, or check that its own weights were loaded"))
    elif blind - loss < 0.05:
        text = (f"pictures hardly matter: the loss on training frames is {loss:.2f}, with other "
                f"frames' pictures {blind:.2f}")
        found.append(Cause(0.8, "model", text, "data.py --inspect draws what its camera sees"))
    if "held-out" in losses and losses["held-out"][0] > loss + 1.0:
        text = (f"the loss is {loss:.2f} on training frames and {losses['held-out'][0]:.2f} on "
                "held-out ones: it has memorized them")
        found.append(Cause(0.4, "training", text,
                           "record more episodes, train shorter, or set image_aug: true"))
    return found


# ---- All of it -----------------------------------------------------------------------------------


def find_causes(policy: Policy, train: Mixture, held_out: Mixture | None, seen: FrameTable | None
                ) -> list[Cause]:
    """What may be wrong, the likeliest first.

    train, held_out: of the one dataset that the policy acts by; seen: recorded requests with the
    model's cameras as keys, indexed with its state if it has one
    """
    found = training_causes(policy, train, held_out)
    if seen is None:
        return sorted(found, key=lambda cause: -cause.evidence)
    table = train.tables[0]
    name = train.names[0]
    index = np.linspace(0, train.sizes[0] - 1, min(FRAMES, train.sizes[0])).astype(int)
    rows = train.rows(np.zeros(len(index), int), index)
    theirs = np.unique(np.linspace(0, len(seen.frames) - 1, FRAMES).astype(int))
    trained = views_of(table, train.cameras_shown(0, int(rows[0]), 0), rows)
    views = views_of(seen, policy.cfg.cameras, theirs)
    found += picture_causes(policy, trained, views)
    found += frozen_causes(seen, policy.cfg.cameras)
    used = np.unique(table.frames["instruction"][rows])
    known = [table.instructions[number] for number in used]
    texts = [seen.instructions[number] for number in seen.frames["instruction"][theirs]]
    found += word_causes([*known, *table.instructions], texts)
    robot = policy.convention(name)
    states = None
    if policy.cfg.use_proprio:
        states = seen.frames["proprio"][theirs]
        names = dimension_names(train.recipes[0], table.features)[1]
        found += state_causes(table.frames["proprio"][rows], robot.from_robot(states), names)
    if policy.cfg.window_size == 1:
        own = []
        for start in range(0, len(theirs), BATCH):
            part = slice(start, start + BATCH)
            own.append(policy.predict_action(views[part], texts[part], name,
                                             None if states is None else states[part]))
        own = np.concatenate(own).reshape(len(theirs), -1, len(robot.action))[:, 0]
        found += answer_causes(own, seen.frames["action"][theirs], robot.action)
    return sorted(found, key=lambda cause: -cause.evidence)
