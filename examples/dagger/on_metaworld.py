"""DAgger in Meta-World: record, train, then rounds of collecting and training, then play.

    python examples/dagger/on_metaworld.py --out runs/dagger_mt50

README.md has the controls and how long it takes. The stages before the rounds, and the evaluation,
are those of examples/metaworld/recipe.sh. Read record; examples/dagger/rounds.py has the loop.
"""

import json
import os
import sys
from collections import deque
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for each simulator; there is one per core
PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "examples/metaworld")]  # the modules of both

from machinery.config import exit_with_one_line  # first: it names a missing package

# isort: split

from make_dataset import rest_of_episode, simulator_for
from simulator import INSTRUCTIONS, MAX_STEPS, Simulator, task_names

from examples.dagger.collecting import ask, collect, takeover
from examples.dagger.rounds import (
    Clock,
    call,
    longest_parts,
    parse_arguments,
    play_rounds,
    record_and_train,
    settings_of,
)


def play_some(simulator: Simulator, task: str, job: dict, steps: int) -> None:
    """Let the policy play for so many of its steps, or until the episode is over."""
    history = deque([simulator.see()] * job["window"], maxlen=job["window"])
    while steps > 0 and not simulator.over:
        simulator.sheet.read()
        actions = ask(job["address"], (task, [history]))[0][:steps]
        for i, action in enumerate(actions):
            if not simulator.over:
                simulator.step(action)
                # render only the images that will be used
                if len(actions) - i <= job["window"]:
                    history.append(simulator.see())
        steps -= len(actions)
    simulator.sheet.read()


def succeeds(task: str, seed: int, job: dict) -> bool:
    """Does the policy by itself do the task?"""
    simulator = simulator_for(task, job["recording"])
    simulator.reset(seed)
    play_some(simulator, task, job, MAX_STEPS)
    return simulator.success_at is not None


def record(task: str, seed: int, job: dict) -> dict | None:
    """An episode in which the policy begins and the expert ends, with its part only. None if the
    policy needed no help, or the expert could not help."""
    simulator = simulator_for(task, job["recording"])
    simulator.reset(seed)
    play_some(simulator, task, job, takeover(seed, job["longest"][task]))
    if simulator.over:
        return None
    return rest_of_episode(simulator, task, seed, job["recording"])


# ---- The stages ----------------------------------------------------------------------------------


def make_base(args, clock: Clock) -> Path:
    """Record the demonstrations, and train on them."""
    return record_and_train(args, clock, PROJECT / "examples/metaworld/recipe.sh", "metaworld_mt50-seed{}")


def collect_round(checkpoint: Path, folder: Path, number: int, args, base: Path) -> None:
    """Collect with the policy of a checkpoint."""
    import torch
    from rollout import Player

    gpu = torch.cuda.is_available()
    # a question is about one episode, and half of the simulators wait at a time
    player = Player(str(checkpoint), None, args.execute, "cuda" if gpu else "cpu", batch=args.workers)
    _, dataset = settings_of(base)
    longest = longest_parts(base, {task: INSTRUCTIONS[task] for task in task_names(args.tasks)}, args.control)
    job = {"recording": player.recording, "window": player.cfg.window_size, "longest": longest}
    # with a GPU, one simulator computes while another waits for its answer
    collect(dataset, folder, player.act, record, succeeds, job, [*longest], number, args.episodes, args.trials,
            args.workers * (2 if gpu else 1))


def play(checkpoint: Path, folder: Path, args) -> None:
    """The evaluation, on seeds of its own."""
    call([sys.executable, PROJECT / "examples/metaworld/rollout.py", "--checkpoint", checkpoint, "--tasks",
          *args.tasks, "--execute", args.execute, "--out", folder, *args.play.split()])


def results(folder: Path) -> tuple[dict, str] | None:
    """The rate of an evaluation, and the mean of the groups."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    groups = summary["macro_average"]
    return summary["per_task_average"], f"mean of groups {groups['rate']:.1%} ({groups['standard_error']:.1%})"


if __name__ == "__main__":
    with exit_with_one_line():
        play_rounds(parse_arguments(__doc__, "runs/dagger_mt50", tasks=["mt50"], execute=4, episodes=1000,
                                    repeat=3, steps=2500, base_steps=4000, learning_rate=4e-4, trials=10,
                                    play="--trials 10 --seeds 0 1 2"),
                    make_base, collect_round, play, results)
