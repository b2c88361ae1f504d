"""Why does a policy fail? The robot's requests are compared with the frames of training.

`seen` is a dataset of requests (serve_vla.py --record). For each way of preparing inputs wrongly,
training's frames are changed in this way: if the changed frames are more like the seen ones than
the unchanged ones are, this is the cause. Nothing has to be undone for that, so it also works for
black, cropped or compressed pictures. Read `find_causes`, then any of the functions it calls;
causes_actions.py examines how the robot executed the answers, causes_model.py the model.
"""

import difflib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from act import Policy
from data import Mixture
from machinery.causes_actions import Played, action_causes, frames_by_clock
from machinery.causes_model import model_causes
from machinery.causes_state import state_causes
from machinery.convention import dimension_names
from machinery.examine import BATCH, FRAMES, Cause, look, recording_of, spread
from machinery.frames import FrameTable
from machinery.images import decode_native, encode
from machinery.peers import distances, evenly
from machinery.tfrecords import Steps, read_records, step_features

ENOUGH = 0.25  # evidence from which a cause is named, in 0..1


def find_causes(policy: Policy, run: Path, train: Mixture, held_out: Mixture | None,
                seen: FrameTable | None) -> list[Cause]:
    """What may be wrong, the likeliest first.

    run: where the policy is; train, held_out: of the one dataset that it acts by; seen: recorded
    requests with the model's cameras as keys, indexed with its state if it has one
    """
    found = list(model_causes(policy, train, held_out, run))
    if seen:
        found += request_causes(policy, train, seen)
    return sorted(found, key=lambda cause: -cause.evidence)


def request_causes(policy: Policy, train: Mixture, seen: FrameTable) -> list[Cause]:
    """What differs between the requests and the training frames."""
    name, table, cfg = train.names[0], train.tables[0], policy.cfg
    robot = policy.convention(name)
    rows = spread(train)
    requests = evenly(len(seen.frames), FRAMES)
    views = views_of(seen, cfg.cameras, requests)
    texts = [seen.instructions[number] for number in seen.frames["instruction"]]
    trained = views_of(table, train.cameras_shown(0, int(rows[0]), 0), rows)
    found = picture_causes(policy, trained, views) + frozen_causes(seen, requests)
    found += word_causes(train, texts)
    labels = dimension_names(train.recipes[0], table.features)
    sent = recorded_answers(seen)
    states = robot.from_robot(seen.frames["proprio"]) if cfg.use_proprio else unused_states(sent)
    ways = []
    if states is not None and states.shape[1:] == table.frames["proprio"].shape[1:]:
        first, _, _ = train.stretches[0]
        start = seen.first_frames[seen.episode_of(np.arange(len(states)))]
        wrong, ways = state_causes(table.frames["proprio"][rows], states, labels[1],
                                   table.frames["proprio"][first], start)
        found += wrong if cfg.use_proprio else []
    if cfg.window_size == 1:
        own = []
        for start in tqdm(range(0, len(requests), BATCH), "answers", leave=False, disable=None):
            part = requests[start : start + BATCH]
            own.append(policy.predict_action(
                views[start : start + BATCH], [texts[row] for row in part], name,
                seen.frames["proprio"][part] if cfg.use_proprio else None))
        own = np.concatenate(own).reshape(len(requests), -1, len(robot.action))[:, 0]
        free = sent["prefix"][requests] == 0 if sent else slice(None)  # others were given
        found += answer_causes(own[free], seen.frames["action"][requests][free], robot.action)
    if sent is None:
        return found
    if (other := sent["unnorm_key"] != name).mean() > 0.5:
        key = str(sent["unnorm_key"][other.argmax()])
        found.append(Cause(0.95, "statistics", f"the requests name the statistics of another "
                           f"dataset: unnorm_key {key!r}, not {name!r}",
                           f"send unnorm_key {name!r}, or examine with --data_mix {key}"))
    answers = robot.actions_from_robot(sent["chunk"].astype(np.float64))
    episode = seen.episode_of(np.arange(len(answers)))
    clock = frames_by_clock(sent["time"], episode, recording_of(table).get("fps", 0))
    played = [Played(way(states), answers, episode, clock) for way in ways]
    return found + action_causes(table, played, labels[0])


def recorded_answers(seen: FrameTable) -> dict[str, np.ndarray] | None:
    """{"chunk", "prefix", ...: of each request}, which the frame table does not hold. None if
    another program has recorded them."""
    features = step_features(seen.directory)
    names = ("chunk", "prefix", "time", "unnorm_key", "unused_state")
    if not features.keys() >= {*names}:
        return None
    found = {name: [] for name in names}
    for shard in seen.shards:
        for offset, data in read_records(seen.directory / shard):
            steps = Steps(data, offset, features)
            for name in names:
                found[name].extend(steps[name])
    found["unnorm_key"] = [key.decode() for key in found["unnorm_key"]]
    return {name: np.array(values) for name, values in found.items()}


