"""Meta-World's tasks as a robot with cameras: reset, look, act.

make_dataset.py drives it with the scripted experts, and rollout.py with a trained policy, so that
both use the same images and actions. The evaluation is LeRobot's: positions are drawn uniformly
from Meta-World's own ranges, an episode has at most 500 simulator steps, and it succeeds at the
first step at which Meta-World reports success.
"""

import atexit
import functools
import io
import os
import pickle
import warnings
import weakref
from collections.abc import Callable

os.environ.setdefault("MUJOCO_GL", "egl")
warnings.filterwarnings("ignore", message="Constant")  # experts command more than [-1, 1]; we clip

import metaworld
import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from OpenGL import GL
from PIL import Image

from machinery.config import UserError

# LeRobot's instructions for MT50. Two of its tasks share "Push the puck to a goal". Here push-
# back-v3 reads "Push the puck back to a goal", so that all 50 differ.
INSTRUCTIONS = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "disassemble-v3": "Pick a nut out of a peg",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "hand-insert-v3": "Insert the gripper into a hole",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "hammer-v3": "Hammer a screw on the wall",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "peg-insert-side-v3": "Insert a peg sideways",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "reach-v3": "Reach a goal position",
    "push-back-v3": "Push the puck back to a goal",
    "push-v3": "Push the puck to a goal",
    "pick-place-v3": "Pick and place a puck to a goal",
    "plate-slide-v3": "Slide a plate into a cabinet",
    "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "soccer-v3": "Kick a soccer into the goal",
    "stick-push-v3": "Grasp a stick and push a box using the stick",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
    "window-open-v3": "Push and open a window",
    "window-close-v3": "Push and close a window",
}
GROUPS = {  # difficulty, as in Seo et al., "Masked World Models for Visual Control" (2022)
    "easy": ["button-press-v3", "button-press-topdown-v3", "button-press-topdown-wall-v3",
             "button-press-wall-v3", "coffee-button-v3", "dial-turn-v3", "door-close-v3", "door-lock-v3",
             "door-open-v3", "door-unlock-v3", "drawer-close-v3", "drawer-open-v3", "faucet-close-v3",
             "faucet-open-v3", "handle-press-v3", "handle-press-side-v3", "handle-pull-v3",
             "handle-pull-side-v3", "lever-pull-v3", "plate-slide-v3", "plate-slide-back-v3",
             "plate-slide-back-side-v3", "plate-slide-side-v3", "reach-v3", "reach-wall-v3",
             "window-close-v3", "window-open-v3", "peg-unplug-side-v3"],
    "medium": ["basketball-v3", "bin-picking-v3", "box-close-v3", "coffee-pull-v3", "coffee-push-v3",
               "hammer-v3", "peg-insert-side-v3", "push-wall-v3", "soccer-v3", "sweep-v3", "sweep-into-v3"],
    "hard": ["assembly-v3", "hand-insert-v3", "pick-out-of-hole-v3", "pick-place-v3", "push-v3",
             "push-back-v3"],
    "very_hard": ["shelf-place-v3", "disassemble-v3", "stick-pull-v3", "stick-push-v3", "pick-place-wall-v3"],
}
TASKS = {
    "demo": ["button-press-topdown-v3", "coffee-button-v3", "drawer-close-v3", "plate-slide-v3", "reach-v3",
             "window-close-v3"],
    "mt50": list(INSTRUCTIONS),
    **GROUPS,
}
MAX_STEPS = 500  # simulator steps, Meta-World's own limit
HIDDEN = 5  # a group of geoms that MuJoCo does not draw
# success depends on their versions
PACKAGES = ("mujoco", "metaworld")
# the settings of a dataset's recording
OPTICS = ("image_size", "jpeg_quality", "action_repeat", "multisampling")


