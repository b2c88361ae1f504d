"""Does doctor.py name why a policy fails? Inject one fault at a time, and look for it in its list.

    python bench/injected_faults.py --policies runs/faults --out /tmp/faults                   everything
    python bench/injected_faults.py --policies runs/faults --out /tmp/faults --only bgr sound  some of it

Each fault belongs to a sound policy: the demo's, in Meta-World, or one of examples/own_robot's arm. A client
with the fault sees the simulator, asks the policy as serve_vla.py is asked, and does what it answers, while
machinery.record.Recorder records the requests. Then doctor.py examines the policy and the requests. A row
tells the rank of the right cause, whose kind and text are as FAULTS expects them, and the first line. Then come
pairs of faults: are both within the first four? And sound policies, of which nothing may be found, and a
weak one: only its training may be blamed.

Read Client, and FAULTS: what each changes in it, in the policy that answers (`serve`), in the run that
answers and is examined (`run`), or in its training (RUNS of faulty_policies.py). Missing policies are trained, but
`demo` is a link to the demo's run. Both simulators are needed, unless all recordings are in --out
(requirements.txt in examples/metaworld).
"""

import argparse
import base64
import contextlib
import functools
import io
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / "examples" / name) for name in ("own_robot", "metaworld"))]

import numpy as np
from faulty_policies import (
    RUNS,
    causal,
    doubled,
    of_its_base,
    rescaled,
    reweigh,
    train,
    with_another_dataset,
)
from PIL import Image

REQUESTS, EPISODES = 120, 6  # recorded, at least
FIRST_SEED = 300_000  # no recorded episode has these seeds
PAUSE = 15 * 10**9  # nanoseconds between episodes


# ---- Robots --------------------------------------------------------------------------------------


class MetaWorld:
    """The demo's six tasks, or others."""

    quality, period, steps, ends = 75, 3 / 80, 25, True  # of JPEG; seconds; at most; at success

    def __init__(self, tasks: str):
        from simulator import INSTRUCTIONS, task_names

        self.tasks, self.words, self.made = task_names([tasks]), INSTRUCTIONS, {}

    def reset(self, seed: int) -> None:
        from simulator import Simulator

        task = self.tasks[seed % len(self.tasks)]
        if task not in self.made:
            self.made[task] = Simulator(task, ["image"], 96, self.quality, action_repeat=3)
        self.simulator, self.instruction = self.made[task], self.words[task]
        self.simulator.reset(seed)
        self.move = self.simulator.step

    def look(self) -> dict:
        images = {}
        self.simulator.draw("image", self.simulator.sheet, lambda pixels: images.update(image=pixels))
        self.simulator.sheet.read()
        return {"images": images, "state": self.simulator.state[:4].astype(np.float32)}

    @property
    def solved(self) -> bool:
        return self.simulator.success_at is not None


@functools.cache
def robot_of(policy: str, tasks: str):
    """A simulator, with the facts of its recordings."""
    if policy not in RUNS:
        return MetaWorld(tasks)
    from robot import Arm

    robot = Arm()
    robot.__dict__.update(cameras=tuple(RUNS[policy].cameras.values()), quality=95, period=0.1, steps=40, ends=False)
    return robot


# ---- A client ------------------------------------------------------------------------------------


@dataclass
class Client:
    """What is between a robot and a policy. A fault replaces some of it.

    see, say, feel: {camera: image}, the instruction, the state -> what is sent, with a dict that is empty when an
    episode begins. do: an answer (steps, A), and the state -> the actions that are executed
    """

    see: Callable = lambda images, memory: images
    say: Callable = lambda text, memory: text
    feel: Callable = lambda state, memory: state
    do: Callable = lambda answer, state: answer
    quality: int | None = None  # of JPEG; None: as the robot's recording
    execute: int | None = None  # steps of an answer; None: all
    hold: int = 1  # periods that an action lasts
    delay: int = 0  # periods from the picture and the state to the request
    key: str | None = None  # unnorm_key
    tasks: str = "demo"  # of Meta-World
    serve: Callable = lambda policy: policy  # what answers, if it is not the run that is examined
    run: Callable | None = None  # changes the run, of which it gets a copy


def both(first: dict, second: dict) -> dict:
    """The fields of a client with two faults."""
    return first | second | {name: lambda x, more, a=first[name], b=second[name]: b(a(x, more), more)
                             for name in first.keys() & second.keys()}


def encoded(image: np.ndarray, quality: int) -> str:
    file = io.BytesIO()
    subsampling = 0 if quality >= 90 else 2  # as the recordings
    Image.fromarray(np.ascontiguousarray(image)).save(file, "jpeg", quality=quality, subsampling=subsampling)
    return base64.b64encode(file.getvalue()).decode()


