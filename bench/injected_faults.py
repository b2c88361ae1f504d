"""Does doctor.py name why a policy fails? Inject one fault at a time, and look for it in its list.

    python bench/injected_faults.py --policies runs/faults --out /tmp/faults                   everything
    python bench/injected_faults.py --policies runs/faults --out /tmp/faults --only bgr black  some of it

Each fault belongs to a sound policy: the demo's, in Meta-World, or that of examples/own_robot's arm.
The loop is closed: the simulator is seen by a client with the fault, the policy answers its requests
as serve_vla.py does, and machinery.record.Recorder records them. Then doctor.py examines the policy
and the requests, and a row tells the rank of the right cause in its list, and the first line of it.
A cause is right if its kind and its text are as FAULTS expects them.

Read Client, the sound client, and FAULTS: what each of them changes in it, in the policy that
answers (`serve`), or in the run that is examined (`run`). Both simulators are needed:

    pip install -r examples/metaworld/requirements.txt
"""

import argparse
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / "examples" / name) for name in ("own_robot", "metaworld"))]

import numpy as np
from PIL import Image

REQUESTS, EPISODES = 120, 6  # recorded, at least
STEPS = 40  # of an episode, at most
FIRST_SEED = 300_000  # no recorded episode has these seeds
PAUSE = 15 * 10**9  # nanoseconds between episodes


# ---- Robots --------------------------------------------------------------------------------------


class MetaWorld:
    """The demo's six tasks, or others."""

    cameras, quality, period, over_at_success = {"primary": "image"}, 75, 3 / 80, True

    def __init__(self, tasks: str = "demo"):
        from simulator import INSTRUCTIONS, task_names

        self.tasks, self.words, self.made = task_names([tasks]), INSTRUCTIONS, {}

    def reset(self, seed: int) -> None:
        from simulator import Simulator

        task = self.tasks[seed % len(self.tasks)]
        if task not in self.made:
            self.made[task] = Simulator(task, ["image"], 96, self.quality, action_repeat=3)
        self.simulator, self.instruction = self.made[task], self.words[task]
        self.simulator.reset(seed)

    def look(self) -> dict:
        images = {}
        self.simulator.draw("image", self.simulator.sheet, lambda pixels: images.update(image=pixels))
        self.simulator.sheet.read()
        return {"images": images, "state": self.simulator.state[:4].astype(np.float32)}

    def move(self, action: np.ndarray) -> None:
        self.simulator.step(action)

    @property
    def solved(self) -> bool:
        return self.simulator.success_at is not None


def arm(cameras: dict[str, str]):
    """The arm of examples/own_robot, seen by these cameras: {the model's: the robot's}."""
    from robot import Arm

    robot = Arm()
    robot.cameras = tuple(cameras.values())
    robot.__dict__.update(quality=95, period=0.1, over_at_success=False)
    return robot


# ---- A sound client ------------------------------------------------------------------------------


@dataclass
class Client:
    """Between a robot and a policy. Each fault replaces some of these.

    see: {camera: image} and a dict that is empty at an episode's begin -> what is sent instead
    say: the instruction; feel: the state, and such a dict; do: an answer (steps, A), and the state
    """

    see: Callable = lambda images, memory: images
    say: Callable = lambda text: text
    feel: Callable = lambda state, memory: state
    do: Callable = lambda answer, state: answer
    quality: int | None = None  # of JPEG; None: as the robot's recording
    execute: int | None = None  # steps of an answer; None: all
    hold: int = 1  # periods that a step lasts
    delay: int = 0  # periods from the picture and the state to the request
    serve: Callable = lambda policy: policy
    key: str | None = None  # unnorm_key
    tasks: str = "demo"


def both(first: Client, second: Client) -> Client:
    """A client with two faults."""
    made = replace(first)
    for name, default in vars(Client()).items():
        ours, theirs = getattr(first, name), getattr(second, name)
        if getattr(theirs, "__code__", theirs) == getattr(default, "__code__", default):
            continue
        if not callable(theirs):
            setattr(made, name, theirs)
        elif name in ("say", "serve"):
            setattr(made, name, lambda x, a=ours, b=theirs: b(a(x)))
        else:
            setattr(made, name, lambda x, more, a=ours, b=theirs: b(a(x, more), more))
    return made


def encoded(image: np.ndarray, quality: int) -> str:
    file = io.BytesIO()
    subsampling = 0 if quality >= 90 else 2  # as the recordings
    Image.fromarray(np.ascontiguousarray(image)).save(file, "jpeg", quality=quality, subsampling=subsampling)
    return base64.b64encode(file.getvalue()).decode()


