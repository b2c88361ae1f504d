"""Reading requests and writing replies, in both protocols of serve_vla.py.

OpenVLA's clients send JSON over HTTP, with arrays as json_numpy objects or plain lists. openpi's
clients send msgpack over a websocket, with an array as a map of four keys: b"__ndarray__", b"data",
b"dtype" and b"shape".

    {"observation/image": array, "observation/wrist_image": array, "observation/state": array,
     "prompt": text}
    -> {"actions": array (action_chunk, A), "server_timing": {"infer_ms": ...}}

Read parse_request and parse_observation: both turn bytes into a Query. The bytes are untrusted:
sizes are checked before an array or a picture is made, and nothing is unpickled. Policy checks the
shapes of state and prefix.
"""

import base64
import functools
import io
import itertools
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any

import msgpack
import numpy as np
from PIL import Image
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError, create_model
from pydantic_core import from_json

from act import Policy
from machinery.config import UserError
from machinery.images import decode_native

MAX_BODY = 32 << 20  # bytes of a request: as plain lists, images up to about full HD
MAX_KEYS = 100  # in an object: pydantic would describe every unknown key
MAX_LENGTH = 1024  # items in a msgpack list or map; arrays of numbers arrive as bytes
MAX_PARTS = 1000  # lists and maps in a msgpack message; an honest one has about ten
SIDES = (16, 4096)  # smallest and largest height or width in pixels
MAX_SCANS = 32  # of a progressive JPEG; cameras and encoders write about ten


class RequestError(UserError):
    """A request that cannot be answered. The message names the field and the cure."""


@dataclass
class Query:
    """A request to the model."""

    views: list[np.ndarray]  # N images (H, W, 3) uint8, in the order of training
    instruction: str
    unnorm_key: str
    proprio: np.ndarray | None  # if the model uses the robot's state
    prefix: np.ndarray  # (k, A) float64; usually k = 0
    form: str = "openpi"  # of the reply; over HTTP "numpy", "encoded" or "list"


# ---- OpenVLA's JSON ----------------------------------------------------------------------------

Text = Annotated[str, Field(pattern=r"\S", max_length=1000)]


class Request(BaseModel, extra="forbid", strict=True):
    """The fields of POST /act. serve_vla.py describes them."""

    instruction: Text
    unnorm_key: str | None = None
    image: Any = None
    images: list | dict | None = None
    proprio: Any = None
    prefix: Any = None


def parse_request(body: bytes, policy: Policy) -> Query:
    """Read a request to POST /act. Raises UserError."""
    payload = read_json(body)
    encoded = isinstance(payload, dict) and payload.keys() == {"encoded"}
    if encoded:
        payload = read_json(payload["encoded"])
    request = validate(Request, payload)

    if (request.image is None) == (request.images is None):
        raise RequestError("image: send either image or images")
    if request.proprio is not None and not policy.cfg.use_proprio:
        raise RequestError("proprio: the model was trained without the robot's state: leave it out")
    images = [request.image] if request.images is None else request.images
    views = policy.views(images)
    count = policy.vla.num_images
    if len(views) != count:  # before any is decoded
        raise RequestError(f"images: {len(views)} images: this model needs a list of {count} "
                           f"(window_size x cameras {', '.join(policy.cfg.cameras)}, oldest first)")

    sends_arrays = any(isinstance(value, dict) for value in [*views, request.proprio])
    unnorm_key = policy.dataset_name(request.unnorm_key)
    return Query(
        [parse_image(view, f"images[{i}]") for i, view in enumerate(views)],
        request.instruction,
        unnorm_key,
        parse_proprio(request.proprio, "proprio", policy),
        parse_prefix(request.prefix, unnorm_key, policy),
        "encoded" if encoded else "numpy" if sends_arrays else "list")


