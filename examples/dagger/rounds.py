"""The rounds of DAgger, for any simulator: collect, train, play, and the clock.

A simulator's command (on_metaworld.py, on_libero.py, ../own_robot/ask_for_help.py) has three
functions and passes them to `play_rounds`, which runs them in this order:

    [record, train the base]  [collect, train] x rounds  play  -> table.md, success.png

Each round trains on all data: the base's demonstrations and the new episodes of all rounds so far.
It begins with the previous round's weights. A stage that has ended is in OUT/clock.json and is not
repeated, and each continues where it was killed: run the same command again. Read play_rounds,
then join.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from data import open_tables
from examples import closed_loop
from examples.dagger.collecting import ROUNDS
from machinery.config import PROJECT, TrainConfig, UserError, load_config, run_directory
from machinery.files import atomic
from machinery.frames import end_with_parent, find_dataset
from machinery.host import cores
from machinery.tfrecords import open_builder

ARMS = {"dagger": "#1f4e79", "demonstrations": "#e08a2e", "training": "#999999"}  # color in the chart


def parse_arguments(doc: str, out: str, **defaults) -> argparse.Namespace:
    """The command line. defaults: of episodes, steps, and so on."""
    parser = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    parser.add_argument("--base", type=Path,
                        help="a run to begin with; default: record, and train one, in OUT")
    parser.add_argument("--out", type=Path, default=Path(out), help="the folder of this experiment")
    parser.add_argument("--control", choices=["demonstrations", "training"],
                        help="instead of DAgger: as many demonstrations from the start, or only training")
    if "tasks" in defaults:
        parser.add_argument("--tasks", nargs="+", help="as in the simulator's make_dataset.py")
    parser.add_argument("--rounds", type=int, default=1, help="0: only play the base")
    parser.add_argument("--episodes", type=int, help="collected in a round")
    parser.add_argument("--repeat", type=int, default=1,
                        help="how often a collected episode is in the data, so that a few of them count")
    parser.add_argument("--steps", type=int, help="of training in a round")
    parser.add_argument("--base_steps", type=int, help="of training the base")
    parser.add_argument("--learning_rate", type=float, help="the highest of a round's training")
    parser.add_argument("--execute", type=int, help="actions executed per predicted chunk")
    parser.add_argument("--trials", type=int,
                        help="episodes per task that measure a policy before a round")
    parser.add_argument("--play", default="", metavar="ARGUMENTS",
                        help="more arguments of the evaluation, as one word")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    if args.rounds > len(ROUNDS):
        parser.error(f"--rounds {args.rounds}: there are seeds for {len(ROUNDS)}")
    return args


# ---- The clock -----------------------------------------------------------------------------------


class Clock:
    """Which stages have begun and ended, and when. It does not stop while a stage is interrupted."""

    def __init__(self, path: Path):
        self.path = path
        self.times = json.loads(path.read_text()) if path.exists() else {}
        self.total = 0.0  # of the stages that this command has passed

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Do it, unless it has been done. Prints `stage seconds total`."""
        begin, end = self.times.get(name, (time.time(), None))
        if end is None:
            self.store(name, [begin, None])
            work()
            end = time.time()
            self.store(name, [begin, end])
        self.total += end - begin
        print(f"{name.replace(' ', '_')} {end - begin:.1f} {self.total:.1f}", flush=True)

    def store(self, name: str, times: list) -> None:
        """Note a stage's beginning or end."""
        self.times[name] = times
        with atomic(self.path) as scratch:
            scratch.write_text(json.dumps(self.times, indent=1))


# ---- The rounds ----------------------------------------------------------------------------------