def play(policy, robot, cameras: dict[str, str], client: Client, folder: Path) -> tuple[int, int]:
    """Record requests in a folder -> (episodes, those that succeeded)."""
    from machinery import record
    from machinery.wire import parse

    now = SimpleNamespace(ns=10**18)  # the robot's time, not this computer's
    record.time = SimpleNamespace(time_ns=lambda: now.ns)
    recorder = record.Recorder(folder, record.recording_facts(policy, "policy"))
    policy = client.serve(policy)
    requests = episode = successes = 0
    while requests < REQUESTS or episode < EPISODES:
        robot.reset(FIRST_SEED + episode)
        memory, step, solved = {}, 0, []
        past = deque([robot.look()], client.delay + 1)
        while step < STEPS and not (robot.over_at_success and robot.solved):
            old = past[0]
            images = client.see({name: old["images"][key] for name, key in cameras.items()}, memory)
            sent = {"images": {name: encoded(image, client.quality or robot.quality)
                               for name, image in images.items()},
                    "instruction": client.say(robot.instruction), "unnorm_key": client.key, "episode": episode,
                    "state": client.feel(old["state"], memory).tolist()}
            query = parse(sent, policy)
            answer = policy.predict_action(query.views, query.instruction, query.unnorm_key, query.proprio)
            while recorder.waiting.qsize() > 32:
                time.sleep(0.01)
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
            past.append(robot.look())
        episode += 1
        successes += any(solved) if robot.over_at_success else all(solved[-8:])
        now.ns += PAUSE
    recorder.close()
    return episode, successes


# ---- Faults --------------------------------------------------------------------------------------


@dataclass
class Fault:
    kinds: str  # the right cause's kind, a regular expression
    words: str  # what its text or cure must contain, one too
    client: Client = field(default_factory=Client)
    policy: str = "demo"


def each(change: Callable, *only: str) -> Callable:
    """Client.see that changes the picture of each camera, or only of these."""
    return lambda images, memory: {name: change(image) if not only or name in only else image
                                   for name, image in images.items()}


def freeze(*only: str) -> Callable:
    """Client.see that shows the first picture of the episode."""
    return lambda images, memory: images | {name: memory.setdefault(name, image) for name, image
                                            in images.items() if not only or name in only}


def small(image: np.ndarray, side: int) -> np.ndarray:
    """A picture of low resolution, scaled up again."""
    return np.array(Image.fromarray(image).resize((side, side)).resize(image.shape[1::-1]))


def middle(image: np.ndarray, share: float) -> np.ndarray:
    """The middle of a picture."""
    cut = round(len(image) * (1 - share) / 2)
    return image[cut:-cut, cut:-cut]


def gripper(change: Callable) -> Callable:
    """Client.do that changes the last number of each step."""
    return lambda answer, state: np.hstack([answer[:, :-1], change(answer[:, -1:])])


def toward(answer: np.ndarray, state: np.ndarray) -> np.ndarray:
    """A client that takes changes for positions to go to."""
    return np.hstack([np.clip((answer[:, :3] - state[:3]) * 10, -1, 1), answer[:, 3:]])


FAULTS = {
    # pictures
    "upside down": Fault("pictures", "upside down", Client(see=each(np.flipud))),
    "turned by 180": Fault("pictures", "180", Client(see=each(lambda x: x[::-1, ::-1]))),
    "bgr": Fault("pictures", "bgr|red and blue", Client(see=each(lambda x: x[..., ::-1]))),
    "black": Fault("pictures", "black", Client(see=each(np.zeros_like))),
    "frozen camera": Fault("pictures", "frozen|same", Client(see=freeze())),
    "crop": Fault("pictures", "crop|complete", Client(see=each(lambda x: middle(x, 0.75)))),
    "low-quality jpeg": Fault("pictures", "compress|jpeg", Client(quality=8)),
    "low resolution": Fault("pictures", "resolution|blur|sharp", Client(see=each(lambda x: small(x, 24)))),
    # words
    "paraphrase": Fault("words", "not in the training", Client(say=lambda text: f"please {text.lower()} now")),
    "another language": Fault("words", "not in the training", Client(say=lambda text: {
        "Press a button from the top": "从上方按下按钮", "Push a button on the coffee machine": "按下咖啡机的按钮",
        "Push and close a drawer": "推上抽屉", "Slide a plate into a cabinet": "把盘子滑进柜子",
        "Reach a goal position": "到达目标位置", "Push and close a window": "把窗户关上"}[text])),
    # actions, after the answer
    "gripper sign": Fault("actions|execution", "gripper", Client(do=gripper(lambda x: -x))),
    "delta as absolute": Fault("actions|execution", "absolute|target|position|change|delta", Client(do=toward)),
    "columns exchanged": Fault("actions|execution", "exchanged|swapped|order",
                               Client(do=lambda answer, state: answer[:, [1, 0, 2, 3]])),
    "half the rate": Fault("actions|execution", "rate|slow|fast|long|frequency", Client(hold=2)),
    "delay": Fault("actions|execution|pictures", "late|delay|old|behind", Client(delay=3)),
    # training
    "task never trained": Fault("words|training", "not in the training|never",
                                Client(tasks="door-open-v3")),
}

