"""What is said over HTTP: a request's JSON to arrays, checked, and the action back to JSON.

(openpi_wire.py: what is said over a websocket. The parts of a request are checked here for both.)
serve_vla.py describes the forms. Read parse_request. All that comes in may be anything: it is measured before
it is made into an array or a picture, and nothing is ever unpickled.
"""

import base64
import io
import itertools
import json
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from act import Policy
from machinery.config import UserError
from machinery.convention import Convention
from machinery.images import decode_native

MAX_BODY = 32 << 20  # bytes of a request: as plain lists, images up to about full HD
MAX_INSTRUCTION = 1000  # bytes; tokens, which a model may allow fewer of, it counts itself
SIDES = (16, 4096)  # pixels: smallest and largest height or width; also what one request can cost in memory


class RequestError(UserError):
    """A request that cannot be answered. The message names the field and the cure."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass
class Query:
    """A checked request. views: N images (H, W, 3) uint8; proprio: (P,) float32 if the model uses it; prefix:
    (k, A) float64, often of no step."""

    views: list[np.ndarray]
    instruction: str
    unnorm_key: str
    proprio: np.ndarray | None
    prefix: np.ndarray
    form: str  # of the reply: numpy, encoded or list


def parse_request(body: bytes, policy: Policy) -> Query:
    """Read and check a request to a model. Raises RequestError."""
    payload = read_object(body, "the request")
    encoded = "encoded" in payload
    if encoded:
        if len(payload) > 1 or not isinstance(payload["encoded"], str):
            raise RequestError("encoded: must be a string of JSON, and the only field")
        payload = read_object(payload["encoded"], "encoded")
    known = ("image", "images", "instruction", "unnorm_key", "proprio", "prefix")
    for key in payload:
        if key not in known:
            raise RequestError(f"unknown field {key[:80]!r}: the fields are {', '.join(known)}")

    images, instruction = parse_images(payload, policy), parse_text(payload.get("instruction"), "instruction")
    unnorm_key, robot = parse_key(payload.get("unnorm_key"), policy)
    several = payload.get("images", [])
    several = several.values() if isinstance(several, dict) else several
    sent = [*several, payload.get("image"), payload.get("proprio")]
    arrays = any(isinstance(value, dict) for value in sent)
    return Query(images, instruction, unnorm_key,
                 parse_proprio(payload.get("proprio"), policy.cfg.use_proprio, robot.state),
                 parse_prefix(payload.get("prefix"), policy, unnorm_key),
                 "encoded" if encoded else "numpy" if arrays else "list")


def parse_text(value, name: str) -> str:
    """The instruction."""
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{name}: must be text that says what to do, such as \"open the drawer\"")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"{name}: is no Unicode text: {error}: send UTF-8") from error
    if size > MAX_INSTRUCTION:
        raise RequestError(f"{name}: longer than {MAX_INSTRUCTION} bytes: shorten it")
    return value


def parse_key(value, policy: Policy) -> tuple[str, Convention]:
    """unnorm_key, which may be left out -> one of the model's datasets, and how its robot speaks."""
    if not isinstance(value, str | None):
        raise RequestError(f"unnorm_key: must be one of {', '.join(sorted(policy.norm_stats))}")
    try:
        return policy.dataset_name(value), policy.convention(value)
    except UserError as error:
        raise RequestError(f"{error}"[:2000]) from error


