"""Let a trained policy act in LIBERO and count its successes by OpenVLA's rules.

    python examples/libero/rollout.py --checkpoint openvla/openvla-7b-finetuned-libero-spatial \
        --suite libero_spatial --trials 50
    python examples/libero/rollout.py --server http://127.0.0.1:8000 --suite libero_object

Each process steps one simulator through one episode after another (play). The main process queries
the policy for all that wait (run), or the server does. Each finished episode is a line of
OUT/episodes.jsonl, and an interrupted command continues where it stopped. At the end it draws a
table, a bar chart, and a film.

protocol.py defines the treatment of images and actions. Each point is an option and appears in the
output. On a CPU each episode's result depends only on the checkpoint, the task, the start state,
and the seed, because the policy gets one image at a time.
"""

import argparse
import base64
import contextlib
import dataclasses
import io
import json
import os
import sys
import urllib.error
import urllib.request
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for each simulator; there is one per core
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.config import UserError, exit_with_one_line  # first: it names a missing package

# isort: split

import numpy as np
from PIL import Image
from protocol import MAX_STEPS, PACKAGES, Protocol, command, see, settle
from tqdm import tqdm

from examples import closed_loop
from machinery.convention import STANDARD
from machinery.host import cores

# --------------------------------------------------------------------------------------------------
# Simulators


def play(connection: Connection, suite: str, protocol: Protocol, cameras: list[str], size: int,
         out: Path) -> None:
    """A process that plays one episode after another, of any task.

    It receives (task, trial, seed). Then it sends ("see", [views], state, instruction) and receives
    the next actions (n, 7) until the episode is over: ("done", {task, seed, trial, success,
    steps}).
    """
    from simulator import (  # imported here: the main process does not need OpenGL
        Simulator,
        instructions,
    )

    simulator = None
    while job := connection.recv():
        task, trial, seed = job
        if simulator is None or simulator.task != task:
            if simulator:
                simulator.close()
            simulator = Simulator(suite, task, protocol.image_size)
        simulator.begin(trial, seed)
        settle(simulator, protocol)
        film, steps = [], 0
        while not simulator.solved and steps < protocol.max_steps:
            seen = simulator.look()
            views = [see(seen[camera], protocol, size) for camera in cameras]
            film.append(Image.fromarray(views[0]).resize((closed_loop.SIDE, closed_loop.SIDE)))
            connection.send(("see", views, seen["state"], instructions(suite)[task]))
            actions = connection.recv()[: protocol.max_steps - steps]
            for left, action in zip(reversed(range(len(actions))), actions, strict=True):
                simulator.step(command(action, protocol), look=left == 0)
                steps += 1
                if simulator.solved:
                    break
        if trial == 0:
            film_path(out, task, seed).write_bytes(closed_loop.encode_film(film))
        connection.send(("done", {"task": task, "seed": seed, "trial": trial,
                                  "success": bool(simulator.solved), "steps": steps}))
    if simulator:
        simulator.close()


def film_path(out: Path, task: int, seed: int) -> Path:
    """The path of the film of a task's first trial."""
    return out / f"film-{task}-{seed}.webp"


def run(player, suite: str, protocol: Protocol, jobs: list[tuple[int, int, int]], workers: int,
        out: Path) -> None:
    """Play each (task, trial, seed), and append its result to OUT/episodes.jsonl."""
    context, processes, playing = get_context("spawn"), [], {}  # {connection: its task}
    left = {task: deque(job for job in jobs if job[0] == task) for task, *_ in jobs}

    def begin(connection: Connection, task: int | None) -> None:
        """Start the next episode, of the same task if any are left: building another scene takes
        seconds."""
        if not left.get(task):
            task = max(left, key=lambda task: len(left[task]), default=None)
        if task is None or not left[task]:
            playing.pop(connection, None)
            return connection.send(None)
        playing[connection] = task
        connection.send(left[task].popleft())

    for _ in range(min(workers, len(jobs))):
        connection, end = context.Pipe()
        arguments = (end, suite, protocol, player.cameras, player.size, out)
        processes.append(context.Process(target=play, args=arguments, daemon=True))
        processes[-1].start()
        end.close()  # so that a dead process shows up as the end of its messages
        begin(connection, None)
    with (open(out / "episodes.jsonl", "a") as log,
          tqdm(total=len(jobs), desc="roll out", unit="episode") as bar):
        while playing:
            asking, questions = [], []
            for connection in wait([*playing]):
                try:
                    kind, *message = connection.recv()
                except EOFError:
                    raise RuntimeError("a simulator process died; its output is above") from None
                if kind == "see":
                    asking.append(connection)
                    questions.append(message)
                    continue
                print(json.dumps(message[0]), file=log, flush=True)
                bar.update()
                begin(connection, playing[connection])
            for connection, actions in zip(asking, player.act(questions) if asking else [], strict=True):
                connection.send(actions)
    for process in processes:
        process.join()