def play_rounds(args: argparse.Namespace, make_base: Callable, collect_round: Callable, play: Callable,
                results: Callable) -> None:
    """All stages, then the table and the chart.

    make_base(args, clock) -> the base's run, recorded and trained in args.out
    collect_round(checkpoint, folder, number, args, base): see collecting.collect; in a process of its
        own, so that the policy leaves the GPU
    play(checkpoint, folder, args): the evaluation
    results(folder) -> (the rate of an evaluation as closed_loop.rate, a note) or None if there is none
    """
    args.out = args.out.resolve()
    arm = args.out / (args.control or "dagger")
    known = {"tasks", "episodes", "repeat", "steps", "learning_rate", "execute", "trials"} & vars(args).keys()
    closed_loop.open_folder(arm, {key: getattr(args, key) for key in sorted(known)})
    clock = Clock(args.out / "clock.json")
    base = args.base.resolve() if args.base else make_base(args, clock)
    cfg, dataset = settings_of(base)
    closed_loop.open_folder(args.out / "base", {"run": str(base)})  # all arms have the same
    checkpoint, collected = base, [dataset]
    for number in range(1, args.rounds + 1):
        folder = arm / f"round-{number}"
        data_root = cfg.data_root_dir
        if args.control != "training":
            clock.stage(f"{arm.name} collect {number}", functools.partial(
                in_process, collect_round, checkpoint, folder, number, args, base))
            collected += [find_dataset(folder / "new", dataset.parent.name)] * args.repeat
            data_root = folder / "datasets"
            path = data_root / dataset.parent.name / dataset.name
            if not path.exists():
                join(collected, path, statistics_of(base))
        command, run = training(base, cfg, checkpoint, data_root, folder, number, args)
        clock.stage(f"{arm.name} train {number}", functools.partial(call, command))
        checkpoint = run
    folder = args.out / "base" if args.rounds == 0 else arm / f"round-{args.rounds}"
    name = f"{folder.relative_to(args.out)} play".replace("/", " ")
    clock.stage(name, functools.partial(play, checkpoint, folder / "rollouts", args))
    report(args.out, results)


def record_and_train(args: argparse.Namespace, clock: Clock, recipe: Path, run: str) -> Path:
    """Record the demonstrations and train on them, by a recipe.sh -> its run, named `run` with the
    seed."""
    here = functools.partial(call, WORK=str(args.out))
    clock.stage("record", functools.partial(here, [
        recipe, "data", "--tasks", *args.tasks, "--workers", args.workers]))
    clock.stage("train base", functools.partial(here, [
        recipe, "train", f"max_steps={args.base_steps}", "eval_interval=0", "save_interval=500"]))
    return args.out / "runs" / run.format(os.environ.get("SEED", "7"))  # as recipe.sh has it


def longest_parts(base: Path, texts: dict[str, str], control: str | None) -> dict[str, float]:
    """{task: instruction} -> for each one in the base's data, for how many steps its policy plays at
    most: twice the mean length of a demonstration. A control's policy plays none."""
    cfg, _ = settings_of(base)
    ((*_, table),) = open_tables(cfg)
    first = table.frames["instruction"][table.first_frames]
    longest = {}
    for task, text in texts.items():
        if text in table.instructions:
            steps = table.episodes["count"][first == table.instructions.index(text)]
            longest[task] = 0 if control else 2 * float(steps.mean())
    return longest


def call(command: list, **environment: str) -> None:
    """Run a program."""
    if code := subprocess.run([*map(str, command)], env={**os.environ, **environment}).returncode:
        sys.exit(f"error: {command[1]} failed, see above (exit status {code})")


def in_process(work: Callable, *arguments) -> None:
    """Call a function in a process of its own, which ends if this one is killed."""
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        pool.submit(work, *arguments).result()


def settings_of(run: Path) -> tuple[TrainConfig, Path]:
    """A run's config, and the directory of its dataset. Raises UserError if it has several."""
    cfg = load_config(run / "config.yaml")
    names = [cfg.data_mix] if isinstance(cfg.data_mix, str) else [*cfg.data_mix]
    if len(names) > 1:
        raise UserError(f"{run} learned {', '.join(names)}: choose a --base that learned one dataset")
    return cfg, find_dataset(cfg.data_root_dir, names[0])


