"""Why does a policy fail? What training saw is compared with what acting sees.

`seen` is a dataset of requests (serve_vla.py --record). For each way of preparing inputs wrongly,
training's frames are changed in this way: if the changed frames are more like the seen ones than
the unchanged ones are, this is the cause. Nothing has to be undone for that, so it also works for
black, cropped or compressed pictures. Read `find_causes`, then any of the functions it calls.
"""

import difflib
import io
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from act import Policy
from data import Mixture
from machinery.convention import dimension_names
from machinery.examine import BATCH, batches, log_likelihood, look
from machinery.frames import FrameTable
from machinery.images import decode_native
from machinery.peers import distances, evenly

FRAMES = 160  # of each side
ENOUGH = 0.25  # evidence from which a cause is named, in 0..1


class Cause(NamedTuple):
    evidence: float  # 0..1, by which causes are ranked
    kind: str  # pictures, words, state, answers, model, training
    text: str  # the fault, in numbers
    cure: str
    pictures: tuple = ()  # (title, image) of a seen frame and of what training saw


def find_causes(policy: Policy, train: Mixture, held_out: Mixture | None, seen: FrameTable | None
                ) -> list[Cause]:
    """What may be wrong, the likeliest first.

    train, held_out: of the one dataset that the policy acts by; seen: recorded requests with the
    model's cameras as keys, indexed with its state if it has one
    """
    found = training_causes(policy, train, held_out)
    if seen:
        found += request_causes(policy, train, seen)
    return sorted(found, key=lambda cause: -cause.evidence)


def request_causes(policy: Policy, train: Mixture, seen: FrameTable) -> list[Cause]:
    """What differs between the requests and the training frames."""
    name = train.names[0]
    table = train.tables[0]
    robot = policy.convention(name)
    rows = spread(train)
    requests = evenly(len(seen.frames), FRAMES)
    frames = seen.frames[requests]
    views = views_of(seen, policy.cfg.cameras, requests)
    texts = [seen.instructions[number] for number in frames["instruction"]]
    states = frames["proprio"] if policy.cfg.use_proprio else [None] * len(frames)
    trained = views_of(table, train.cameras_shown(0, int(rows[0]), 0), rows)
    found = picture_causes(policy, trained, views) + frozen_causes(seen, requests)
    found += word_causes(table.instructions, texts)
    if policy.cfg.use_proprio:
        names = dimension_names(train.recipes[0], table.features)[1]
        found += state_causes(table.frames["proprio"][rows], robot.from_robot(states), names)
    if policy.cfg.window_size == 1:
        own = [policy.predict_action(*request, name, state)
               for *request, state in zip(views, texts, states, strict=True)]
        own = np.reshape(own, (len(own), -1, len(robot.action)))[:, 0]
        found += answer_causes(own, frames["action"], robot.action)
    return found


def spread(mixture: Mixture) -> np.ndarray:
    """Up to FRAMES rows of the mixture's one dataset, at even distances."""
    index = evenly(int(mixture.sizes[0]), FRAMES)
    return mixture.rows(np.zeros(len(index), int), index)


# ---- The model on its own training data ----------------------------------------------------------


def training_causes(policy: Policy, train: Mixture, held_out: Mixture | None) -> list[Cause]:
    """Faults that show in the loss of training and held-out frames."""
    loss, blind = losses(policy, train)
    unknown = losses(policy, held_out)[0] if held_out else loss
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
    if unknown > loss + 1.0:
        text = (f"the loss is {loss:.2f} on training frames and {unknown:.2f} on held-out ones: it "
                "has memorized them")
        found.append(Cause(0.4, "training", text,
                           "record more episodes, train shorter, or set image_aug: true"))
    return found