# --------------------------------------------------------------------------------------------------
# Policies


class Player:
    """A policy in this process. Its cameras and `size` define its inputs."""

    def __init__(self, checkpoint: str, device: str, unnorm_key: str | None, suite: str, execute: int | None,
                 in_8_bits: bool):
        """execute: actions of a predicted chunk to execute before the next look; default: all."""
        import torch

        from act import load_vla
        from machinery.frames import DataError, find_dataset

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.policy = load_vla(checkpoint, device, dtype, in_8_bits)
        cfg = self.policy.cfg
        self.key = statistics_key([*self.policy.norm_stats], unnorm_key, suite)
        self.recording = {}
        with contextlib.suppress(DataError, OSError):  # the dataset may be on another machine
            path = find_dataset(Path(cfg.data_root_dir), self.key) / "recording.json"
            self.recording = json.loads(path.read_text())
        if cfg.window_size > 1:
            raise UserError(f"{checkpoint} looks at {cfg.window_size} frames; this example shows one")
        self.one_at_a_time = device == "cpu"
        self.cameras, self.size, self.execute = cfg.cameras, cfg.image_size, execute or cfg.action_chunk
        robot = self.policy.convention(self.key)
        self.opens_at = int(robot.action[-1] == STANDARD[-1])
        # OpenVLA's own files do not record it; all it published for LIBERO was trained on random
        # crops
        self.center_crop = cfg.image_aug if "image_aug" in cfg.model_fields_set else True
        self.policy.cfg = cfg.model_copy(update={"image_aug": False})  # `see` has already cropped

    def act(self, questions: list[tuple]) -> list[np.ndarray]:
        """[views, state, instruction] of each -> its next actions (n, 7)."""
        if self.one_at_a_time and len(questions) > 1:
            return [action for question in questions for action in self.act([question])]
        views, states, texts = zip(*questions, strict=True)
        proprio = None
        if self.policy.cfg.use_proprio:
            width = len(self.policy.convention(self.key).state)
            proprio = np.stack([pad_state(state, width) for state in states])
        actions = self.policy.predict_action(views, texts, self.key, proprio)
        return [*actions.reshape(len(questions), -1, actions.shape[-1])[:, : self.execute]]


class Remote:
    """A policy behind a server (serve_vla.py, or one with the same replies), as a Player."""

    def __init__(self, url: str, unnorm_key: str | None, suite: str, execute: int | None, workers: int):
        """execute: as Player's. workers: the number of concurrent requests; the server batches
        those that wait."""
        self.url, self.threads = url.rstrip("/"), ThreadPoolExecutor(workers)
        self.recording = {}  # of an unknown dataset
        self.health = self.get("/health", None)
        self.key = statistics_key(self.health["unnorm_keys"], unnorm_key, suite)
        self.cameras, self.size = self.health["cameras"], 224
        self.execute = execute or self.health["action_shape"][0]
        self.opens_at = int(self.health["action"][self.key][-1] == STANDARD[-1])
        self.center_crop = False  # the server crops if its model needs it

    def get(self, path: str, request: dict | None):
        """The reply to a request. Raises UserError with the server's error message."""
        post = urllib.request.Request(self.url + path, request and json.dumps(request).encode())
        try:
            with urllib.request.urlopen(post, timeout=600) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise UserError(f"{self.url}{path}: {error.read().decode()[:500]}") from None
        except (urllib.error.URLError, ValueError) as error:
            raise UserError(f"{self.url}{path}: {error}: does serve_vla.py listen there?") from None

    def ask(self, views: list[np.ndarray], state: np.ndarray, instruction: str) -> np.ndarray:
        """One request."""
        request = {"images": [png(view) for view in views], "instruction": instruction,
                   "unnorm_key": self.key}
        if self.health["proprio"]:
            request["proprio"] = pad_state(state, len(self.health["state"][self.key])).tolist()
        actions = np.array(self.get("/act", request))
        return actions.reshape(-1, actions.shape[-1])[: self.execute]

    def act(self, questions: list[tuple]) -> list[np.ndarray]:
        """As Player.act."""
        return [*self.threads.map(lambda question: self.ask(*question), questions)]