def read_json(text: bytes | str):
    """JSON -> Python objects."""
    try:
        return from_json(text)
    except (ValueError, TypeError) as error:
        raise RequestError(f"the request is not JSON: {error}") from error


def encode_action(action: np.ndarray, form: str):
    """The JSON reply to a request of this form."""
    if form == "list":
        return action.tolist()
    array = {"__numpy__": base64.b64encode(action.tobytes()).decode(),
             "dtype": action.dtype.str,
             "shape": action.shape}
    return array if form == "numpy" else json.dumps(array)


# ---- openpi's msgpack --------------------------------------------------------------------------


class Observation(BaseModel, extra="forbid", strict=True):
    """An observation without its images: observation_model adds a field for each camera."""

    prompt: Text
    state: Any = Field(None, alias="observation/state")
    unnorm_key: str | None = None  # this key and the next are ours
    prefix: Any = None


@functools.cache
def observation_model(cameras: tuple[str, ...]) -> type[Observation]:
    """Observation with fields camera_0, camera_1, ... for the images. A camera's key is
    observation/NAME_image or observation/NAME, or for the first camera observation/image. Two
    images of one camera are an error."""
    owner = {"observation/image": cameras[0]}
    for camera in cameras:
        owner.setdefault(f"observation/{camera}_image", camera)
        owner.setdefault(f"observation/{camera}", camera)
    images = {}
    for i, camera in enumerate(cameras):
        keys = AliasChoices(*[key for key in owner if owner[key] == camera])
        images[f"camera_{i}"] = (Any, Field(validation_alias=keys))
    return create_model("Observation", __base__=Observation, **images)


def parse_observation(message: bytes | str, policy: Policy) -> Query:
    """Read an openpi observation. Raises UserError.

    A state that the model does not use is ignored, because openpi's clients always send one."""
    observation = validate(observation_model(tuple(policy.cfg.cameras)), unpack(message))
    views = []
    for i, camera in enumerate(policy.cfg.cameras):
        views.append(parse_image(getattr(observation, f"camera_{i}"), f"camera {camera}"))
    unnorm_key = policy.dataset_name(observation.unnorm_key)
    return Query(
        views,
        observation.prompt,
        unnorm_key,
        parse_proprio(observation.state, "observation/state", policy),
        parse_prefix(observation.prefix, unnorm_key, policy))


def unpack(message: bytes | str):
    """msgpack -> Python objects, with arrays as json_numpy's objects that still hold bytes."""
    parts = itertools.count(1)

    def measure(part):
        if next(parts) > MAX_PARTS:  # each takes up to 72 bytes of memory for one byte sent
            raise ValueError(f"more than {MAX_PARTS} lists and maps")
        if isinstance(part, dict) and part.keys() == {b"__ndarray__", b"data", b"dtype", b"shape"}:
            return {"__numpy__": part[b"data"], "dtype": part[b"dtype"], "shape": part[b"shape"]}
        return part

    try:
        return msgpack.unpackb(message, object_hook=measure, list_hook=measure, max_ext_len=0,
                               max_array_len=MAX_LENGTH, max_map_len=MAX_LENGTH)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"the message is not msgpack in a binary frame: {error}") from error


def pack(value: dict) -> bytes:
    """A map that may hold arrays -> msgpack."""
    def write(array: np.ndarray) -> dict:
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str,
                b"shape": array.shape}

    return msgpack.packb(value, default=write)


# ---- Parts of both -----------------------------------------------------------------------------


def read_base64(value: str | bytes) -> bytes:
    """Base64 text -> bytes. msgpack's bytes are returned unchanged."""
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


class Array(BaseModel, extra="forbid", strict=True):
    """An array of integers or floats, as json_numpy writes it."""

    data: Annotated[bytes, BeforeValidator(read_base64)] = Field(alias="__numpy__")
    dtype: str = Field(pattern=r"^[<>|=]?([iu][1248]|f[248])$")
    shape: list[Annotated[int, Field(ge=0, le=MAX_BODY)]] = Field(min_length=1, max_length=4)