def statistics_of(run: Path) -> dict:
    """How a run's actions and states are normalized, as normalization.json has it."""
    (known,) = json.loads((run / "dataset_statistics.json").read_text()).values()
    return {key: known[key] for key in ("action", "proprio")}


def training(base: Path, cfg: TrainConfig, checkpoint: Path, data_root: str | Path, folder: Path, number: int,
             args: argparse.Namespace) -> tuple[list, Path]:
    """-> the command that trains round `number`, and its run. Everything else is as in the base."""
    config = base / "config.yaml"
    settings = [f"data_root_dir={data_root}", f"run_root_dir={folder}", "run_id=run",
                f"pretrained_checkpoint={checkpoint}", "is_resume=false", "pretrained_backbones=false",
                f"seed={cfg.seed + number}", f"max_steps={args.steps}", f"learning_rate={args.learning_rate}",
                f"save_interval={-(-args.steps // 4)}", "eval_interval=0",
                f"accept={json.dumps([*cfg.accept, 'episode_twice'])}"]  # of --repeat
    run = run_directory(load_config(config, settings))
    return [sys.executable, PROJECT / "train_vla.py", "--config", config, "--deepspeed_config",
            base / "ds_config.json", "--set", *settings], run


def join(parts: list[Path], path: Path, statistics: dict) -> None:
    """Make a dataset of the episodes of several, by links to their files (no copies, so all have to be
    on one disk). Splits, and all files about the data, are the first one's.

    One dataset, not a mixture of two: a policy then has one set of statistics to act with, and all
    programs treat it like its base. statistics: the base's. Those of the new mixture would give the
    256 tokens of each number other values than the ones that the weights have learned.
    """
    name, infos = path.parent.name, [open_builder(part).info for part in parts]
    path.parent.mkdir(parents=True, exist_ok=True)
    splits = []
    with atomic(path) as scratch:
        scratch.mkdir()
        for split in infos[0].splits:
            found = [info.splits[split] for info in infos if split in info.splits]
            files = [file for each in found for file in each.filepaths]
            for number, file in enumerate(files):
                os.link(file, scratch / f"{name}-{split}.tfrecord-{number:05d}-of-{len(files):05d}")
            splits.append({"name": split, "numBytes": str(sum(each.num_bytes for each in found)),
                           "shardLengths": [str(count) for each in found for count in each.shard_lengths],
                           "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"})
        for file in [*parts[0].glob("*.json"), *parts[0].glob("*.yaml")]:
            shutil.copy(file, scratch)
        info = {"name": name, "version": path.name, "fileFormat": "tfrecord", "splits": splits}
        (scratch / "dataset_info.json").write_text(json.dumps(info, indent=2))
        (scratch / "normalization.json").write_text(json.dumps(statistics))


# ---- The results ---------------------------------------------------------------------------------


def report(out: Path, results: Callable) -> None:
    """Print and draw all evaluations in OUT, and the measurements before rounds."""
    rows, bars = [], []
    folders = [("base", out / "base", "#7f7f7f")]
    folders += [(f"{arm}, round {number}", out / arm / f"round-{number}", color)
                for arm, color in ARMS.items() for number in ROUNDS]
    for name, folder, color in folders:
        before = folder / "before.json"
        if before.exists():
            outcomes = [success for some in json.loads(before.read_text()).values() for success in some]
            rows.append((f"{name}: before, on seeds of collecting", closed_loop.rate(outcomes), ""))
        if found := results(folder / "rollouts"):
            rows.append((f"{name}: evaluation", *found))
            bars.append((name, found[0], color))
    lines = ["| policy | success | 95% | episodes | |", "|---|---:|---|---:|---|"]
    for name, entry, note in rows:
        low, high = entry["interval"]
        lines.append(f"| {name} | {entry['rate']:.1%} | {low:.1%} to {high:.1%} | {entry['trials']} | {note} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    closed_loop.draw_chart("success after each round, with 95% intervals", bars, out / "success.png")
    print("\n".join(lines) + f"\n{out / 'success.png'}")