def statistics_key(names: list[str], wanted: str | None, suite: str) -> str:
    """The dataset whose units to use: the requested one, or the suite's."""
    likely = [wanted] if wanted else [suite, f"{suite}_no_noops", *names[: len(names) == 1]]
    found = [name for name in likely if name in names]
    if not found:
        raise UserError(f"unnorm_key {wanted or suite!r} is none of the model's datasets: choose one of them "
                        f"with --unnorm_key: {', '.join(sorted(names))}")
    return found[0]


def pad_state(state: np.ndarray, width: int) -> np.ndarray:
    """(8,) as given by the simulator -> as recorded (8 numbers), or in OpenVLA's standard form,
    with a zero between the rotation and the fingers (9)."""
    return np.insert(state, 6, 0) if width == 9 else state


def png(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 as base64 of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


# --------------------------------------------------------------------------------------------------
# Numbers and pictures


def summarize(episodes: list[dict]) -> dict:
    """Episodes -> success over all, per task, and per seed if there are several."""
    def of(key: str) -> dict:
        found = {value: [e["success"] for e in episodes if e[key] == value]
                 for value in sorted({e[key] for e in episodes})}
        return {str(value): closed_loop.rate(outcomes) for value, outcomes in found.items()}

    seeds = of("seed")
    return {"success": closed_loop.rate([e["success"] for e in episodes]), "tasks": of("task"),
            **({"seeds": seeds} if len(seeds) > 1 else {})}


def table(summary: dict, texts: list[str], simulator: str) -> str:
    """The summary as text. texts: the tasks' instructions; simulator: its versions."""
    rows = [closed_loop.row(f"task {task}", entry, 10) + f"  {texts[int(task)]}"
            for task, entry in summary["tasks"].items()]
    rows += [closed_loop.row(f"seed {seed}", entry, 10) for seed, entry in summary.get("seeds", {}).items()]
    return "\n".join([*rows, closed_loop.row("success", summary["success"], 10) + f"  {simulator}"])


def report(summary: dict, texts: list[str], episodes: list[dict], conditions: dict, out: Path) -> None:
    """Write the summary, the chart, and the film."""
    for task, entry in summary["tasks"].items():
        entry["instruction"] = texts[int(task)]
    (out / "summary.json").write_text(json.dumps({**conditions, **summary}, indent=1))
    bars = [(f"{task} {texts[int(task)]}", entry, "#8fb8de") for task, entry in summary["tasks"].items()]
    title = f"{conditions['suite']}: success {summary['success']['rate']:.1%}, {conditions['simulator']}"
    closed_loop.draw_chart(title, bars, out / "success.png", left=480)
    first = {e["task"]: (texts[e["task"]], film_path(out, e["task"], e["seed"]), e["success"])
             for e in episodes if e["trial"] == 0}
    closed_loop.draw_films([*first.values()], out)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--checkpoint", help="a run, a checkpoint, OpenVLA's, or a hub id")
    asked.add_argument("--server", help="the address of a server that replies like serve_vla.py")
    parser.add_argument("--suite", required=True, choices=[*MAX_STEPS], help="of tasks")
    parser.add_argument("--tasks", type=int, nargs="+",
                        help="numbers in the suite, from 0; default: all")
    parser.add_argument("--trials", type=int, default=50,
                        help="start states of each task; LIBERO has 50")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0],
                        help="seeds of the furniture's positions")
    parser.add_argument("--execute", type=int,
                        help="actions executed per predicted chunk; default: all")
    parser.add_argument("--unnorm_key", help="the dataset whose units to use; default: the suite's")
    parser.add_argument("--out", type=Path, help="default: a folder in the run, or in this one")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--int8", action="store_true",
                        help="the language model's weights in 8 bits")
    points = parser.add_argument_group("the protocol; the defaults are OpenVLA's")
    default = Protocol()
    points.add_argument("--image_size", type=int, default=default.image_size, help="pixels, drawn")
    points.add_argument("--turn", type=int, choices=[0, 180], default=default.turn,
                        help="rotation of the images in degrees")
    points.add_argument("--jpeg_quality", type=int, default=default.jpeg_quality, help="0: no JPEG")
    points.add_argument("--center_crop", choices=["yes", "no"],
                        help="default: on for OpenVLA's checkpoints, as trained for ours, off for servers")
    points.add_argument("--settling_steps", type=int, default=default.settling_steps,
                        help="steps without motion before the first image")
    points.add_argument("--max_steps", type=int, help="after settling; default: the suite's")
    points.add_argument("--opens_at", type=int, choices=[0, 1],
                        help="the model's value of an open gripper; default: from its data, else 1")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    args = parse_arguments()
    with exit_with_one_line():
        player, conditions, out = open_player(args)
        protocol = protocol_of(args, player)
        tasks = args.tasks or range(90 if args.suite == "libero_90" else 10)
        conditions |= {"suite": args.suite, "execute": player.execute, "unnorm_key": player.key,
                       **dataclasses.asdict(protocol), "resize": f"lanczos {player.size}",
                       "simulator": closed_loop.versions(PACKAGES)}
        closed_loop.open_folder(out, conditions)
    settings = {**conditions, "seeds": ",".join(map(str, args.seeds)), "trials": args.trials}
    closed_loop.compare_versions(conditions["simulator"], player.recording)
    print("protocol " + " ".join(f"{key} {value}" for key, value in settings.items()), flush=True)
    from simulator import instructions  # imported here: an error above does not need the simulator

    with exit_with_one_line():
        texts = instructions(args.suite)
        if args.trials > 50 or any(not 0 <= task < len(texts) for task in tasks):
            raise UserError(f"--tasks 0..{len(texts) - 1} and --trials 1..50 are what {args.suite} has")
    jobs = [(task, trial, seed) for seed in args.seeds for task in tasks for trial in range(args.trials)]
    done = read_episodes(out)
    with exit_with_one_line():
        run(player, args.suite, protocol, [job for job in jobs if job not in done], args.workers, out)
    episodes = [read_episodes(out)[job] for job in jobs]
    summary = summarize(episodes)
    report(summary, texts, episodes, conditions, out)
    print(table(summary, texts, conditions["simulator"]))
    print(f"rollouts {out}")


