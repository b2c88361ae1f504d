"""Simulators for rl.py, in processes: the arm of examples/own_robot, Meta-World, LIBERO.

`Worlds` is rl.py's side: it starts processes `python worlds.py FD`, and talks to them over the pipe
of that number. `serve` is their side. Then there is a class for each simulator. For your own one,
write such a class and pass --world my_module:MyWorld.
"""

import io
import json
import os
import pkgutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for each simulator; there is one per core
EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES.parent))  # the project's modules

import numpy as np
from PIL import Image

from examples.recording import render_on_gpu
from machinery.images import decode_image

JOINT_NOISE = 0.02  # rad: the arm's start in LIBERO, as in examples/libero/make_dataset.py


# ---- The two ends of a pipe ----------------------------------------------------------------------


class Worlds:
    """Processes of one simulator each, or of several if a process can have them."""

    def __init__(self, args, cfg, table: tuple, rank: int, ranks: int):
        """args: rl.py's; table: the dataset's, from data.open_tables. Each rank starts its share of
        args.workers processes."""
        _, _, recipe, frames = table
        recording = frames.directory / "recording.json"
        settings = {
            "tasks": args.tasks, "cameras": cfg.cameras, "size": cfg.image_size,
            "views": [recipe.camera(camera)[0] for camera in cfg.cameras],  # the dataset's names
            "opens_at": int("invert" not in recipe.action),  # the gripper
            "recording": json.loads(recording.read_text()) if recording.exists() else {}}
        self.connections = []
        self.processes = []
        for number in range(max(1, args.workers // ranks)):
            render_on_gpu(rank + number * ranks)
            connection, end = Pipe()
            program = [sys.executable, __file__, str(end.fileno())]
            self.processes.append(subprocess.Popen(program, pass_fds=[end.fileno()]))
            end.close()  # so that a dead process shows up as the end of its messages
            connection.send((args.world, settings))
            self.connections.append(connection)
        facts = [connection.recv() for connection in self.connections]  # the same of all
        self.tasks, self.together, self.horizon = facts[0]

    def play(self, groups: list[dict], size: int, decide: Callable, one_by_one: bool) -> list[list[dict]]:
        """Play `size` episodes of each group's task, all from the group's seed -> for each group its
        episodes {key, decisions, executed (actions), success}.

        decide: gets [(episode, instruction, images, state), ...], appends to each episode's
        decisions, and returns the next actions of each. one_by_one: for one process at a time. On a
        CPU, what happens then depends only on the seeds; a GPU answers all that wait.
        """
        played = [[{"key": (group["number"], number), "decisions": []} for number in range(size)]
                  for group in groups]
        jobs = deque((group, episodes[first : first + self.together])
                     for group, episodes in zip(groups, played, strict=True)
                     for first in range(0, size, self.together))
        playing, idle = {}, [*self.connections]
        while jobs or playing:
            while jobs and idle:
                group, episodes = jobs.popleft()
                playing[idle[-1]] = episodes
                idle.pop().send((group["task"], group["seed"], len(episodes)))
            waiting, questions = [], []
            for connection in wait([*playing]):
                kind, *message = connection.recv()
                if kind == "see":
                    which, text, seen = message
                    waiting.append((connection, len(which)))
                    questions.append([(playing[connection][i], text, images, state)
                                      for i, (images, state) in zip(which, seen, strict=True)])
                else:
                    for episode, executed, success in zip(playing.pop(connection), *message, strict=True):
                        episode |= {"executed": executed, "success": success}
                    idle.append(connection)
            if questions and not one_by_one:
                questions = [[*chain(*questions)]]
            actions = (action for batch in questions for action in decide(batch))
            for connection, count in waiting:
                connection.send([next(actions) for _ in range(count)])
        return played

    def close(self) -> None:
        """End the processes."""
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.wait()


def serve(connection: Connection, world, horizon: int) -> None:
    """Play one job after another: `count` episodes of a task, all from the same start.

    Receives (task, seed, count). Then it sends ("see", which episodes go on, the instruction, what
    they see: (images, state) of each) and receives the next actions of each, until all are over:
    ("done", how many actions each executed, which ones succeeded).
    """
    while job := connection.recv():
        task, seed, count = job
        trials = world.begin(task, seed, count)
        executed = [0] * count
        while playing := [i for i in range(count)
                          if executed[i] < horizon and not world.over(trials[i])]:
            seen = world.look([trials[i] for i in playing])
            connection.send(("see", playing, world.instruction(task), seen))
            for i, actions in zip(playing, connection.recv(), strict=True):
                actions = actions[: horizon - executed[i]]
                for left, action in zip(reversed(range(len(actions))), actions, strict=True):
                    world.step(trials[i], action, look=left == 0)
                    executed[i] += 1
                    if world.over(trials[i]):
                        break
        connection.send(("done", executed, [world.succeeded(trial) for trial in trials]))


# ---- Simulators ----------------------------------------------------------------------------------


class Arm:
    """The arm of examples/own_robot. Success as in its drive.py: the goal is held at the end."""

    together = 8  # how many episodes it plays at the same time
    horizon = 24  # of drive.py's 40 steps: demonstrations need at most 18
    held = 8  # at the end; drive.HELD

    def __init__(self, views: list[str], tasks: list[str], **unused):
        sys.path.insert(0, str(EXAMPLES / "own_robot"))
        from robot import COLORS

        self.views, self.colors = views, [*COLORS]
        self.tasks = tasks or self.colors
        self.robots = [self.make() for _ in range(self.together)]

    def make(self):
        """A robot."""
        from robot import Arm

        return Arm()

    def begin(self, task: str, seed: int, count: int) -> list:
        """The robots at the start of this seed, to touch the disc of this color."""
        for robot in self.robots[:count]:
            robot.reset(seed)
            robot.goal = self.colors.index(task)  # instead of the seed's color
            robot.instruction = self.instruction(task)
            robot.solved_at = []
        return self.robots[:count]

    def instruction(self, task: str) -> str:
        """A task's instruction."""
        return f"touch the {task} disc"

    def look(self, robots: list) -> list[tuple]:
        """([an image (H, W, 3) uint8 for each camera], state) of each."""
        places = [robot.data.qpos.tobytes() + robot.discs.tobytes() for robot in robots]
        seen = {}
        for place, robot in zip(places, robots, strict=True):
            if place not in seen:  # a group's first look is the same for all: render it once
                one = robot.look()
                seen[place] = ([compressed(one["images"][view]) for view in self.views], one["state"])
        return [seen[place] for place in places]

    def step(self, robot, action: np.ndarray, look: bool) -> None:
        """Execute one action. look: whether a look follows; one that renders while it steps needs it."""
        robot.move(action)
        robot.solved_at.append(robot.solved)

    def over(self, robot) -> bool:
        """It has to hold the goal until the time is up."""
        return False

    def succeeded(self, robot) -> bool:
        """The reward."""
        return all(robot.solved_at[-self.held :])


class Reach(Arm):
    """The same arm with one decision per episode (reach.py), for lesson.py."""

    horizon = 1
    held = 1

    def make(self):
        """A robot that turns to a goal."""
        from examples.rl.reach import Reach as Robot

        return Robot()


class MetaWorld:
    """examples/metaworld, with the optics of the dataset's recording."""

    together = 8
    horizon = 250  # actions; evaluation has 500 simulator steps, but successes are earlier

    def __init__(self, views: list[str], size: int, recording: dict, tasks: list[str], **unused):
        sys.path.insert(0, str(EXAMPLES / "metaworld"))
        from simulator import INSTRUCTIONS, OPTICS, Simulator, task_names

        self.make, self.instructions, self.size = Simulator, INSTRUCTIONS, size
        self.optics = {key: {"multisampling": 0, **recording}[key] for key in OPTICS}
        self.views, self.tasks = views, task_names(tasks or ["mt50"])
        self.task = None

    def begin(self, task: str, seed: int, count: int) -> list:
        """Simulators at the start of this seed. Making them takes a second: it keeps the last task's."""
        if task != self.task:
            first = self.make(task, self.views, **self.optics)
            others = [self.make(task, self.views, **self.optics, sheet=first.sheet)
                      for _ in range(self.together - 1)]
            self.task, self.trials = task, [first, *others]
        for trial in self.trials[:count]:
            trial.reset(seed)
        return self.trials[:count]

    def instruction(self, task: str) -> str:
        """A task's instruction."""
        return self.instructions[task]

    def look(self, trials: list) -> list[tuple]:
        """As Arm.look. Images are rendered one by one and read together."""
        seen = [trial.see() for trial in trials]
        trials[0].sheet.read()
        return [([decode_image(one[view], self.size) for view in self.views], one["state"]) for one in seen]

    def step(self, trial, action: np.ndarray, look: bool) -> None:
        """Execute one action."""
        trial.step(action)

    def over(self, trial) -> bool:
        """Success ends an episode."""
        return trial.over

    def succeeded(self, trial) -> bool:
        """The reward."""
        return trial.success_at is not None


class Libero:
    """examples/libero. Tasks are suites, or tasks as make_dataset.py names them: libero_object-3.

    It starts in new states, drawn as for the demonstrations: LIBERO's own 50 are for evaluation.
    """

    together = 1  # robosuite cannot have two in a process

    def __init__(self, cameras: list[str], size: int, tasks: list[str], opens_at: int, **unused):
        sys.path.insert(0, str(EXAMPLES / "libero"))
        import protocol
        from simulator import Simulator, instructions

        self.make, self.texts, self.cameras, self.size = Simulator, instructions, cameras, size
        self.protocol = protocol.Protocol(center_crop=False, opens_at=opens_at)  # the policy crops
        self.see, self.command, self.settle = protocol.see, protocol.command, protocol.settle
        self.tasks = []
        for name in tasks or ["libero_spatial"]:
            whole = name in protocol.MAX_STEPS
            self.tasks += [f"{name}-{i}" for i in range(len(instructions(name)))] if whole else [name]
        self.horizon = max(protocol.MAX_STEPS[task.rpartition("-")[0]] for task in self.tasks)
        self.task = None

    def begin(self, task: str, seed: int, count: int) -> list:
        """The simulator at the start of this seed, after the objects have settled."""
        if task != self.task:
            if self.task:
                self.simulator.close()
            suite, _, number = task.rpartition("-")
            self.simulator = self.make(suite, int(number), self.protocol.image_size, JOINT_NOISE)
            self.task = task
        self.simulator.begin_anew(seed)
        self.settle(self.simulator, self.protocol)
        return [self.simulator]

    def instruction(self, task: str) -> str:
        """A task's instruction."""
        suite, _, number = task.rpartition("-")
        return self.texts(suite)[int(number)]

    def look(self, simulators: list) -> list[tuple]:
        """As Arm.look."""
        seen = [simulator.look() for simulator in simulators]
        return [([self.see(one[camera], self.protocol, self.size) for camera in self.cameras], one["state"])
                for one in seen]

    def step(self, simulator, action: np.ndarray, look: bool) -> None:
        """Execute one action."""
        simulator.step(self.command(action, self.protocol), look)

    def over(self, simulator) -> bool:
        """Success ends an episode."""
        return bool(simulator.solved)

    def succeeded(self, simulator) -> bool:
        """The reward."""
        return bool(simulator.solved)


def compressed(image: np.ndarray) -> np.ndarray:
    """An image after JPEG with the recording's quality, as the training data have it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=95)
    return decode_image(file.getvalue(), len(image))


WORLDS = {"arm": Arm, "reach": Reach, "metaworld": MetaWorld, "libero": Libero}


def open_world(name: str, settings: dict):
    """A world by its name, or by module:class."""
    kind = WORLDS[name] if name in WORLDS else pkgutil.resolve_name(name)
    return kind(**settings)


def main() -> None:
    """Receive (name, settings), send (tasks, together, horizon), and play."""
    connection = Connection(int(sys.argv[1]))
    name, settings = connection.recv()
    world = open_world(name, settings)
    connection.send((world.tasks, world.together, world.horizon))
    serve(connection, world, world.horizon)


if __name__ == "__main__":
    main()