def play(policy, robot, cameras: dict[str, str], client: Client, folder: Path) -> str:
    """Record requests in a folder -> successes. cameras: {the model's: the robot's}."""
    from machinery import record
    from machinery.wire import describe, parse

    now = SimpleNamespace(ns=10**18)  # the robot's time, not this computer's
    record.time = SimpleNamespace(time_ns=lambda: now.ns)
    recorder = record.Recorder(folder, describe(policy, "policy"))
    policy = client.serve(policy)
    requests = episode = successes = 0
    while requests < REQUESTS or episode < EPISODES:
        robot.reset(FIRST_SEED + episode)
        memory, step, solved, past = {}, 0, [], deque([robot.look()], client.delay + 1)
        while step < robot.steps and not (robot.ends and robot.solved):
            images, state = past[0]["images"], past[0]["state"]
            images = client.see({name: images[key] for name, key in cameras.items()}, memory)
            images = {name: encoded(image, client.quality or robot.quality) for name, image in images.items()}
            query = parse({"images": images, "state": client.feel(state, memory).tolist(), "episode": episode,
                           "instruction": client.say(robot.instruction, memory), "unnorm_key": client.key}, policy)
            answer = policy.predict_action(query.views, query.instruction, query.unnorm_key, query.proprio)
            while recorder.waiting.qsize() > 32:
                time.sleep(0.01)  # it leaves out what it cannot keep up with
            recorder.add("robot", query, answer)
            requests += 1
            for action in client.do(np.atleast_2d(answer), past[-1]["state"])[: client.execute]:
                for _ in range(client.hold):
                    robot.move(action)
                    now.ns += round(robot.period * 1e9)
                    step += 1
                    solved.append(robot.solved)
                    if client.delay:
                        past.append(robot.look())
            if not client.delay:
                past.append(robot.look())
        episode += 1
        successes += any(solved) if robot.ends else all(solved[-8:])  # as rollout.py and drive.py
        now.ns += PAUSE
    recorder.close()
    return f"{successes} of {episode}"


# ---- Faults of the client ------------------------------------------------------------------------


@dataclass
class Fault:
    kinds: str  # the right cause's kind, a regular expression
    words: str  # what its text or cure must contain, one too
    changes: dict = field(default_factory=dict)  # fields of Client
    policy: str = "demo"

    def rank(self, found: list[re.Match]) -> int | None:
        """The place of the right cause, from 1."""
        places = (place for place, cause in enumerate(found, 1) if re.fullmatch(self.kinds, cause["kind"])
                  and re.search(self.words, cause["text"], re.I))
        return next(places, None)


def each(change: Callable, *only: str) -> dict:
    """The picture of each camera, or only of these, is changed."""
    return {"see": lambda images, memory: {name: change(image) if not only or name in only else image
                                           for name, image in images.items()}}


def freeze(*cameras: str) -> dict:
    return {"see": lambda images, memory: images | {name: memory.setdefault(name, images[name]) for name in cameras}}


def smaller(image: np.ndarray, side: int) -> np.ndarray:
    """A picture of low resolution, scaled up again."""
    return np.array(Image.fromarray(image).resize((side, side)).resize(image.shape[1::-1]))


def middle(image: np.ndarray) -> np.ndarray:
    cut = len(image) // 8
    return image[cut:-cut, cut:-cut]


def gripper(change: Callable) -> dict:
    return {"do": lambda answer, state: np.hstack([answer[:, :-1], change(answer[:, -1:])])}