def read_object(text: bytes | str, name: str) -> dict:
    """JSON -> the object it must be."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # bad UTF-8, too, is a ValueError
        raise RequestError(f"{name}: is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{name}: must be a JSON object {{\"image\": ..., \"instruction\": ...}}, not a "
                           f"{type(value).__name__}")
    return value


def parse_images(payload: dict, policy: Policy) -> list[np.ndarray]:
    """The fields `image` or `images` -> as many images as the model looks at, in the order of training."""
    count, cameras = policy.vla.num_images, policy.cfg.cameras
    if ("image" in payload) == ("images" in payload):
        raise RequestError("image: send either image or images")
    if "image" in payload and count > 1:
        raise RequestError(f"image: this model looks at {count} images (frames x cameras "
                           f"{', '.join(cameras)}, oldest first): send them as a list `images`")
    images = payload.get("images", [payload.get("image")])
    if isinstance(images, dict) and count == len(cameras):
        if images.keys() != set(cameras):
            raise RequestError(f"images: of the cameras {', '.join(images)[:200]}: must be of "
                               f"{', '.join(cameras)}")
        return [parse_image(images[camera], f"images[{camera!r}]") for camera in cameras]
    if not isinstance(images, list) or len(images) != count:
        what = f"a list of {len(images)}" if isinstance(images, list) else f"a {type(images).__name__}"
        raise RequestError(f"images: must be a list of {count}, this is {what}")
    names = [f"images[{i}]" for i in range(count)] if "images" in payload else ["image"]
    return [parse_image(image, name) for image, name in zip(images, names, strict=True)]


def parse_image(value, name: str) -> np.ndarray:
    """One image in any of its forms -> (H, W, 3) uint8."""
    if isinstance(value, str | bytes):
        return decode_picture(read_base64(value, name), name)
    image = parse_array(value, name)
    if image.ndim != 3 or image.shape[2] != 3:
        raise RequestError(f"{name}: has shape {list(image.shape)}, must be [height, width, 3], red first")
    check_sides(*image.shape[:2], name)
    if image.dtype.kind not in "iu" or image.min() < 0 or image.max() > 255:
        raise RequestError(f"{name}: must hold whole numbers 0..255: send uint8 (for an image in 0..1, "
                           "multiply by 255 and round)")
    return image.astype(np.uint8)


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """A JPEG or PNG file -> (H, W, 3) uint8, decoded as the training images are."""
    try:
        picture = Image.open(io.BytesIO(data), formats=["JPEG", "PNG"])  # reads no more than the header
    except Exception as error:  # Pillow raises many kinds, here and below
        raise RequestError(f"{name}: is no JPEG or PNG file") from error
    check_sides(picture.height, picture.width, name)
    if picture.mode not in ("RGB", "RGBA", "L", "P"):
        raise RequestError(f"{name}: is a picture of mode {picture.mode}: send 8-bit RGB")
    try:
        return decode_native(data)
    except Exception as error:
        raise RequestError(f"{name}: a damaged JPEG or PNG file: {str(error)[:200]}") from error


def check_sides(height: int, width: int, name: str) -> None:
    """Raise RequestError for an image too small to be one, or too large."""
    low, high = SIDES
    if not (low <= height <= high and low <= width <= high):
        raise RequestError(f"{name}: is {height} x {width} pixels; each side must be {low}..{high}")


def parse_proprio(value, wanted: bool, labels: list[str], name: str = "proprio") -> np.ndarray | None:
    """The robot's state -> a float32 for each of the labels, which say what they are."""
    if not wanted:
        if value is not None:
            raise RequestError(f"{name}: this model was trained without the robot's state: leave it out")
        return None
    size = len(labels)
    if value is None:
        raise RequestError(f"{name}: missing: this model needs the robot's state, {size} numbers")
    state = parse_array(value, name)
    if state.shape != (size,):
        raise RequestError(f"{name}: has shape {list(state.shape)}, must be [{size}]: {', '.join(labels)}")
    with np.errstate(over="ignore"):
        state = state.astype(np.float32)
    if not np.isfinite(state).all():
        raise RequestError(f"{name}: must hold finite numbers")
    return state


def parse_prefix(value, policy: Policy, unnorm_key: str) -> np.ndarray:
    """The chunk's first actions, where they are settled -> (k, A) float64."""
    shape = value.get("shape") if isinstance(value, dict) else None
    if value is None or value == [] or (isinstance(shape, list) and shape[:1] == [0]):
        return np.zeros((0, len(policy.convention(unnorm_key).action)))
    prefix = parse_array(value, "prefix").astype(np.float64)
    try:
        policy.known_tokens(prefix[None], 1, unnorm_key)
    except UserError as error:
        raise RequestError(str(error)) from error
    return prefix


def parse_array(value, name: str) -> np.ndarray:
    """json_numpy's form of an array, or plain lists -> an array of whole or floating-point numbers."""
    if isinstance(value, list):
        within = value
        while (kinds := set(map(type, within))) == {list}:
            within = [*itertools.chain.from_iterable(within)]
        if not kinds <= {int, float}:  # of texts, NumPy would give each as much room as the longest takes
            raise RequestError(f"{name}: must hold numbers alone, in lists that are equally deep")
        try:
            array = np.array(value)
        except (ValueError, OverflowError) as error:
            raise RequestError(f"{name}: its lists are of different lengths, or too deep") from error
        if array.dtype.kind not in "iuf":
            raise RequestError(f"{name}: its numbers are too large")
        return array
    if not isinstance(value, dict) or value.keys() != {"__numpy__", "dtype", "shape"}:
        raise RequestError(f'{name}: must be an array (in JSON {{"__numpy__": base64, "dtype": ..., "shape":'
                           " ...}), or a list" + ", or a JPEG or PNG file in base64" * ("image" in name))
    dtype, shape = value["dtype"], value["shape"]
    if not isinstance(dtype, str) or not re.fullmatch(r"[<>|=]?([iu][1248]|f[248])", dtype):
        raise RequestError(f"{name}: dtype {str(dtype)[:80]!r}: send integers or floats, such as "
                           "|u1 or <f4")
    if (not isinstance(shape, list) or not 1 <= len(shape) <= 4
            or not all(type(n) is int and 0 < n <= MAX_BODY for n in shape)):
        raise RequestError(f"{name}: shape: must be a list of 1 to 4 positive whole numbers")
    data, dtype = read_base64(value["__numpy__"], f"{name}: __numpy__"), np.dtype(dtype)
    wanted = dtype.itemsize
    for n in shape:
        wanted *= n  # Python's whole numbers, which cannot overflow
    if len(data) != wanted:
        raise RequestError(f"{name}: holds {len(data)} bytes, but shape {shape} of {dtype} has {wanted}")
    return np.frombuffer(data, dtype).reshape(shape)


def read_base64(text, name: str) -> bytes:
    """Base64 text -> bytes. Bytes themselves, which only openpi_wire.py can have, stay as they are."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise RequestError(f"{name}: must be base64 text, not a {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(f"{name}: is not base64 (without line breaks): {error}") from error


def encode_action(action: np.ndarray, form: str) -> str:
    """The reply to a request."""
    if form == "list":
        return json.dumps(action.tolist())
    array = {"__numpy__": base64.b64encode(action.tobytes()).decode(), "dtype": action.dtype.str,
             "shape": action.shape}
    return json.dumps(array if form == "numpy" else json.dumps(array))