def unused_states(sent: dict[str, np.ndarray] | None) -> np.ndarray | None:
    """(R, P): the states that the robot sends to a model that takes none."""
    states = [json.loads(text) for text in sent["unused_state"]] if sent else [()]
    return np.array(states) if {*map(len, states)} == {len(states[0])} else None


# ---- Pictures ------------------------------------------------------------------------------------


def compress(image: np.ndarray, quality: int) -> np.ndarray:
    return decode_native(encode(image, "jpeg", quality=quality))


def coarsen(image: np.ndarray, times: int) -> np.ndarray:
    """Of a low resolution, scaled up again."""
    small = Image.fromarray(image).reduce(times)
    return np.array(small.resize(image.shape[1::-1], Image.Resampling.BILINEAR))


def middle(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Without a part of the height and of the width at each side: a `rows`th, a `columns`th."""
    top, left = len(image) // rows, image.shape[1] // columns
    return image[top : len(image) - top, left : image.shape[1] - left]


SWAP = "swap the cameras in the request"
CHANGES: dict[str, tuple[Callable, str]] = {  # {fault: (of one picture, the cure)}
    "upside down": (np.flipud, "turn it before sending: image[::-1]"),
    "mirrored": (np.fliplr, "mirror it before sending: image[:, ::-1]"),
    "turned by 180 degrees": (lambda x: x[::-1, ::-1], "turn it: image[::-1, ::-1]"),
    "turned by 90 degrees": (np.rot90, "turn it: numpy.rot90(image, -1)"),
    "turned by -90 degrees": (lambda x: np.rot90(x, -1), "turn it: numpy.rot90(image)"),
    "red and blue swapped": (lambda x: x[..., ::-1], "send RGB, not BGR: image[..., ::-1]"),
    "black": (np.zeros_like, "check the camera: its picture is black"),
    "gray": (lambda x: x.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8), "send colors"),
    "cropped": (lambda x: middle(x, 8, 8), "send the complete picture"),
    "cropped a little": (lambda x: middle(x, 20, 20), "send the complete picture"),
    "cropped at the sides: another aspect ratio": (lambda x: middle(x, 9999, 8),
                                                   "send the picture in its recorded shape"),
    "cropped above and below: another aspect ratio": (lambda x: middle(x, 8, 9999),
                                                      "send the picture in its recorded shape"),
    "padded": (lambda x: np.pad(x, (2 * [len(x) // 6], (0, 0), (0, 0))),
               "send the picture without bars"),  # as a wide one that was made square
    "dark": (lambda x: (x * 0.4).astype(np.uint8), "check exposure and light"),
    "too bright": (lambda x: (x * 1.8).clip(0, 255).astype(np.uint8), "check exposure and light"),
}

TEXTURES = {f"much compressed: JPEG of quality {quality} or so": (
    lambda x, quality=quality: compress(x, quality), "send PNG, or JPEG of quality 95")
    for quality in (5, 10, 20, 40)}
TEXTURES |= {f"of low resolution, {times} times as coarse, or blurred": (
    lambda x, times=times: coarsen(x, times), "send the picture at the recording's resolution; "
    "focus the camera") for times in (2, 3, 4, 6)}


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


def texture(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(5,) of a picture, at the size `shape`: how visible the edges of JPEG's blocks of 8 pixels
    are, and how much detail there is at four scales, both as logarithms."""
    own = Image.fromarray(np.ascontiguousarray(image)).convert("L")
    own = own.resize(shape[1::-1], Image.Resampling.BILINEAR)
    steps = np.abs(np.diff(np.array(own, np.float64), axis=1)).mean(0)
    found = [steps[7::8].mean() / (np.delete(steps, slice(7, None, 8)).mean() + 0.1)]
    for _ in range(4):
        coarse = own.reduce(2)
        again = coarse.resize(own.size, Image.Resampling.BILINEAR)
        found.append(np.abs(np.array(own, np.float64) - np.array(again)).mean())
        own = coarse
    return np.log(np.array(found) + 0.1)


def texture_cause(trained: list, seen: list) -> tuple[float, str] | None:
    """The change of TEXTURES that makes training's pictures of a camera as coarse as the seen."""
    shape = trained[0].shape
    theirs = np.mean([texture(image, shape) for image in seen], axis=0)
    ours = np.array([texture(image, shape) for image in trained])
    spread = ours.std(0) + 0.05

    def distance(own: np.ndarray) -> float:
        return float((((own.mean(0) - theirs) / spread) ** 2).mean() ** 0.5)

    away = {name: distance(np.array([texture(change(image), shape) for image in trained]))
            for name, (change, _) in TEXTURES.items()}
    best = min(away, key=away.__getitem__)
    plain = distance(ours)
    return (1 - away[best] / plain, best) if plain > 1.5 and away[best] < plain / 2 else None


def picture_causes(policy: Policy, trained: list, seen: list) -> list[Cause]:
    """Pictures that training did not see so. trained, seen: native pictures, [frame][camera]."""
    cameras = policy.cfg.cameras
    ours = features_of(policy, trained)
    theirs = features_of(policy, seen)
    changed = {name: features_of(policy, trained, CHANGES[name][0])
               for name in tqdm(CHANGES, "pictures", leave=False, disable=None)}
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
        coarse = texture_cause([frame[place] for frame in trained[::3]],
                               [frame[place] for frame in seen[::3]])
        _, cure = CHANGES.get(best, (None, SWAP))
        if evidence > ENOUGH and plain > 1.5 * usual:
            text = (f"{best}: training's pictures, changed this way, are "
                    f"{1 / max(1 - evidence, 1e-3):.1f} times as close to the robot's")
        elif coarse:
            evidence, best = coarse
            _, cure = TEXTURES[best]
            text = (f"{best}: training's pictures, changed this way, are "
                    f"{1 / (1 - evidence):.1f} times as close to the robot's in detail")
            evidence *= 0.8
        elif plain > 4 * usual:
            text = (f"unlike training's: {plain / usual:.1f} times as far from them as they are "
                    "from each other, and no known change explains it")
            cure = "compare the two pictures"
            evidence = ENOUGH
        else:
            continue
        sides = (("acting sees", seen[0][place]), ("training saw", trained[0][place]))
        found.append(Cause(evidence, "pictures", f"the picture of {camera} is {text}", cure, sides))
    swapped = [cause for cause in found if cause.cure == SWAP]
    swapped.sort(key=lambda cause: cause.evidence)  # one fault: the clearest line is enough
    return [cause for cause in found if cause not in swapped[:-1]]


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


def word_causes(train: Mixture, seen: list[str]) -> list[Cause]:
    """Instructions that training did not contain. seen: one of each request."""
    table = train.tables[0]
    first, _, _ = train.stretches[0]
    used = {table.instructions[number] for number in table.frames["instruction"][first]}
    known = {text.lower(): text for text in used}  # prompts are in lower case
    strange = [text for text in seen if text.lower() not in known]
    if not strange:
        return []
    text = max(set(strange), key=strange.count)
    [close] = difflib.get_close_matches(text.lower(), known, n=1, cutoff=0)
    share = len(strange) / len(seen)
    held_out = text.lower() in {other.lower() for other in table.instructions}
    where = "only in episodes that were not trained on" if held_out else "not in the training data"
    return [Cause(0.5 + share / 2, "training" if held_out else "words",
                  f"the instruction {text!r} of {share:.0%} of the requests is {where}, so the "
                  f"task may never have been trained; the most similar is {known[close]!r}",
                  f"send {known[close]!r}, or train on this task and these words, too")]


# ---- Numbers -------------------------------------------------------------------------------------

def answer_causes(own: np.ndarray, given: np.ndarray, names: list[str]) -> list[Cause]:
    """Answers (S, A) of this policy to the seen requests, and those that were given."""
    span = np.ptp(own, axis=0)
    same = (np.abs(own - given) < 0.02 * span + 1e-6).mean(0)
    moves = span > 1e-6  # in others, only the values themselves can be compared
    ours = own - np.where(moves, own.mean(0), 0)
    theirs = given - np.where(moves, given.mean(0), 0)
    slope = (ours * theirs).sum(0) / np.maximum((ours**2).sum(0), 1e-12)
    explained = np.abs(theirs - slope * ours).mean(0) < 0.1 * np.abs(theirs).mean(0) + 1e-9
    found: dict[tuple[str, str], list[int]] = {}  # one cause for all with the same fault
    for dim in np.flatnonzero(same < 0.8):
        what = "are those of another model"
        cure = "serve this checkpoint"
        if explained[dim] and abs(slope[dim] + 1) < 0.05:
            what = "have the other sign"
            cure = "do not turn the answer round"
        elif explained[dim]:
            what = f"are {slope[dim]:.3g} times this policy's"
            cure = "act with the statistics of the training's dataset (unnorm_key)"
        found.setdefault((what, cure), []).append(dim)
    return [Cause(1 - float(same[dims].min()), "answers",
                  f"the answers {', '.join(np.array(names)[dims])} {what}", cure)
            for (what, cure), dims in found.items()]