def task_names(names: list[str]) -> list[str]:
    """Names of tasks and of lists of tasks -> tasks. Raises UserError for an unknown name."""
    tasks = [task for name in names for task in TASKS.get(name, [name])]
    if unknown := [task for task in tasks if task not in INSTRUCTIONS]:
        raise UserError(f"no task {unknown[0]!r}: choose {', '.join(TASKS)} or of {', '.join(INSTRUCTIONS)}")
    return list(dict.fromkeys(tasks))


class Sheet:
    """Images of one task, rendered side by side on one surface and read together.

    Reading an image waits for its rendering, and for all other rendering on that GPU. So images are
    rendered at their time, and read later, many at once.
    """

    def __init__(self, model: mujoco.MjModel, size: int, side: int = 8):
        """size: an image's width and height in pixels. The sheet holds side * side images."""
        self.size, self.side, self.keepers = size, side, []
        self.model, self.groups, self.shown = model, model.geom_group, model.geom_group.copy()
        self.renderer = mujoco.Renderer(model, size, size)
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.opengl = self.renderer._mjr_context
        mujoco.mjr_addAux(0, side * size, side * size, 0, self.opengl)
        # at exit, while OpenGL still exists
        atexit.register(weakref.finalize(self, self.renderer.close))

    def draw(self, data: mujoco.MjData, camera: str, keep: Callable) -> None:
        """Render the current view of a camera. `keep` is called with (size, size, 3) uint8 when the
        sheet is read."""
        if len(self.keepers) == self.side**2:
            self.read()
        size, groups = self.size, self.groups
        y, x = (size * i for i in divmod(len(self.keepers), self.side))
        # most triangles are those of the arm, which is behind the wrist camera
        groups[:] = np.where(out_of_view(self.model, data, self.model.camera(camera).id), HIDDEN, self.shown)
        self.renderer.update_scene(data, camera)
        groups[:] = self.shown
        self.renderer._gl_context.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.opengl)
        mujoco.mjr_render(mujoco.MjrRect(0, 0, size, size), self.renderer.scene, self.opengl)
        # rendered in one place and copied: elsewhere, a few pixels would round differently
        here, there = (0, 0, size, size), (x, y, x + size, y + size)
        GL.glBindFramebuffer(GL.GL_DRAW_FRAMEBUFFER, self.opengl.auxFBO[0])
        GL.glBlitFramebuffer(*here, *there, GL.GL_COLOR_BUFFER_BIT, GL.GL_NEAREST)
        self.keepers.append(keep)

    def read(self) -> None:
        """Pass each rendered image to its `keep`."""
        if not self.keepers:
            return
        size, columns = self.size, min(self.side, len(self.keepers))
        rows = -(-len(self.keepers) // columns)
        self.renderer._gl_context.make_current()
        GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, self.opengl.auxFBO[0])
        pixels = GL.glReadPixels(0, 0, columns * size, rows * size, GL.GL_RGB, GL.GL_UNSIGNED_BYTE)
        tiles = np.frombuffer(pixels, np.uint8).reshape(rows, size, columns, size, 3)
        keepers, self.keepers = self.keepers, []
        for i, keep in enumerate(keepers):
            # OpenGL's rows begin at the bottom
            keep(np.ascontiguousarray(tiles[i // columns, ::-1, i % columns]))


def out_of_view(model: mujoco.MjModel, data: mujoco.MjData, camera: int) -> np.ndarray:
    """(geoms,) bool: the bounding sphere is outside of a camera's square picture, or behind it."""
    # x and y of the picture, and z towards the camera
    place = (data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)
    half, radius = np.radians(model.cam_fovy[camera]) / 2, model.geom_rbound  # 0: a plane
    beside = np.abs(place[:, :2]).max(1) * np.cos(half) + place[:, 2] * np.sin(half)
    return (radius > 0) & ((beside > radius) | (place[:, 2] > radius))


class Simulator:
    """One Meta-World task and its cameras."""

    def __init__(self, task: str, cameras: list[str], image_size: int, jpeg_quality: int, action_repeat: int,
                 multisampling: int = 0, sheet: Sheet | None = None):
        """cameras: `image` (Meta-World's corner2 at LeRobot's position, upright) or Meta-World's
        names, such as gripperPOV. action_repeat: simulator steps (80 per second) per action.
        multisampling: samples per pixel, for smooth edges: 4 are cheap on a GPU and double a CPU's
        rendering time. sheet: the sheet of another Simulator of the same task in this process."""
        self.cameras, self.jpeg_quality, self.action_repeat = cameras, jpeg_quality, action_repeat
        env_class = ALL_V3_ENVIRONMENTS[task]
        self.env = env_class()
        # the same as metaworld.MT1, without resetting the task fifty times for unused positions
        goal = {"env_cls": env_class, "rand_vec": None, "partially_observable": False}
        self.env.set_task(metaworld.Task(env_name=task, data=pickle.dumps(goal)))
        # positions follow the seed
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        self.env.model.cam_pos[2] = [0.75, 0.075, 0.7]
        self.env.model.vis.quality.offsamples = multisampling
        self.sheet = sheet or Sheet(self.env.model, image_size)

    def reset(self, seed: int) -> None:
        """Begin the episode of this seed."""
        self.env.seed(seed)
        self.state, _ = self.env.reset()
        # Meta-World moves the goal last without updating the physics: the first image would show it
        # at the position of the first of its two resets. This changes no trajectory.
        mujoco.mj_kinematics(self.env.model, self.env.data)
        mujoco.mj_camlight(self.env.model, self.env.data)
        self.state[:18] = self.state[18:36] = self.env._prev_obs = self.env._get_curr_obs_combined_no_goal()
        self.steps, self.success_at = 0, None  # both count simulator steps

    @property
    def over(self) -> bool:
        """True if the task is solved or the time is up."""
        return self.success_at is not None or self.steps >= MAX_STEPS

    def see(self) -> dict:
        """Like observation, but the images are filled in when self.sheet is read."""
        seen = {"state": self.state[:4].astype(np.float32)}
        for camera in self.cameras:
            self.draw(camera, self.sheet, functools.partial(self.store, seen, camera))
        return seen

    def observation(self) -> dict:
        """-> {camera: JPEG bytes, ..., "state": (4,) float32: hand x, y, z in meters, gripper
        opening 0..1}."""
        seen = self.see()
        self.sheet.read()
        return seen

    def store(self, seen: dict, camera: str, pixels: np.ndarray) -> None:
        """Store an image in an observation as JPEG, with full color resolution at high quality."""
        encoded = io.BytesIO()
        # goals are colored dots, a few pixels wide
        subsampling = 0 if self.jpeg_quality >= 90 else 2
        Image.fromarray(pixels).save(encoded, "jpeg", quality=self.jpeg_quality, subsampling=subsampling)
        seen[camera] = encoded.getvalue()

    def draw(self, camera: str, sheet: Sheet, keep: Callable) -> None:
        """Render a camera's view on a sheet; its keeper gets it upright."""
        if camera == "image":
            sheet.draw(self.env.data, "corner2", lambda pixels: keep(pixels[::-1, ::-1]))
        else:
            sheet.draw(self.env.data, camera, keep)

    def step(self, action: np.ndarray) -> None:
        """Hold the action (4,), hand velocity x, y, z and gripper effort in [-1, 1], for
        action_repeat simulator steps or until the episode is over."""
        # after success it continues: demonstrations may have a tail
        solved = self.success_at is not None
        # float32 would change the last bits
        action = np.clip(np.asarray(action, np.float64), -1, 1)
        for _ in range(self.action_repeat):
            self.state, *_, info = self.env.step(action)
            self.steps += 1
            if info["success"] and not solved:
                self.success_at = self.steps
            if self.steps >= MAX_STEPS or (self.over and not solved):
                break
