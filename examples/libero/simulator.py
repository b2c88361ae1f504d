"""LIBERO's tasks as a robot with cameras: begin an episode, look, act.

make_dataset.py drives it with the scripted expert, and rollout.py with a trained policy, so that
both use the same images and actions. It matches LIBERO's own loop to the last bit of states and
images (tests/test_libero.py), and skips unused work: LIBERO renders both cameras at every step and
rebuilds the scene for every episode, which is nearly all of its time.
"""

import atexit
import functools
import gc
import os

os.environ.setdefault("MUJOCO_GL", "egl")  # or osmesa; read once, when MuJoCo is imported

import mujoco
import numpy as np
import robosuite.utils.transform_utils as transforms
from libero.libero import benchmark
from libero.libero.envs.env_wrapper import ControlEnv
from protocol import CAMERAS, MAX_STEPS

from machinery.config import UserError

TRIALS = 50  # LIBERO's fixed start states per task


@functools.cache
def suite_of(name: str):
    """LIBERO's description of a suite."""
    if name not in MAX_STEPS:
        raise UserError(f"no suite {name!r}: choose {', '.join(MAX_STEPS)}")
    return benchmark.get_benchmark_dict()[name]()


def instructions(suite: str) -> list[str]:
    """The instruction of each task of a suite, in LIBERO's order: a task is its index in this
    list."""
    return [task.language for task in suite_of(suite).tasks]


class Simulator:
    """One task of LIBERO and its cameras.

    A process can only have one at a time: robosuite renders into the OpenGL context created last.
    """

    def __init__(self, suite: str, task: int, image_size: int, joint_noise: float = 0.0, draws: bool = True):
        """image_size: side of an image in pixels. joint_noise: rad, standard deviation of the arm's
        start in `begin_anew`. draws: False if images are not needed; then OpenGL is not needed
        either."""
        self.suite, self.task, self.image_size, self.joint_noise = suite, task, image_size, joint_noise
        self.looking = False
        self.env = ControlEnv(suite_of(suite).get_task_bddl_file_path(task), use_camera_obs=draws,
                              has_offscreen_renderer=draws, hard_reset=False, camera_heights=image_size,
                              camera_widths=image_size, camera_names=[*CAMERAS.values()])
        scene, model = mujoco.MjModel.from_xml_string(self.env.env.model.get_xml()), self.env.sim.model
        names = {fixture.root_body for fixture in self.env.env.fixtures_dict.values()} & {*model.body_names}
        self.furniture = {model.body_name2id(name): (scene.body(name).pos, scene.body(name).quat)
                          for name in names}
        atexit.register(self.close)  # close OpenGL before Python shuts down
        for camera in CAMERAS.values() if draws else ():
            name = f"{camera}_image"
            self.env.env.modify_observable(name, "sensor", self.draw_when_looking(
                self.env.env._observables[name]._sensor))

    def draw_when_looking(self, sensor):
        """A camera that renders only if a look is requested, and otherwise returns black images.
        LIBERO's cameras render within a step, not at its end, so this keeps their clock."""
        @functools.wraps(sensor)  # including robosuite's marks on it
        def picture(cache: dict) -> np.ndarray:
            size = self.image_size
            return sensor(cache) if self.looking else np.zeros((size, size, 3), np.uint8)

        return picture

    def begin(self, trial: int, seed: int) -> None:
        """Begin at LIBERO's start state number `trial`.

        A start state holds the positions of movable objects. The task's sampler places furniture,
        with the (trial + 1)-th draw after the seed, as in OpenVLA's loop, which plays the trials in
        order.
        """
        if not 0 <= trial < TRIALS:
            raise UserError(f"trial {trial}: each task of LIBERO has {TRIALS} start states, from 0")
        self.place(seed, trial + 1, 0.0)
        state = suite_of(self.suite).get_task_init_states(self.task)[trial]
        self.seen = self.env.set_init_state(state)

    def begin_anew(self, seed: int) -> None:
        """Begin in a new state: objects are drawn from the task's own ranges by this seed."""
        self.place(seed, 1, self.joint_noise)

    def place(self, seed: int, drawings: int, joint_noise: float) -> None:
        """Draw positions so many times, starting from a seed."""
        self.env.robots[0].initialization_noise["magnitude"] = joint_noise
        self.env.seed(seed)
        for _ in range(drawings):
            # LIBERO adds an object's offset on a piece of furniture to the furniture's current
            # position, and assumes that the scene is new
            for body, (place, turn) in self.furniture.items():
                self.env.sim.model.body_pos[body], self.env.sim.model.body_quat[body] = place, turn
            self.seen = self.env.reset()
        gripper = self.env.robots[0].gripper  # its last command is still stored there
        gripper.current_action = np.zeros_like(gripper.current_action)
        self.steps, self.solved = 0, False

    def step(self, action: np.ndarray, look: bool) -> None:
        """One step of 1/20 s. action (7,), each in -1..1: changes of the hand's position (1 is 5
        cm) and rotation (axis times angle; 1 is 0.5 rad) to head for, and the gripper, 1 = close.
        look: whether `look` will be called after this step."""
        self.looking = look
        self.seen, _, self.solved, _ = self.env.step(np.asarray(action, np.float64))
        self.steps += 1

    def look(self) -> dict:
        """{camera of the model: (S, S, 3) uint8, as rendered by the simulator: upside down,
        "state": (8,) float32: the hand's position in m, its rotation as axis times angle, both
        fingers' positions in m, "joint_state": (7,) float32, rad}."""
        seen, rotation = self.seen, transforms.quat2axisangle(self.seen["robot0_eef_quat"].copy())
        state = np.concatenate([seen["robot0_eef_pos"], rotation, seen["robot0_gripper_qpos"]])
        return {**{name: seen[f"{camera}_image"] for name, camera in CAMERAS.items()},
                "state": state.astype(np.float32), "joint_state": seen["robot0_joint_pos"].astype(np.float32)}

    def close(self) -> None:
        """Make room for another simulator."""
        atexit.unregister(self.close)
        self.env.close()
        del self.env
        gc.collect()  # a scene is a gigabyte with reference cycles
