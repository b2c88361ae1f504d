"""DAgger in LIBERO: record, train, then rounds of collecting and training, then play.

    python examples/dagger/on_libero.py --out runs/dagger_libero

The expert, the stages before the rounds, and the evaluation are those of examples/libero/recipe.sh.
LIBERO's own start states are for the evaluation only: collecting begins in new ones. Read record;
examples/dagger/rounds.py has the loop.
"""

import json
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "examples/libero")]  # the modules of both

from machinery.config import exit_with_one_line  # first: it names a missing package

# isort: split

from expert import TASKS
from make_dataset import rest_of_episode, simulator_of, task_names
from protocol import MAX_STEPS, Protocol, command, see, settle
from simulator import Simulator, instructions

from examples import closed_loop
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


def play_some(simulator: Simulator, job: dict, steps: int) -> None:
    """Let the policy play for so many steps, or until the task is solved."""
    protocol = Protocol(**job["protocol"])
    while steps > 0 and not simulator.solved:
        seen = simulator.look()
        views = [see(seen[camera], protocol, job["size"]) for camera in job["cameras"]]
        question = views, seen["state"], instructions(simulator.suite)[simulator.task]
        actions = ask(job["address"], question)[:steps]
        for left, action in zip(reversed(range(len(actions))), actions, strict=True):
            if not simulator.solved:
                simulator.step(command(action, protocol), look=left == 0)
        steps -= len(actions)


def begin(task: str, seed: int) -> Simulator:
    """A simulator in a new start state, none of LIBERO's."""
    simulator = simulator_of(task)
    simulator.begin_anew(seed)
    settle(simulator, Protocol())
    return simulator


def succeeds(task: str, seed: int, job: dict) -> bool:
    """Does the policy by itself do the task?"""
    simulator = begin(task, seed)
    play_some(simulator, job, MAX_STEPS[simulator.suite])
    return bool(simulator.solved)


def record(task: str, seed: int, job: dict) -> dict | None:
    """An episode in which the policy begins and the expert ends, with its part only. None if the
    policy needed no help, or the expert could not help."""
    simulator = begin(task, seed)
    play_some(simulator, job, takeover(seed, job["longest"][task]))
    if simulator.solved:
        return None
    return rest_of_episode(simulator, task, seed, job["recording"])


# ---- The stages ----------------------------------------------------------------------------------


def make_base(args, clock: Clock) -> Path:
    """Record the demonstrations, and train on them."""
    return record_and_train(args, clock, PROJECT / "examples/libero/recipe.sh", "libero_scripted-seed{}--image_aug")


def collect_round(checkpoint: Path, folder: Path, number: int, args, base: Path) -> None:
    """Collect with the policy of a checkpoint."""
    import torch
    from rollout import Player

    device = "cuda" if torch.cuda.is_available() else "cpu"
    player = Player(str(checkpoint), device, None, "", args.execute, False)
    _, dataset = settings_of(base)
    texts = {}
    for task in task_names(args.tasks):
        suite, _, index = task.rpartition("-")
        texts[task] = instructions(suite)[int(index)]
    longest = longest_parts(base, texts, args.control)
    job = {"recording": player.recording, "cameras": player.cameras, "size": player.size, "longest": longest,
           "protocol": {"center_crop": player.center_crop, "opens_at": player.opens_at}}
    collect(dataset, folder, player.act, record, succeeds, job, [*longest], number, args.episodes, args.trials,
            args.workers)


def play(checkpoint: Path, folder: Path, args) -> None:
    """The evaluation, from LIBERO's start states."""
    tasks = task_names(args.tasks)
    for suite in TASKS:
        if numbers := [number for number in TASKS[suite] if f"{suite}-{number}" in tasks]:
            call([sys.executable, PROJECT / "examples/libero/rollout.py", "--checkpoint", checkpoint,
                  "--suite", suite, "--tasks", *numbers, "--execute", args.execute, "--out", folder / suite,
                  *args.play.split()])


def results(folder: Path) -> tuple[dict, str] | None:
    """The rate over all suites that were played, and each one's."""
    found = {path.parent.name: json.loads(path.read_text())["success"]
             for path in sorted(folder.glob("*/summary.json"))}
    if not found:
        return None
    counts = [(entry["successes"], entry["trials"]) for entry in found.values()]
    successes, trials = map(sum, zip(*counts, strict=True))
    notes = [f"{suite} {entry['rate']:.1%} ({' to '.join(f'{edge:.1%}' for edge in entry['interval'])})"
             for suite, entry in found.items()]
    return closed_loop.rate([True] * successes + [False] * (trials - successes)), ", ".join(notes)


if __name__ == "__main__":
    with exit_with_one_line():
        play_rounds(parse_arguments(__doc__, "runs/dagger_libero", tasks=[*TASKS], execute=4, episodes=600,
                                    steps=1500, base_steps=3000, learning_rate=4e-4, trials=10,
                                    play="--trials 20"),
                    make_base, collect_round, play, results)