def validate(model: type[BaseModel], value, *path: str) -> BaseModel:
    """The value, which was sent as the field `path`, as this model. Raises RequestError."""
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise RequestError(f"{len(value)} keys: send at most {MAX_KEYS}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, [*path, *problem["loc"]])) or "the request"
        raise RequestError(f"{place}: {problem['msg']}") from error


def parse_array(value, name: str) -> np.ndarray:
    """An array's object, or plain lists -> an array of integers or floats."""
    if not isinstance(value, list):
        sent = validate(Array, value, name)
        dtype = np.dtype(sent.dtype)
        if len(sent.data) != math.prod(sent.shape) * dtype.itemsize:
            raise RequestError(f"{name}: {len(sent.data)} bytes do not fit shape {sent.shape} of "
                               f"{dtype}")
        return np.frombuffer(sent.data, dtype).reshape(sent.shape)
    numbers = value
    while (kinds := set(map(type, numbers))) == {list}:
        numbers = list(itertools.chain.from_iterable(numbers))
    try:
        if not kinds <= {int, float}:  # NumPy would give each text the memory of the longest
            raise ValueError("not numbers")
        array = np.array(value)
        if array.dtype == object:
            raise ValueError("integers beyond 64 bits")
    except (ValueError, OverflowError) as error:
        raise RequestError(f"{name}: needs numbers, in lists of equal length: {error}") from error
    return array


def parse_image(value, name: str) -> np.ndarray:
    """An image in any of its forms -> (H, W, 3) uint8."""
    if isinstance(value, str | bytes):
        return decode_picture(value, name)
    image = parse_array(value, name)
    if image.ndim != 3 or image.shape[2] != 3:
        raise RequestError(f"{name}: shape {list(image.shape)}: must be [height, width, 3], RGB")
    check_sides(*image.shape[:2], name)
    if image.dtype.kind not in "iu" or image.min() < 0 or image.max() > 255:
        raise RequestError(f"{name}: must hold integers 0..255: send uint8 (multiply an image in "
                           "0..1 by 255)")
    return image.astype(np.uint8)


def decode_picture(data: str | bytes, name: str) -> np.ndarray:
    """A JPEG or PNG file, or its base64 -> (H, W, 3) uint8, decoded as training images are."""
    try:
        data = read_base64(data)
        picture = Image.open(io.BytesIO(data), formats=["JPEG", "PNG"])  # reads only the header
        check_sides(picture.height, picture.width, name)
        if picture.mode not in ("RGB", "RGBA", "L", "P"):
            raise ValueError(f"its mode is {picture.mode}: send 8-bit RGB")
        if data.count(b"\xff\xda") > MAX_SCANS:  # a byte each can cost a pass over all pixels
            raise ValueError(f"more than {MAX_SCANS} scans: send a baseline JPEG")
        return decode_native(data)
    except RequestError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise RequestError(f"{name}: not a JPEG or PNG (in JSON: in base64): {error}") from error


def check_sides(height: int, width: int, name: str) -> None:
    """Raise RequestError for an image too small to be one, or too large for memory."""
    low, high = SIDES
    if not (low <= height <= high and low <= width <= high):
        raise RequestError(f"{name}: {height} x {width} pixels: each side must be {low}..{high}")


def parse_proprio(value, name: str, policy: Policy) -> np.ndarray | None:
    """The robot's state, if the model uses it."""
    if value is None or not policy.cfg.use_proprio:
        return None
    return parse_array(value, name)


def parse_prefix(value, unnorm_key: str, policy: Policy) -> np.ndarray:
    """The chunk's first actions -> (k, A) float64."""
    prefix = parse_array([] if value is None else value, "prefix").astype(np.float64)
    return prefix if prefix.size else np.zeros((0, len(policy.convention(unnorm_key).action)))