def toward(answer: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Changes are taken for positions to go to."""
    return np.hstack([np.clip((answer[:, :3] - state[:3]) * 10, -1, 1), answer[:, 3:]])


def degrees(state: np.ndarray, memory: dict) -> np.ndarray:
    return np.append(np.rad2deg(state[:3]), state[3])


# ---- All faults ------------------------------------------------------------------------------------

CHINESE = {
    "Press a button from the top": "从上方按下按钮", "Push a button on the coffee machine": "按下咖啡机的按钮",
    "Push and close a drawer": "推上抽屉", "Slide a plate into a cabinet": "把盘子滑进柜子",
    "Reach a goal position": "到达目标位置", "Push and close a window": "把窗户关上"}
AFTER = "actions?|answers|execution|client|robot|timing|motion"  # kinds of causes after the answer
TOO_SLOW = "rate|slow|lasts|long|frequen"
LATE = r"\blate\b|delay|old\b|behind|earlier"
TURN = functools.partial(np.rot90, k=2)
FAULTS = {
    "upside down": Fault("pictures", "upside down", each(np.flipud)),
    "turned by 180": Fault("pictures", "180", each(TURN)),
    "bgr": Fault("pictures", "bgr|red and blue", each(lambda x: x[..., ::-1])),
    "black": Fault("pictures", "black", each(np.zeros_like)),
    "frozen camera": Fault("pictures", "frozen|same", freeze("primary")),
    "crop": Fault("pictures", "crop|complete", each(middle)),
    "low-quality jpeg": Fault("pictures", "compress|jpeg", {"quality": 8}),
    "low resolution": Fault("pictures", "resolution|blur|sharp|small", each(lambda x: smaller(x, 24))),
    "swapped cameras": Fault("pictures", "of wrist|of primary|swap", {
        "see": lambda images, memory: dict(zip(images, [*images.values()][::-1], strict=True))}, "arm2"),
    "black wrist": Fault("pictures", "wrist.*black", each(np.zeros_like, "wrist"), "arm2"),
    "wrist turned by 180": Fault("pictures", "wrist.*180", each(TURN, "wrist"), "arm2"),
    "frozen wrist": Fault("pictures", "wrist.*(frozen|same)", freeze("wrist"), "arm2"),

    "paraphrase": Fault("words", "not in the training", {"say": lambda text, _: f"please {text.lower()} now"}),
    "another language": Fault("words", "not in the training", {"say": lambda text, _: CHINESE[text]}),
    "task never trained": Fault("words|training", "not in the training|never", {"tasks": "door-open-v3"}),

    "degrees": Fault("state", "degrees", {"feel": degrees}, "arm2"),
    "order of states": Fault("state", "order", {"feel": lambda state, _: state[[1, 2, 0, 3]]}, "arm2"),
    "frozen state": Fault("state", "frozen", {"feel": lambda state, memory: memory.setdefault("", state)}, "arm2"),
    "offset of a state": Fault("state", "offset", {"feel": lambda state, _: state + np.eye(4)[1] * 0.8}, "arm2"),

    "another unnorm_key": Fault(f"statistics|{AFTER}", "unnorm_key|statistics", {
        "run": with_another_dataset, "key": "other_robot"}, "arm2"),
    "statistics of the run": Fault("statistics|model|answers|data", "statistics", {"run": rescaled}),
    "statistics of the server": Fault(f"statistics|{AFTER}", "statistics|times", {"serve": doubled}),

    "gripper sign": Fault(AFTER, r"gripper|action\[3\]", gripper(lambda x: -x)),
    "gripper sign of the arm": Fault(AFTER, "gripper", gripper(lambda x: 1 - x), "arm2"),
    "gripper range": Fault(AFTER, "gripper", gripper(lambda x: x / 10), "arm2"),
    "change as target": Fault(AFTER, "absolute|target|position", {"do": toward}),
    "target as change": Fault(AFTER, "absolute|target|position|change", {
        "do": lambda x, state: np.hstack([state[:3] + x[:, :3], x[:, 3:]])}, "arm2"),
    "columns exchanged": Fault(AFTER, "exchange|swap|order", {"do": lambda x, _: x[:, [1, 0, 2, 3]]}),
    "columns of the arm": Fault(AFTER, "exchange|swap|order", {"do": lambda x, _: x[:, [1, 0, 2, 3]]}, "arm2"),
    "chunk too long": Fault(AFTER, f"chunk|repeat|{TOO_SLOW}", {"do": lambda x, _: np.vstack([x, x])}, "arm2"),
    "chunk too short": Fault(AFTER, "chunk|steps|short|execute", {"execute": 1}, "arm2"),
    "half the rate": Fault(AFTER, TOO_SLOW, {"hold": 2}),
    "half the rate of the arm": Fault(AFTER, TOO_SLOW, {"hold": 2}, "arm2"),
    "delay": Fault(f"{AFTER}|pictures", LATE, {"delay": 3}),
    "delay of the arm": Fault(f"{AFTER}|pictures|state", LATE, {"delay": 4}, "arm2"),

    "random head": Fault("model", "weights|random|without any learning", reweigh(
        lambda name, x: "lm_head" in name and x.copy_(x[np.random.default_rng(0).permutation(len(x))]))),
    "base weights": Fault("model", "weights|base", {"run": of_its_base}, "arm1"),
    "adapter not merged": Fault("model", "weights|adapter|base", reweigh(
        lambda name, x: "lora_B" in name and x.zero_()), "arm1-lora"),
    "acted causally": Fault("answers|model", "another model|causal|one by one|parallel", {"serve": causal}, "arm2"),
    "actions shifted": Fault(f"data|training|{AFTER}", r"shift|\blate\b|early|earlier|follow|behind", policy="arm2-shifted"),
    "shuffled texts": Fault("words|model|training|data", "instruction|text|words", policy="arm2-shuffled"),
    "few steps": Fault("model|training", "longer|steps|learning", policy="arm2-few-steps"),
    "few episodes": Fault("training|model|data", "memorized|episodes|overfit", policy="arm2-few-episodes"),
}
PAIRS = [("bgr", "paraphrase"), ("upside down", "gripper sign"), ("crop", "columns exchanged"),
         ("half the rate", "low-quality jpeg"), ("random head", "turned by 180"),
         ("swapped cameras", "degrees"), ("black wrist", "offset of a state"),
         ("frozen wrist", "gripper sign of the arm"), ("order of states", "target as change"),
         ("wrist turned by 180", "chunk too long")]
SOUND = ["demo", "arm2", "arm1", "arm1-lora", "weak"]  # weak: the demo, at the first of its checkpoints


# ---- Recording and examining ---------------------------------------------------------------------


def record(policies: Path, out: Path, name: str, policy: str, changes: dict) -> tuple[Path, Path]:
    """Play with a client that has these changes, unless that was done -> the run that is to be examined, and the
    folder of what belongs to this row."""
    folder = out / re.sub(r"\W+", "-", f"{policy} {name}")
    client = Client(**changes)
    run = train(policies, policy) if policy in RUNS else policies / policy
    if policy == "weak":
        run = min((policies / "demo").glob("checkpoints/*"))
    if client.run:
        sound, run = run, folder / "run"
    if not (folder / "played.txt").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if client.run:
            shutil.copytree(sound, run, ignore=shutil.ignore_patterns("checkpoints"))
            last = max(sound.glob("checkpoints/*"))
            shutil.copytree(last, run / "checkpoints" / last.name)
            client.run(run)
        cameras = RUNS[policy].cameras if policy in RUNS else {"primary": "image"}
        from act import load_vla

        successes = play(load_vla(run), robot_of(policy, client.tasks), cameras, client, folder / "seen")
        (folder / "played.txt").write_text(successes)
    return run, folder


def examine(run: Path, folder: Path, more: list[str]) -> tuple[list[re.Match], str]:
    """Call doctor.py as users do -> its causes, and the row's columns but one."""
    import doctor

    sys.argv = ["doctor.py", str(run), "--seen", str(folder / "seen"), "--out", str(folder / "report.html"), *more]
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            doctor.main()
        except Exception as error:  # a row of the table, too
            print(f"the doctor failed: {error!r}")
    seconds = time.perf_counter() - start
    (folder / "doctor.txt").write_text(printed.getvalue())
    found = [*re.finditer(r"^cause (?P<kind>\S+) evidence (?P<evidence>\S+) (?P<text>.*)", printed.getvalue(), re.M)]
    first = found[0][0][:200] if found else re.search("(causes|the doctor failed).*", printed.getvalue())[0]
    return found, f"{(folder / 'played.txt').read_text()} | {{}} | {first} | {seconds:.0f}"


def main() -> None:
    """Print a row for each fault, pair, and sound policy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policies", type=Path, required=True, help="their runs")
    parser.add_argument("--out", type=Path, required=True, help="recordings, which are used again, and reports")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of rows, or faults, pairs, sound")
    parser.add_argument("--record", action="store_true", help="only record, for doctor.py to be called elsewhere")
    args = parser.parse_args()
    rows = [(name, [fault], fault.policy, fault.changes) for name, fault in FAULTS.items()]
    for pair in PAIRS:
        one, two = faults = [FAULTS[name] for name in pair]
        rows.append((" + ".join(pair), faults, one.policy, both(one.changes, two.changes)))
    rows += [(f"sound {policy}", [], policy, {}) for policy in SOUND]
    groups = "sound", "faults", "pairs"  # by the number of a row's faults
    places = {group: [] for group in groups}
    print("fault | policy | successes | rank of the right cause | first line | seconds", flush=True)
    for name, faults, policy, changes in rows:
        group = groups[len(faults)]
        if args.only and not {name, group} & {*args.only}:
            continue
        run, folder = record(args.policies.resolve(), args.out, name, policy, changes)
        if args.record:
            continue
        found, row = examine(run, folder, ["--data_mix", "my_robot"] if "key" in changes else [])
        ranks = [fault.rank(found) or np.inf for fault in faults]
        places[group].append(max(ranks, default=len(found)))
        print(f"{name} | {policy} | {row.format(ranks or f'causes {len(found)}')}", flush=True)
    faults, pairs, sound = (np.array(places[group]) for group in ("faults", "pairs", "sound"))
    print(f"faults {len(faults)} first {(faults == 1).sum()} within_three {(faults <= 3).sum()} "
          f"pairs {len(pairs)} both_within_four {(pairs <= 4).sum()} sound {len(sound)} silent {(sound == 0).sum()}")


if __name__ == "__main__":
    main()