def losses(policy: Policy, mixture: Mixture) -> np.ndarray:
    """(2,) nats per action token: with each frame's own pictures, and with another frame's."""
    found = []
    for batch in batches(mixture, spread(mixture), policy.vla.llm.device):
        images = batch["images"]
        other = batch | {"images": images.roll(len(images) // 2, dims=0)}
        both = [-log_likelihood(policy.vla, inputs).mean(1) for inputs in (batch, other)]
        found.append(torch.stack(both).cpu().numpy())
    return np.concatenate(found, axis=1).mean(1)


# ---- Pictures ------------------------------------------------------------------------------------


def jpeg(image: np.ndarray) -> np.ndarray:
    """Compressed until it shows."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=10)
    return decode_native(file.getvalue())


CHANGES: dict[str, tuple[Callable, str]] = {  # {fault: (of one picture, the cure)}
    "upside down": (np.flipud, "turn it before sending: image[::-1]"),
    "mirrored": (np.fliplr, "mirror it before sending: image[:, ::-1]"),
    "turned by 180 degrees": (lambda x: x[::-1, ::-1], "turn it: image[::-1, ::-1]"),
    "turned by 90 degrees": (np.rot90, "turn it: numpy.rot90(image, -1)"),
    "turned by -90 degrees": (lambda x: np.rot90(x, -1), "turn it: numpy.rot90(image)"),
    "red and blue swapped": (lambda x: x[..., ::-1], "send RGB, not BGR: image[..., ::-1]"),
    "black": (np.zeros_like, "check the camera: its picture is black"),
    "gray": (lambda x: x.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8), "send colors"),
    "cropped": (lambda x: x[len(x) // 8 : -len(x) // 8, x.shape[1] // 8 : -x.shape[1] // 8],
                "send the complete picture"),
    "padded": (lambda x: np.pad(x, (2 * [len(x) // 6], (0, 0), (0, 0))),
               "send the picture without bars"),  # as a wide one that was made square
    "much compressed": (jpeg, "send PNG, or JPEG of quality 95"),
    "dark": (lambda x: (x * 0.4).astype(np.uint8), "check exposure and light"),
    "too bright": (lambda x: (x * 1.8).clip(0, 255).astype(np.uint8), "check exposure and light"),
}


def views_of(table: FrameTable, cameras: list[str], rows: np.ndarray) -> list[list[np.ndarray]]:
    """The pictures of frames `rows`, in the order of cameras (keys)."""
    order = [table.cameras.index(key) for key in cameras]
    return [[decode_native(table.read_image(int(row), camera)) for camera in order] for row in rows]


def features_of(policy: Policy, views: list, change: Callable = np.asarray) -> np.ndarray:
    """Native pictures [frame][camera], changed, as acting prepares them -> (R, cameras, D)."""
    parts = []
    for start in range(0, len(views), BATCH):
        some = [[policy.prepare_image(change(view)) for view in frame]
                for frame in views[start : start + BATCH]]
        parts.append(look(policy.vla, torch.from_numpy(np.array(some)).to(policy.vla.llm.device)))
    return np.concatenate(parts)


def nearest(seen: np.ndarray, trained: np.ndarray) -> float:
    """Mean squared distance of seen features (R, D) to the nearest of the trained."""
    return float(distances(seen, trained).min(1).mean())


def picture_causes(policy: Policy, trained: list, seen: list) -> list[Cause]:
    """Pictures that training did not see so. trained, seen: native pictures, [frame][camera]."""
    cameras = policy.cfg.cameras
    ours = features_of(policy, trained)
    theirs = features_of(policy, seen)
    changed = {name: features_of(policy, trained, CHANGES[name][0]) for name in CHANGES}
    found = []
    for place, camera in enumerate(cameras):
        own = theirs[:, place]
        plain = nearest(own, ours[:, place])
        usual = nearest(ours[::2, place], ours[1::2, place])
        away = {name: nearest(own, features[:, place]) for name, features in changed.items()}
        for other, name in enumerate(cameras):
            away[f"that of {name}"] = nearest(own, ours[:, other])
        best = min(away, key=away.__getitem__)
        evidence = 1 - away[best] / max(plain, 1e-9)
        if evidence > ENOUGH and plain > 1.5 * usual:
            text = (f"{best}: training's pictures, changed so, are "
                    f"{1 / max(1 - evidence, 1e-9):.1f} times as near to what acting sees")
            cure = CHANGES[best][1] if best in CHANGES else "swap the cameras in the request"
        elif plain > 4 * usual:
            text = (f"unlike training's: {plain / usual:.1f} times as far from them as they are "
                    "from each other, and no known change explains it")
            cure = "compare the two pictures"
            evidence = ENOUGH
        else:
            continue
        sides = (("acting sees", seen[0][place]), ("training saw", trained[0][place]))
        found.append(Cause(evidence, "pictures", f"the picture of {camera} is {text}", cure, sides))
    return found


def frozen_causes(seen: FrameTable, rows: np.ndarray) -> list[Cause]:
    """Cameras that send the same picture again and again. rows: to compare with the next ones."""
    rows = rows[rows + 1 < len(seen.frames)]
    rows = rows[seen.episode_of(rows) == seen.episode_of(rows + 1)].tolist()
    found = []
    for camera, key in enumerate(seen.cameras):
        same = sum(seen.read_image(row, camera) == seen.read_image(row + 1, camera) for row in rows)
        if same > 0.5 * len(rows):
            text = f"the picture of {key} is frozen: the same in {same} of {len(rows)} steps"
            # less than a black picture, which is also always the same
            found.append(Cause(0.9 * same / len(rows), "pictures", text,
                               "read the camera anew for each step"))
    return found


# ---- Words ---------------------------------------------------------------------------------------


def word_causes(trained: list[str], seen: list[str]) -> list[Cause]:
    """Instructions that training did not contain. seen: one of each request."""
    known = {text.lower(): text for text in trained}  # prompts are in lower case
    strange = [text for text in seen if text.lower() not in known]
    if not strange:
        return []
    text = max(set(strange), key=strange.count)
    [close] = difflib.get_close_matches(text.lower(), known, n=1, cutoff=0)
    share = len(strange) / len(seen)
    return [Cause(0.5 + share / 2, "words",
                  f"the instruction {text!r} of {share:.0%} of the requests is not in the training "
                  f"data; the most similar is {known[close]!r}",
                  f"send {known[close]!r}, or train on other words, too")]


# ---- Numbers -------------------------------------------------------------------------------------

UNITS = {57.29578: "degrees, training's in radians", 1 / 57.29578: "radians, training's in degrees",
         1000: "millimeters, training's in meters", 0.001: "meters, training's in millimeters",
         100: "percent, training's in 0..1", 0.01: "0..1, training's in percent",
         -1: "of the other sign"}
QUANTILES = np.linspace(0.05, 0.95, 10)


def state_causes(trained: np.ndarray, seen: np.ndarray, names: list[str]) -> list[Cause]:
    """States (R, P), (S, P) in standard form that are not as in training."""
    ours = np.quantile(trained, QUANTILES, axis=0)  # (10, P)
    theirs = np.quantile(seen, QUANTILES, axis=0)
    spans = np.ptp(ours, axis=0) + 1e-6

    def distance(reading: np.ndarray) -> np.ndarray:
        """Of quantiles (10, P) to those that are seen, in their span -> (P,)."""
        return np.abs(reading - theirs).mean(0) / np.maximum(np.ptp(reading, 0), 0.05 * spans)

    still = (np.ptp(seen, 0) < 1e-3 * spans) & (np.ptp(trained, 0) > 0.1 * spans) & (len(seen) > 8)
    plain = np.maximum(distance(ours), still)
    moved = ours + np.median(theirs, axis=0) - np.median(ours, axis=0)
    readings = [(np.where(still, 0, np.inf), "are frozen", "read the state anew for each step"),
                (distance(moved) + 0.1, "have an offset", "calibrate its zero")]
    for factor, unit in UNITS.items():
        readings.append((distance(ours * factor), f"are {unit}",
                         "send the states in the units of the recording"))
    for places in range(1, len(names)):
        readings.append((distance(np.roll(ours, places, axis=1)), "are in another order",
                         "send the states in the order of the recording"))
    faults = []
    for dim, name in enumerate(names):
        away, what, cure = min((away[dim], what, cure) for away, what, cure in readings)
        if plain[dim] > 0.6 and away < 0.5 * plain[dim]:
            faults.append((1 - away / plain[dim], name, what, cure))
    return together("state", "states", faults)


def answer_causes(own: np.ndarray, given: np.ndarray, names: list[str]) -> list[Cause]:
    """Answers (S, A) of this policy to the seen requests, and those that were given."""
    span = np.ptp(own, axis=0)
    same = (np.abs(own - given) < 0.02 * span + 1e-6).mean(0)
    moves = span > 1e-6  # in others, only the values themselves can be compared
    ours = own - np.where(moves, own.mean(0), 0)
    theirs = given - np.where(moves, given.mean(0), 0)
    slope = (ours * theirs).sum(0) / np.maximum((ours**2).sum(0), 1e-12)
    explained = np.abs(theirs - slope * ours).mean(0) < 0.1 * np.abs(theirs).mean(0) + 1e-9
    faults = []
    for dim in np.flatnonzero(same < 0.8):
        what = "are those of another model"
        cure = "serve this checkpoint"
        if explained[dim] and abs(slope[dim] + 1) < 0.05:
            what = "have the other sign"
            cure = "do not turn the answer round"
        elif explained[dim]:
            what = f"are {slope[dim]:.3g} times this policy's"
            cure = "act with the statistics of the training's dataset (unnorm_key)"
        faults.append((1 - same[dim], names[dim], what, cure))
    return together("answers", "answers", faults)


def together(kind: str, subject: str, faults: Iterable[tuple[float, str, str, str]]) -> list[Cause]:
    """(evidence, dimension, what is wrong, cure) each -> one cause for all with the same fault."""
    found: dict[tuple[str, str], list] = {}
    for evidence, name, what, cure in faults:
        found.setdefault((what, cure), []).append((float(evidence), name))
    return [Cause(max(entries)[0], kind, f"the {subject} {', '.join(name for _, name in entries)} "
                  f"{what}", cure) for (what, cure), entries in found.items()]
