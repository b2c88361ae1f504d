"""The robot of this example: an arm in MuJoCo. Replace it with yours.

record.py and drive.py need the methods of `Arm`: `reset`, `look`, `move`, `instruction`, and for
demonstrations an `expert` (you would teleoperate). Like ALOHA, SO-101, or a Franka in joint mode,
the arm receives absolute joint angles, ten times per second, and a gripper command, 1 = closed.

The task: three discs are on the table, and the instruction names the color of one. Hold the closed
gripper over it. Red is always on the left and blue on the right, at varying positions.
"""

import atexit
import os
import sys
import weakref
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")  # render without a screen

try:
    import mujoco
    import numpy as np
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}: pip install -r {Path(__file__).with_name('requirements.txt')}")

COLORS = {"red": "0.9 0.1 0.1 1", "green": "0.1 0.7 0.2 1", "blue": "0.1 0.3 0.9 1"}
# meters: shoulder to elbow, elbow to wrist, wrist to fingertips
UPPER, LOWER, HAND = 0.20, 0.18, 0.10
SPEED = 0.12  # radians that the expert turns a joint per step
REACHED = 0.04  # meters from the disc's center; also its radius
IMAGE_SIZE = 128

MODEL = f"""
<mujoco>
  <option timestep="0.005" gravity="0 0 0" integrator="implicitfast"/>
  <visual><quality offsamples="0"/><headlight ambient="0.5 0.5 0.5" diffuse="0.5 0.5 0.5"/></visual>
  <default>
    <geom contype="0" conaffinity="0"/>
    <joint damping="0.5" armature="0.01"/>
    <position kp="20" dampratio="1"/>
  </default>
  <worldbody>
    <geom type="plane" size="3 3 0.01" rgba="0.85 0.82 0.75 1"/>
    <camera name="outside" pos="0.20 0 0.85" xyaxes="0 -1 0 1 0 0" fovy="46"/>
    {"".join(f'<body name="{name}" mocap="true"><geom type="cylinder" size="{REACHED} 0.004" '
             f'rgba="{rgba}"/></body>' for name, rgba in COLORS.items())}
    <body name="upper" pos="0 0 0.08">
      <joint name="shoulder" axis="0 0 1"/>
      <geom type="cylinder" size="0.035 0.05" rgba="0.2 0.2 0.2 1"/>
      <geom type="capsule" fromto="0 0 0 {UPPER} 0 0" size="0.018" rgba="0.45 0.45 0.5 1"/>
      <body name="lower" pos="{UPPER} 0 0">
        <joint name="elbow" axis="0 0 1"/>
        <geom type="capsule" fromto="0 0 0 {LOWER} 0 0" size="0.016" rgba="0.6 0.6 0.65 1"/>
        <body name="hand" pos="{LOWER} 0 0">
          <joint name="wrist" axis="0 0 1"/>
          <geom type="box" pos="0.025 0 0" size="0.025 0.035 0.012" rgba="0.15 0.15 0.15 1"/>
          <camera name="wrist" pos="0.03 0 0.22" xyaxes="0 -1 0 0.95 0 0.31" fovy="80"/>
          <site name="tip" pos="{HAND} 0 0"/>
          <body><joint name="left" type="slide" axis="0 1 0" range="-0.025 0"/>
            <geom type="box" pos="{HAND - 0.03} 0.03 0" size="0.03 0.005 0.01" rgba="0.9 0.6 0.1 1"/></body>
          <body><joint name="right" type="slide" axis="0 -1 0" range="-0.025 0"/>
            <geom type="box" pos="{HAND - 0.03} -0.03 0" size="0.03 0.005 0.01" rgba="0.9 0.6 0.1 1"/></body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position joint="shoulder"/> <position joint="elbow"/> <position joint="wrist"/>
    <position joint="left" kp="100"/> <position joint="right" kp="100"/>
  </actuator>
</mujoco>"""


class Arm:
    """The arm, its table, and its two cameras."""

    cameras = ("outside", "wrist")
    action_names = ("shoulder", "elbow", "wrist", "gripper_closed")  # radians; 1 = closed
    state_names = action_names  # joint positions, and the gripper
    fps = 10  # frames a second: a command lasts a tenth of one
    simulator = f"mujoco {mujoco.__version__}"  # success depends on it; a real robot has none

    def __init__(self):
        self.model = mujoco.MjModel.from_xml_string(MODEL)
        self.data = mujoco.MjData(self.model)
        self.renderer = mujoco.Renderer(self.model, IMAGE_SIZE, IMAGE_SIZE)
        # at exit, while OpenGL still exists
        atexit.register(weakref.finalize(self, self.renderer.close))
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0

    def reset(self, seed: int) -> None:
        """Begin the episode of this seed: new positions of the discs, another instruction."""
        rng = np.random.default_rng(seed)
        mujoco.mj_resetData(self.model, self.data)
        angles = np.radians(np.array([42, 0, -42]) + rng.uniform(-12, 12, 3))  # left, middle, right
        self.discs = rng.uniform(0.30, 0.41, 3)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        self.data.mocap_pos[:, :2] = self.discs
        self.goal = int(rng.integers(3))
        self.instruction = f"touch the {[*COLORS][self.goal]} disc"
        self.target = np.array([-0.6, 1.2, -0.6, 0]) + np.append(rng.uniform(-0.5, 0.5, 3), 0)
        self.data.qpos[:3] = self.data.ctrl[:3] = self.target[:3]
        mujoco.mj_forward(self.model, self.data)

    def look(self) -> dict:
        """The robot's observations: {"images": {camera: (H, W, 3) uint8}, "state": (4,)
        float32}."""
        images = {}
        for camera in self.cameras:
            self.renderer.update_scene(self.data, camera)
            images[camera] = self.renderer.render()
        closed = -self.data.qpos[3] / 0.025
        return {"images": images, "state": np.float32([*self.data.qpos[:3], closed])}

    def move(self, action: np.ndarray) -> None:
        """Turn toward joint angles (3) and open or close the gripper (1 = closed), for a tenth of a
        second."""
        self.target = np.asarray(action, np.float64)
        grip = -0.025 * np.clip(self.target[3], 0, 1)
        self.data.ctrl[:] = [*self.target[:3], grip, grip]
        for _ in range(20):
            mujoco.mj_step(self.model, self.data)

    @property
    def solved(self) -> bool:
        """True if the closed gripper is over the right disc."""
        tip = self.data.site("tip").xpos[:2]
        return bool(np.linalg.norm(tip - self.discs[self.goal]) < REACHED and self.target[3] > 0.5)

    def expert(self) -> np.ndarray:
        """The demonstrator's next action, (4,) float32: turn the joints toward the disc, then
        close."""
        way = joints_at(*self.discs[self.goal]) - self.target[:3]
        step = way * min(1, SPEED / np.abs(way).max())  # all joints arrive together
        return np.float32([*self.target[:3] + step, np.abs(way).max() < 0.01])


def joints_at(x: float, y: float) -> np.ndarray:
    """The joint angles (3) that put the fingertips there (meters), or as near as the arm gets."""
    # the hand points away from the base
    angle, distance = np.arctan2(y, x), np.hypot(x, y) - HAND
    bend = (distance**2 - UPPER**2 - LOWER**2) / (2 * UPPER * LOWER)
    elbow = np.arccos(np.clip(bend, -1, 1))
    shoulder = angle - np.arctan2(LOWER * np.sin(elbow), UPPER + LOWER * np.cos(elbow))
    return np.array([shoulder, elbow, angle - shoulder - elbow])