def open_player(args: argparse.Namespace) -> tuple[Player | Remote, dict, Path]:
    """-> (the policy, its description, the folder of results)."""
    if args.server:
        player = Remote(args.server, args.unnorm_key, args.suite, args.execute, args.workers)
        known = {"server": args.server, "model": player.health["model"]}
        return player, known, args.out or Path(f"rollouts-{args.suite}")
    import torch

    from machinery.weights import open_weights

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    player = Player(args.checkpoint, device, args.unnorm_key, args.suite, args.execute, args.int8)
    where = Path(str(open_weights(args.checkpoint).tensors.where))
    out = Path(f"rollouts-{args.suite}")
    if (where / "checkpoint.json").exists():  # of a run of this project
        out = where.parents[1] / f"{out}-{where.name}"
    return player, {"checkpoint": str(where), "device": device, "int8": args.int8}, args.out or out


def protocol_of(args: argparse.Namespace, player: Player | Remote) -> Protocol:
    """The points of the protocol, completed from the model."""
    crop = player.center_crop if args.center_crop is None else args.center_crop == "yes"
    opens_at = player.opens_at if args.opens_at is None else args.opens_at
    return Protocol(args.image_size, args.turn, args.jpeg_quality, crop, args.settling_steps,
                    args.max_steps or MAX_STEPS[args.suite], opens_at)


def read_episodes(out: Path) -> dict[tuple[int, int, int], dict]:
    """{(task, trial, seed): result} of OUT/episodes.jsonl, without a truncated line."""
    path = out / "episodes.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
        return read_episodes(out)
    return {(e["task"], e["trial"], e["seed"]): e for e in map(json.loads, lines)}


if __name__ == "__main__":
    main()
