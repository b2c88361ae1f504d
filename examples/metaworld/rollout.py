"""Let a trained policy act in Meta-World and count its successes.

    python examples/metaworld/rollout.py --checkpoint runs/demo+n1+b32+x7 --tasks demo --trials 10

All trials of a task are one batch from beginning to end. A process steps their simulators (play),
the main process queries the policy (Player.act), and finished trials stay in the batch. So on a CPU,
a task's result depends only on the checkpoint, the task, and its seeds. A GPU answers all waiting
tasks at once, always as a batch of the same size. Each finished task is a file in --out, and an
interrupted command continues where it stopped. At the end it draws a table, a bar chart, and a film.

The evaluation is LeRobot's: positions drawn from Meta-World's ranges, with seeds that no
demonstration has. Success is Meta-World's, at any of the first 500 simulator steps (success within
400 is reported too).
"""

import argparse
import json
import math
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules
# those that need torch are imported where they are used: the simulators' processes read this file
# too

# first: it names a missing package
from machinery.config import UserError, exit_with_one_line, load_yaml

# isort: split

import numpy as np
from PIL import Image
from simulator import (
    GROUPS,
    INSTRUCTIONS,
    MAX_STEPS,
    OPTICS,
    PACKAGES,
    Sheet,
    Simulator,
    task_names,
)
from tqdm import tqdm

from examples import closed_loop
from examples.closed_loop import SIDE, draw_films, encode_film, open_folder, row
from examples.recording import render_on_gpu
from machinery.host import cores

FIRST_SEED = 200_000  # demonstrations have smaller ones
PARAPHRASES = Path(__file__).with_name("paraphrases.yaml")


def play(connection: Connection) -> None:
    """A process that steps the trials of one task after another.

    It receives (task, seeds, window_size, camera options). Then it sends ("see", each trial's last
    window_size observations) and receives each trial's next actions until all trials are over:
    ("done", the first trial's film, [{seed, steps, success_at}, ...]).
    """
    while job := connection.recv():
        task, seeds, window, camera = job
        trials = [Simulator(task, **camera)]
        trials += [Simulator(task, **camera, sheet=trials[0].sheet) for _ in seeds[1:]]
        film, film_sheet = [], Sheet(trials[0].env.model, 2 * SIDE, side=4)
        histories = []
        for trial, seed in zip(trials, seeds, strict=True):
            trial.reset(seed)
            histories.append(deque([trial.see()] * window, maxlen=window))
        while not all(trial.over for trial in trials):
            if not trials[0].over:
                take_picture(trials[0], film_sheet, film)
            trials[0].sheet.read()
            connection.send(("see", histories))
            for trial, history, actions in zip(trials, histories, connection.recv(), strict=True):
                for i, action in enumerate(actions):
                    if not trial.over:
                        trial.step(action)
                        # render only the images that will be used
                        if trial.over or len(actions) - i <= window:
                            history.append(trial.see())
        take_picture(trials[0], film_sheet, film)
        film_sheet.read()
        connection.send(("done", encode_film(film), [
            {"seed": seed, "steps": trial.steps, "success_at": trial.success_at}
            for seed, trial in zip(seeds, trials, strict=True)]))


