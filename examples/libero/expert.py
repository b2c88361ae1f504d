"""A scripted expert for LIBERO: picks an object up and puts it into the basket or onto the plate.

    python examples/libero/expert.py --trials 50       its success rates from LIBERO's own start states

It knows all object positions, which a policy does not, and answers like a policy: with changes of
the hand's position and a gripper command. It only uses current positions, and remembers only the
shape of the object, so it also recovers from disturbances. Read act.

People recorded LIBERO's demonstrations. These are not LIBERO's demonstrations.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for each simulator; there is one per core
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

import machinery.config  # noqa: F401  first: it names a missing package

# isort: split

import mujoco
import numpy as np
from protocol import MAX_STEPS, Protocol, settle
from simulator import Simulator, instructions

from examples import closed_loop
from machinery.host import cores

STRIDE = 0.05  # m: the controller's displacement for an action of 1
GAIN = 1.8  # multiplies the commanded distance, because the hand lags behind
CLEAR = 0.02  # m, above objects that it passes over
WIDEST = 0.072  # m: the widest object that fits between the fingers
# its tasks, see README.md
TASKS = {"libero_object": range(10), "libero_spatial": (0, 1, 2, 3, 7, 8)}


class Expert:
    """The expert for one episode of one task, from its beginning (after settling)."""

    def __init__(self, simulator: Simulator):
        self.env = simulator.env.env
        # one object, in or on one place
        ((_, self.thing, place),) = self.env.parsed_problem["goal_state"]
        self.place = place.removesuffix("_contain_region")
        extents = {name: self.extent(name) for name in self.env.objects_dict}
        (low, high), where = extents[self.thing], self.position(self.thing)
        others = [extent for name, extent in extents.items() if name != self.thing]
        x, y = (low[:2] + high[:2]) / 2
        depth = min(0.03, 0.6 * (high[2] - low[2]))  # the fingers reach this far below its top
        if high[1] - low[1] > WIDEST:  # grasp its rim, one finger inside; its wall leans outward
            depth = 0.024
            y = max((low[1] + 0.011, high[1] - 0.011), key=lambda y: room(x, y, others))
        # relative to its origin
        self.depth, self.grip = depth, np.array([x, y, high[2] - depth]) - where
        way = np.linspace(where, self.position(self.place), 20)
        met = [high[2] for low, high in extents.values()
               if min(room(*point[:2], [(low, high)]) for point in way) < 0.1]
        # height of its origin that clears the objects on the way
        self.height = max(met) + CLEAR - (low[2] - where[2])

    def act(self) -> np.ndarray:
        """The next action (7,), each in -1..1; for the gripper, 1 closes and -1 opens."""
        hand = self.env.sim.data.site_xpos[self.env.robots[0].eef_site_id]
        thing = self.position(self.thing)
        if self.env._check_success():
            return self.move(np.zeros(3), close=False)
        if not self.holds():
            to_go = thing + self.grip - hand
            there = np.linalg.norm(to_go) < 0.01
            around = to_go[2] > -self.depth  # the object is between the fingers
            if np.linalg.norm(to_go[:2]) > (0.015 if around else 0.006):
                to_go[2] += self.depth + CLEAR  # first above it
            return self.move(to_go, close=there)
        to_go = self.position(self.place) - thing
        up = self.height - thing[2]
        if np.linalg.norm(to_go[:2]) < (0.015 if up < CLEAR else 0.025):
            to_go[2] = -CLEAR  # down, until it touches or LIBERO reports success
        else:
            to_go = np.array([*(to_go[:2] if up < CLEAR else (0, 0)), up])  # first up
        return self.move(to_go, close=True)

    @staticmethod
    def move(to_go: np.ndarray, close: bool) -> np.ndarray:
        """Move by (3,) m, without turning the hand."""
        ask = GAIN * to_go / STRIDE
        ask /= max(1, np.abs(ask).max())  # in a straight line
        return np.array([*ask, 0, 0, 0, 1 if close else -1], np.float32)

    # ---- Its knowledge -------------------------------------------------------------------------

    def position(self, name: str) -> np.ndarray:
        """The position of an object's origin, (3,) m."""
        return self.env.sim.data.body_xpos[self.env.obj_body_id[name]].copy()

    def holds(self) -> bool:
        """True if both fingers touch the object."""
        parts = self.env.robots[0].gripper.important_geoms
        fingers = [parts["left_finger"], parts["right_finger"]]
        return self.env._check_grasp(fingers, self.env.get_object(self.thing))

    def extent(self, name: str) -> np.ndarray:
        """An object's current bounding box, (2, 3) m, from its collision shapes."""
        model, data = self.env.sim.model._model, self.env.sim.data._data
        corners, root = [], self.env.obj_body_id[name]
        for geom in range(model.ngeom):
            body = model.geom_bodyid[geom]
            while body not in (0, root):
                body = model.body_parentid[body]
            if body == root and model.geom_group[geom] == 0:
                points = corners_of(model, geom)
                corners.append(points @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
        return np.stack([np.concatenate(corners).min(0), np.concatenate(corners).max(0)])


def room(x: float, y: float, extents) -> float:
    """The distance of the nearest of some objects from a place on the table, m."""
    return min(np.linalg.norm(np.clip((x, y), low[:2], high[:2]) - (x, y)) for low, high in extents)


def corners_of(model, geom: int) -> np.ndarray:
    """Points that span one of MuJoCo's shapes, (N, 3) m in its own frame."""
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        return model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
    signs = np.stack(np.meshgrid(*[[-1, 1]] * 3), -1).reshape(8, 3)
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_CYLINDER:  # its size is radius, half height
        return signs * model.geom_size[geom][[0, 0, 1]]
    return signs * model.geom_size[geom]


# --------------------------------------------------------------------------------------------------
# Success rates


def succeeds(suite: str, task: int, trials: list[int]) -> list[int | None]:
    """Play a task from some of LIBERO's start states -> steps until success, or None."""
    simulator, steps = Simulator(suite, task, 0, draws=False), []
    for trial in trials:
        simulator.begin(trial, seed=0)
        settle(simulator, Protocol())
        expert, begun = Expert(simulator), simulator.steps
        while not simulator.solved and simulator.steps - begun < MAX_STEPS[suite]:
            simulator.step(expert.act(), look=False)
        steps.append(simulator.steps - begun if simulator.solved else None)
    simulator.close()
    return steps


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="how often the scripted expert succeeds")
    parser.add_argument("--trials", type=int, default=50,
                        help="start states of each task; LIBERO has 50")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    args = parser.parse_args()
    blocks = [range(first, min(first + 10, args.trials)) for first in range(0, args.trials, 10)]
    everything = []
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        jobs = {(suite, task): [pool.submit(succeeds, suite, task, block) for block in blocks]
                for suite in TASKS for task in TASKS[suite]}
        for (suite, task), results in jobs.items():
            steps = [count for job in results for count in job.result()]
            everything += steps
            mean = np.mean([count for count in steps if count is not None] or [np.nan])
            entry = closed_loop.rate([count is not None for count in steps])
            print(f"{closed_loop.row(f'{suite}-{task}', entry, 18)}  {mean:.0f} steps  "
                  f"{instructions(suite)[task]}", flush=True)
    print(closed_loop.row("success", closed_loop.rate([count is not None for count in everything]), 18))


if __name__ == "__main__":
    main()