PAIRS = [("bgr", "paraphrase")]


# ---- Policies ------------------------------------------------------------------------------------

ONE, TWO = {"primary": "outside"}, {"primary": "outside", "wrist": "wrist"}
POLICIES = {  # {name: (cameras, robot)}
    "demo": (MetaWorld.cameras, MetaWorld),
}


def open_run(path: Path):
    from act import load_vla

    return load_vla(path)


# ---- Examining -----------------------------------------------------------------------------------


def doctor(run: Path, seen: Path | None, out: Path) -> tuple[list[re.Match], str, float]:
    """Examine a policy as a user does -> its causes, all that it printed, seconds."""
    command = [sys.executable, ROOT / "doctor.py", run, "--out", out, *(["--seen", seen] if seen else [])]
    start = time.perf_counter()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    found = [*re.finditer(r"^cause (?P<kind>\S+) evidence (?P<evidence>\S+) (?P<text>.*)", done.stdout, re.M)]
    if done.returncode or "\ncauses " not in done.stdout:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return found, done.stdout, seconds


def rank(found: list[re.Match], fault: Fault) -> int | None:
    """The place of the right cause, from 1."""
    for place, cause in enumerate(found, 1):
        if re.fullmatch(fault.kinds, cause["kind"]) and re.search(fault.words, cause["text"], re.I):
            return place
    return None


class Protocol:
    """Plays and examines; recordings in `out` are used again."""

    def __init__(self, policies: Path, out: Path):
        self.policies, self.out, self.robots = policies, out, {}

    def examine(self, name: str, policy: str, client: Client) -> tuple[list[re.Match], str, float]:
        """The doctor's list for a client with a fault."""
        run = self.policies / policy
        folder = self.out / re.sub(r"\W+", "-", f"{policy} {name}")
        seen = folder / "seen"
        if not (folder / "played.json").exists():
            cameras, robot = POLICIES[policy]
            place = policy, client.tasks
            if place not in self.robots:
                self.robots[place] = robot(client.tasks) if robot is MetaWorld else arm(cameras)
            episodes, successes = play(open_run(run), self.robots[place], cameras, client, seen)
            (folder / "played.json").write_text(json.dumps({"episodes": episodes, "successes": successes}))
        found, printed, seconds = doctor(run, seen, folder / "report.html")
        (folder / "doctor.txt").write_text(printed)
        return found, json.loads((folder / "played.json").read_text()), seconds


def main() -> None:
    """Print a row for each fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policies", type=Path, required=True, help="their runs")
    parser.add_argument("--out", type=Path, required=True, help="recordings, which are used again, and reports")
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="default: all of them")
    args = parser.parse_args()
    protocol = Protocol(args.policies, args.out)
    print("fault | policy | successes | rank of the right cause | first line | seconds", flush=True)
    for name, fault in FAULTS.items():
        if args.only and name not in args.only:
            continue
        found, played, seconds = protocol.examine(name, fault.policy, fault.client)
        first = found[0][0] if found else "no cause"
        print(f"{name} | {fault.policy} | {played['successes']}/{played['episodes']} | "
              f"{rank(found, fault) or '-'} | {first[:150]} | {seconds:.0f}", flush=True)
    for policy in dict.fromkeys(fault.policy for fault in FAULTS.values()):
        if args.only and "sound" not in args.only:
            continue
        found, played, seconds = protocol.examine("sound", policy, Client())
        print(f"sound | {policy} | {played['successes']}/{played['episodes']} | causes {len(found)} | "
              f"{found[0][0][:150] if found else ''} | {seconds:.0f}", flush=True)


if __name__ == "__main__":
    main()