class Player:
    """A trained policy, with inputs like those in its training data."""

    def __init__(self, checkpoint: str, recording: Path | None, execute: int | None, device: str,
                 batch: int, in_8_bits: bool = False, paraphrases: bool = False):
        """recording: recording.json of the dataset; default: found through the run's data_root_dir.
        execute: actions of a predicted chunk to execute before the next look; default: half of
        them. batch: trials that are answered at once. paraphrases: use the wordings of
        paraphrases.yaml, which the policy has not seen."""
        import torch

        from act import load_vla
        from machinery import oxe
        from machinery.frames import find_dataset

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.policy = load_vla(checkpoint, device, dtype, in_8_bits)
        cfg = self.cfg = self.policy.cfg
        if len(self.policy.norm_stats) > 1:
            raise UserError(f"{checkpoint} learned {sorted(self.policy.norm_stats)}, not only Meta-World")
        (self.dataset,) = self.policy.norm_stats
        ((_, _, recipe),) = oxe.resolve_mixture(self.dataset, cfg.datasets)
        self.views = [getattr(recipe, camera) for camera in cfg.cameras]
        path = recording or find_dataset(Path(cfg.data_root_dir), self.dataset) / "recording.json"
        # older recordings do not have it
        self.recording = {"multisampling": 0, **json.loads(path.read_text())}
        self.camera = {"cameras": self.views, **{key: self.recording[key] for key in OPTICS}}
        self.execute = execute or max(1, cfg.action_chunk // 2)
        self.wordings = {task: [words] for task, words in INSTRUCTIONS.items()}
        if paraphrases:  # trial i of a task gets wording i, from the first again after the last
            self.wordings = load_yaml(PARAPHRASES.read_text(), str(PARAPHRASES))
        self.batch = batch
        self.threads = ThreadPoolExecutor(min(4, cores()))

    def act(self, questions: list[tuple[str, list[deque]]]) -> list[np.ndarray]:
        """For each (task, observations of each trial, oldest first): the next actions
        (trials, execute, 4)."""
        import torch

        trials = len(questions[0][1])  # as many in all tasks
        texts = [self.wordings[task][trial % len(self.wordings[task])]
                 for task, _ in questions for trial in range(trials)]
        histories = [history for _, some in questions for history in some]
        images = torch.stack([*self.threads.map(self.prepare, histories)])
        state = np.stack([history[-1]["state"] for history in histories])
        actions = []
        for first in range(0, len(texts), self.batch):
            # filled up: other sizes would take other kernels, which round differently
            rows = np.arange(first, first + self.batch).clip(max=len(texts) - 1)
            actions += [*self.policy.predict_action(images[rows], [texts[row] for row in rows], self.dataset,
                                                    state[rows])]
        actions = np.stack(actions).reshape(-1, trials, self.cfg.action_chunk, actions[0].shape[-1])
        return [*actions[: len(questions), :, : self.execute]]

    def prepare(self, history: deque):
        """A trial's observations -> the model's images."""
        from machinery.images import decode_image

        return self.policy.prepare_views([decode_image(observation[view], self.cfg.image_size)
                                          for observation in history for view in self.views])


def run(player: Player, jobs: list[tuple[str, int]], trials: int, workers: int, out: Path) -> None:
    """Play each (task, evaluation seed); write OUT/<task>-<seed>.json and .webp, the first trial's
    film."""
    context, queue, playing, processes = get_context("spawn"), iter(jobs), {}, []

    def begin(connection: Connection) -> None:
        task, seed = playing[connection] = next(queue, (None, None))
        if task is None:
            del playing[connection]
            return connection.send(None)
        first = FIRST_SEED + 1000 * seed
        connection.send((task, [*range(first, first + trials)], player.cfg.window_size, player.camera))

    for number in range(min(workers, len(jobs))):
        render_on_gpu(number)
        connection, end = context.Pipe()
        processes.append(context.Process(target=play, args=(end,), daemon=True))
        processes[-1].start()
        end.close()  # so that a dead process shows up as the end of its messages
        begin(connection)
    with tqdm(total=len(jobs) * trials, desc="roll out", unit="episode") as bar:
        while playing:
            asking, questions = [], []
            for connection in wait([*playing]):
                kind, seen, *results = connection.recv()
                if kind == "see":
                    asking.append(connection)
                    questions.append((playing[connection][0], seen))
                    continue
                path = out / "{}-{}.json".format(*playing[connection])
                path.with_suffix(".webp").write_bytes(seen)
                path.with_suffix(".tmp").write_text(json.dumps(results[0]))
                path.with_suffix(".tmp").rename(path)
                bar.update(trials)
                begin(connection)
            for connection, actions in zip(asking, player.act(questions) if asking else [], strict=True):
                connection.send(actions)
    for process in processes:
        process.join()


# --------------------------------------------------------------------------------------------------
# Numbers and pictures


def rate(episodes: list[dict], within: int = MAX_STEPS) -> dict:
    """Episodes -> {successes, trials, rate, interval}."""
    return closed_loop.rate([e["success_at"] is not None and e["success_at"] <= within for e in episodes])


def summarize(results: dict[tuple[str, int], list[dict]]) -> dict:
    """{(task, seed): episodes} -> success per task and per group, and two averages: over all tasks,
    and over the groups present, which papers on MT50 call the average."""
    tasks = list(dict.fromkeys(task for task, _ in results))
    of = {task: [e for (t, _), episodes in results.items() if t == task for e in episodes] for task in tasks}
    members = {name: [e for task in tasks for e in of.get(task, [])] for name, tasks in GROUPS.items()}
    groups = {name: rate(episodes) for name, episodes in members.items() if episodes}
    within_400 = {name: rate(episodes, 400) for name, episodes in members.items() if episodes}
    everything = [e for episodes in of.values() for e in episodes]
    summary = {"per_task_average": rate(everything), "per_task_average_400": rate(everything, 400),
               "macro_average": mean_of_groups(groups), "macro_average_400": mean_of_groups(within_400),
               "groups": groups, "tasks": {task: {**rate(episodes), "instruction": INSTRUCTIONS[task]}
                                           for task, episodes in of.items()}}
    if len(seeds := {seed for _, seed in results}) > 1:
        summary["seeds"] = {str(seed): summarize({key: episodes for key, episodes in results.items()
                                                  if key[1] == seed}) for seed in sorted(seeds)}
    return summary


def mean_of_groups(groups: dict[str, dict]) -> dict:
    """The mean of the groups' rates, each with the same weight -> {rate, standard_error}."""
    variance = sum(g["rate"] * (1 - g["rate"]) / g["trials"] for g in groups.values()) / len(groups) ** 2
    return {"rate": float(np.mean([g["rate"] for g in groups.values()])),
            "standard_error": math.sqrt(variance)}


def table(summary: dict, simulator: str) -> str:
    """The summary as text. Groups and their mean are left out if all tasks are of one. simulator: its
    versions, beside each average."""
    rows = [row(name, entry) for name, entry in summary["tasks"].items()]
    several, averages = len(summary["groups"]) > 1, []
    if several:
        rows += [row(name, entry) for name, entry in summary["groups"].items()]
    if summary["per_task_average_400"] != summary["per_task_average"]:
        averages += [row("per_task_average_400", summary["per_task_average_400"])]
    averages += [row("per_task_average", summary["per_task_average"])]
    means = [key for key in ("macro_average_400", "macro_average") if several]
    if summary["macro_average_400"] == summary["macro_average"]:
        means = means[1:]
    for key in means:
        mean = summary[key]
        averages += [f"{key:32s} {mean['rate']:6.1%}  standard error {mean['standard_error']:.1%}"]
    for seed, part in summary.get("seeds", {}).items():
        mean = f" macro_average {part['macro_average']['rate']:.1%}" if several else ""
        averages += [f"seed {seed} per_task_average {part['per_task_average']['rate']:.1%}{mean}"]
    rows += [f"{line}  {simulator}" for line in averages]
    return "\n".join(rows)


def draw_chart(summary: dict, simulator: str, path: Path) -> None:
    """Draw the success of each task, by group, with intervals."""
    bars, several = [], len(summary["groups"]) > 1
    for group, members in GROUPS.items():
        found = [task for task in members if task in summary["tasks"]]
        found.sort(key=lambda task: -summary["tasks"][task]["rate"])
        bars += [(group, summary["groups"][group], "#1f4e79")] if found and several else []
        bars += [(f"  {task}", summary["tasks"][task], "#8fb8de") for task in found]
    macro, mean = summary["macro_average"]["rate"], summary["per_task_average"]["rate"]
    title = f"success: mean of groups {macro:.1%}, of tasks {mean:.1%}" if several else f"success: {mean:.1%}"
    title += f", {simulator}"
    closed_loop.draw_chart(title, bars, path)


def take_picture(simulator: Simulator, sheet: Sheet, film: list[Image.Image]) -> None:
    """Add the scene to a film when the sheet is read, at half the sheet's size, for smooth
    edges."""
    simulator.draw(simulator.cameras[0], sheet, lambda pixels: film.append(Image.fromarray(pixels).reduce(2)))


def first_films(results: dict[tuple[str, int], list[dict]], out: Path) -> list[tuple[str, Path, bool]]:
    """The arguments of draw_films for the first trial of each task."""
    films = {}
    for (task, seed), episodes in results.items():
        success = episodes[0]["success_at"] is not None
        films.setdefault(task, (INSTRUCTIONS[task], out / f"{task}-{seed}.webp", success))
    return [*films.values()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--checkpoint", required=True,
                        help="a run's directory, or one of its checkpoints")
    parser.add_argument("--tasks", nargs="+", default=["demo"],
                        help="demo, mt50, easy, medium, hard, very_hard, or names such as reach-v3")
    parser.add_argument("--trials", type=int, default=10, help="episodes per task and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="evaluation seeds")
    parser.add_argument("--execute", type=int,
                        help="actions executed per predicted chunk; default: half")
    parser.add_argument("--paraphrases", action="store_true",
                        help="instruct in words that no demonstration has (paraphrases.yaml)")
    parser.add_argument("--recording", type=Path,
                        help="the dataset's recording.json; default: found through the run")
    parser.add_argument("--out", type=Path, help="default: a folder in the run")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--int8", action="store_true",
                        help="the language model's weights in 8 bits")
    args = parser.parse_args()
    import torch

    from machinery.weights import open_weights

    with exit_with_one_line():
        tasks = task_names(args.tasks)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        # on a GPU eight tasks at once, on a CPU one, so that its result depends on no other
        batch = args.trials * (1 if device == "cpu" else 8)
        player = Player(args.checkpoint, args.recording, args.execute, device, batch, args.int8, args.paraphrases)
        checkpoint = Path(open_weights(args.checkpoint).tensors.where)
        name = f"rollouts-{checkpoint.name}" + "-paraphrases" * args.paraphrases
        out = args.out or checkpoint.parents[1] / name
        simulator = closed_loop.versions(PACKAGES)
        conditions = {"checkpoint": str(checkpoint), "execute": player.execute, "trials": args.trials,
                      **player.camera, "device": device, "int8": args.int8,
                      "paraphrases": args.paraphrases, "simulator": simulator}
        open_folder(out, conditions)
    closed_loop.compare_versions(simulator, player.recording)
    jobs = [(task, seed) for seed in args.seeds for task in tasks]
    paths = {job: out / "{}-{}.json".format(*job) for job in jobs}
    # the hardest first: their failures last longest
    hardest = [task for group in reversed(GROUPS.values()) for task in group]
    left = sorted([job for job in jobs if not paths[job].exists()], key=lambda job: hardest.index(job[0]))
    run(player, left, args.trials, args.workers, out)
    results = {job: json.loads(path.read_text()) for job, path in paths.items()}
    summary = summarize(results)
    (out / "summary.json").write_text(json.dumps({**conditions, **summary}, indent=1))
    draw_chart(summary, simulator, out / "success.png")
    draw_films(first_films(results, out), out)
    print(table(summary, simulator))
    print(f"rollouts {out}")


if __name__ == "__main__":
    main()
