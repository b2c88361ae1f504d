"""A simulator of a few lines for examples/rl/rl.py: --world examples.rl.paper_world:PaperWorld.

An episode has six steps. It succeeds if the first numbers of its actions have the task's sign on average.
"""

import numpy as np


class PaperWorld:
    together = 4  # two jobs for a group of 8
    horizon = 6  # with --execute 4 of a chunk of 5: the second decision is executed in part
    ends_early = False

    def __init__(self, tasks, size, **unused):
        self.tasks, self.size = tasks or ["up", "down"], size

    def begin(self, task, seed, count):
        picture = np.random.default_rng(seed).integers(0, 256, (self.size, self.size, 3)).astype(np.uint8)
        return [{"task": task, "picture": picture, "actions": []} for _ in range(count)]

    def instruction(self, task):
        return f"move {task}"

    def look(self, trials):
        return [([trial["picture"]], np.zeros(4, np.float32)) for trial in trials]

    def step(self, trial, action, look):
        trial["actions"].append(action)

    def over(self, trial):
        return False

    def succeeded(self, trial):
        mean = np.mean([action[0] for action in trial["actions"]])
        return bool(mean > 0 if trial["task"] == "up" else mean < 0)
