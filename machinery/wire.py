"""Reading requests and writing replies, in both protocols of serve_vla.py.

OpenVLA's clients send JSON over HTTP, with arrays as json_numpy objects or plain lists. openpi's
clients send msgpack over a websocket, with an array as a map of four keys: b"__ndarray__", b"data",
b"dtype" and b"shape".

    {"observation/image": array, "observation/wrist_image": array, "observation/state": array,
     "prompt": text}
    -> {"actions": array (action_chunk, A), "server_timing": {"infer_ms": ...}}

OpenVLA-OFT's clients post the observation itself, and get a list with an array for each step:

    {"full_image": array, "left_wrist_image": array, ..., "state": array, "instruction": text}

Read parse: it turns the fields of any of them into a Query. Requests are untrusted: sizes are
checked before an array or a picture is made, and nothing is unpickled. Policy checks the shapes of
state and prefix.
"""

import base64
import functools
import io
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgpack
import numpy as np
import simplejpeg
from PIL import Image
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import from_json

from act import Policy
from machinery.config import UserError
from machinery.images import decode_native

MAX_BODY = 32 << 20  # bytes of a request: as plain lists, images up to about full HD
MAX_KEYS = 100  # in an object: pydantic would describe every unknown key
MAX_LENGTH = 1024  # items in a msgpack list or map; arrays of numbers arrive as bytes
MAX_PARTS = 1000  # lists and maps in a msgpack message; an honest one has about ten
SIDES = (16, 4096)  # smallest and largest height or width in pixels
MAX_PIXELS = SIDES[1] ** 2
MAX_SCANS = 32  # of a progressive JPEG; cameras and encoders write about ten
MAX_CHUNKS = 10_000  # of a PNG; encoders write one for every 8 kB or more
WRIST = re.compile("wrist.*image|image.*wrist")
PNG = b"\x89PNG\r\n\x1a\n"


class RequestError(UserError):
    """A request that cannot be answered. The message names the field and the cure."""


class Costly(Exception):
    """A picture in the request has more pixels than this reader decodes."""


@dataclass
class Query:
    """A request to the model."""

    views: list[np.ndarray]  # N images (H, W, 3) uint8, in the order of training
    instruction: str
    unnorm_key: str
    proprio: np.ndarray | None  # if the model uses the robot's state
    prefix: np.ndarray  # (k, A) float64; usually k = 0
    form: str = "openpi"  # of the reply; over HTTP "numpy", "encoded" or "list"
    in_steps: bool = False  # OFT's clients expect a list of steps
    ignored: tuple[str, ...] = ()  # fields that the model does not use
    episode: str | int | None = None  # for --record
    unused_state: tuple[float, ...] = ()  # for --record: a state that the model does not take
    files: list[bytes | None] = field(default_factory=list)  # the views that came as JPEG or PNG
    pixels: np.ndarray | None = None  # the views as the model takes them


# ---- All clients' fields -----------------------------------------------------------------------

Text = Annotated[str, Field(pattern=r"\S", max_length=1000)]


class Request(BaseModel, extra="forbid", strict=True):
    """The fields of a request, except images by name. serve_vla.py describes them."""

    instruction: Text = Field(validation_alias=AliasChoices("instruction", "prompt", "task"))
    unnorm_key: str | None = None
    images: list | dict | None = None
    proprio: Any = None
    state: Any = Field(  # proprio of clients that send it to every model
        None, validation_alias=AliasChoices("state", "observation/state", "observation.state"))
    prefix: Any = None
    episode: Annotated[str, Field(max_length=100)] | int | None = None


def parse(sent, policy: Policy, most_pixels: int = MAX_PIXELS) -> Query:
    """A request's fields -> Query. Raises RequestError, and Costly for larger pictures."""
    if not isinstance(sent, dict) or len(sent) > MAX_KEYS:
        raise RequestError(f"the request is not an object of at most {MAX_KEYS} fields")
    owner = camera_keys(tuple(policy.cfg.cameras))
    named = {}  # {field: image}
    fields = {}  # the others
    for key, value in sent.items():
        place = named if key in owner or WRIST.search(str(key)) else fields
        place[key] = value
    request = validate(Request, fields)

    images, ignored = choose_images(named, request.images, policy)
    state = request.proprio
    unused = ()
    if state is not None and not policy.cfg.use_proprio:
        raise RequestError("proprio: the model was trained without the robot's state: leave it out")
    if request.state is not None:
        if state is not None:
            raise RequestError("proprio: sent twice: leave out the other state")
        if policy.cfg.use_proprio:
            state = request.state
        else:
            unused = spare_numbers(request.state)
            ignored.append("state")
    views = []
    files = []
    for i, image in enumerate(images):
        views.append(parse_image(image, f"images[{i}]", most_pixels))
        files.append(read_base64(image) if isinstance(image, str | bytes) else None)
    unnorm_key = policy.dataset_name(request.unnorm_key)
    return Query(
        views,
        request.instruction,
        unnorm_key,
        None if state is None else np.atleast_1d(parse_array(state, "proprio")),
        parse_prefix(request.prefix, unnorm_key, policy),
        "numpy" if any(isinstance(value, dict) for value in [*images, state]) else "list",
        in_steps="full_image" in named,
        ignored=tuple(ignored),
        episode=request.episode,
        unused_state=unused,
        files=files)


def spare_numbers(value) -> tuple[float, ...]:
    """A state that the model does not take: anything may come, so () unless it is a vector."""
    try:
        array = parse_array(value, "state")
    except RequestError:
        return ()
    usable = array.ndim == 1 and array.size <= MAX_LENGTH and np.isfinite(array).all()
    return tuple(array.tolist()) if usable else ()


@functools.cache
def camera_keys(cameras: tuple[str, ...]) -> dict[str, str]:
    """{field: its camera}, as clients of OpenVLA, OFT, openpi and LeRobot name images."""
    owner = {}
    for camera in cameras:
        for key in ("{}_image", "observation/{}_image", "observation/{}", "observation.images.{}"):
            owner.setdefault(key.format(camera), camera)
    for key in ("image", "full_image", "observation/image", "observation.image"):
        owner.setdefault(key, cameras[0])
    return owner


def choose_images(named: dict, images: list | dict | None, policy: Policy) -> tuple[list, list]:
    """The images for the model, in the order of training, and the fields of unused ones.

    named: {field: image} of the request. Pictures of a wrist that the model does not see are
    unused, because openpi's and OFT's clients always send them. For OFT's clients, wrists without a
    camera of their name are the model's next cameras in the order sent, as in OFT's own server.
    """
    cameras = policy.cfg.cameras
    owner = camera_keys(tuple(cameras))
    named = {key: image for key, image in named.items() if image is not None}
    if named and images is not None:
        raise RequestError("image: send either image or images")
    if isinstance(images, dict):
        if unknown := images.keys() - set(cameras):
            raise RequestError(f"images: {sorted(map(str, unknown))[0]!a} is not one of the "
                               f"cameras {', '.join(cameras)}")
        named = {f"observation.images.{camera}": images[camera] for camera in images}
    seen = {}  # {camera: image}
    spare = []
    for key in named:
        camera = owner.get(key)
        if camera is None:
            spare.append(key)
        elif camera in seen:
            raise RequestError(f"{key}: a second image of the camera {camera}: not permitted")
        else:
            seen[camera] = named[key]
    if isinstance(images, list):
        chosen = images
    else:
        for camera in cameras:
            if camera not in seen and spare and "full_image" in named:
                seen[camera] = named[spare.pop(0)]
        chosen = [seen[camera] for camera in cameras if camera in seen]
    count = policy.vla.num_images
    if len(chosen) != count:  # before any is decoded
        raise RequestError(
            f"images: {len(chosen)} images: this model needs a list of {count} (window_size x "
            f"cameras {', '.join(cameras)}, oldest first). By name, for a window_size of 1, one of "
            f"each camera is required, as observation/{cameras[-1]}_image. Names of other cameras: "
            f"{', '.join(spare)[:200] or 'none'}")
    return chosen, spare


# ---- OpenVLA's JSON ----------------------------------------------------------------------------


def parse_request(body: bytes, policy: Policy, most_pixels: int = MAX_PIXELS) -> Query:
    """Read a request to POST /act. Raises UserError."""
    payload = parse_json(body)
    encoded = isinstance(payload, dict) and payload.keys() == {"encoded"}
    if encoded:
        payload = parse_json(payload["encoded"])
    query = parse(payload, policy, most_pixels)
    if encoded:
        query.form = "encoded"
    return query


def parse_json(text: bytes | str):
    """JSON -> Python objects."""
    try:
        return from_json(text)
    except (ValueError, TypeError) as error:
        raise RequestError(f"the request is not JSON: {error}") from error


def encode_action(action: np.ndarray, query: Query):
    """The JSON reply to a request."""
    steps = list(action.reshape(-1, action.shape[-1])) if query.in_steps else action
    if query.form == "list":
        return [step.tolist() for step in steps]
    arrays = [encode_array(step) for step in steps] if query.in_steps else encode_array(action)
    return arrays if query.form == "numpy" else json.dumps(arrays)


def encode_array(array: np.ndarray) -> dict:
    """An array in json_numpy's form."""
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(),
            "dtype": array.dtype.str,
            "shape": array.shape}


# ---- openpi's msgpack --------------------------------------------------------------------------


def parse_observation(
    message: bytes | str, policy: Policy, most_pixels: int = MAX_PIXELS
) -> Query:
    """Read an openpi observation. Raises UserError."""
    return parse(unpack(message), policy, most_pixels)


def unpack(message: bytes | str):
    """msgpack -> Python objects, with arrays as json_numpy's objects that still hold bytes."""
    parts = itertools.count(1)

    def measure(part):
        if next(parts) > MAX_PARTS:  # each takes up to 72 bytes of memory for one byte sent
            raise ValueError(f"more than {MAX_PARTS} lists and maps")
        if isinstance(part, dict) and part.keys() == {b"__ndarray__", b"data", b"dtype", b"shape"}:
            return {"__numpy__": part[b"data"], "dtype": part[b"dtype"], "shape": part[b"shape"]}
        if isinstance(part, dict) and part.keys() == {b"__npgeneric__", b"data", b"dtype"}:
            return part[b"data"]  # a NumPy scalar: the number itself
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
    shape: list[Annotated[int, Field(ge=0, le=MAX_BODY)]] = Field(max_length=4)


def validate(model: type[BaseModel], value, *path: str) -> BaseModel:
    """The value, which was sent as the field `path`, as this model. Raises RequestError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, [*path, *problem["loc"]])) or "the request"
        raise RequestError(f"{place}: {problem['msg']}") from error


def parse_array(value, name: str) -> np.ndarray:
    """An array's object, or lists of numbers or of arrays -> an array of integers or floats."""
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
    if dict in kinds and len(numbers) <= MAX_PARTS:  # json_numpy's NumPy scalars are arrays, too
        value = [parse_array(item, name) if isinstance(item, list | dict) else item
                 for item in value]
        kinds -= {dict, list}  # they are arrays now
    try:
        if not kinds <= {int, float}:  # NumPy would give each text the memory of the longest
            raise ValueError("not numbers")
        array = np.array(value)
        if array.dtype == object:
            raise ValueError("integers beyond 64 bits")
    except (ValueError, OverflowError) as error:
        raise RequestError(f"{name}: needs numbers, in lists of equal length: {error}") from error
    return array


def parse_image(value, name: str, most_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image in any of its forms -> (H, W, 3) uint8. An alpha channel is dropped."""
    if isinstance(value, str | bytes):
        return decode_picture(value, name, most_pixels)
    image = parse_array(value, name)
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise RequestError(f"{name}: shape {list(image.shape)}: must be [height, width, 3], RGB "
                           "(channels first: transpose(1, 2, 0))")
    check_sides(*image.shape[:2], name)
    image = image[..., :3]
    if image.dtype.kind not in "iu" or image.min() < 0 or image.max() > 255:
        raise RequestError(f"{name}: must hold integers 0..255: send uint8 (multiply an image in "
                           "0..1 by 255)")
    return image.astype(np.uint8)


def decode_picture(data: str | bytes, name: str, most_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A JPEG or PNG file, or its base64 -> (H, W, 3) uint8, decoded as training images are."""
    try:
        data = read_base64(data)
        if data.startswith(b"\xff\xd8"):
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            if colors in ("CMYK", "YCCK"):
                raise ValueError(f"its colors are {colors}: send RGB")
            if data.count(b"\xff\xda") > MAX_SCANS:  # a byte each can cost a pass over all pixels
                raise ValueError(f"more than {MAX_SCANS} scans: send a baseline JPEG")
        else:
            data = only_pixels(data)
            picture = Image.open(io.BytesIO(data), formats=["PNG"])  # reads only the header
            height, width = picture.height, picture.width
            if picture.mode not in ("RGB", "RGBA", "L", "LA", "P"):
                raise ValueError(f"its mode is {picture.mode}: send 8-bit RGB")
        check_sides(height, width, name)
        if height * width > most_pixels:
            raise Costly
        return decode_native(data)
    except (RequestError, Costly):
        raise
    except Exception as error:  # Pillow raises many kinds
        raise RequestError(f"{name}: not a JPEG or PNG (in JSON: in base64): {error}") from error


def only_pixels(data: bytes) -> bytes:
    """A PNG file without comments, profiles and further frames, which take memory and time."""
    if not data.startswith(PNG):
        raise ValueError(f"it begins with {data[:8]!r}")
    kept = [PNG]
    start = len(PNG)
    for _ in range(MAX_CHUNKS):
        kind = data[start + 4 : start + 8]
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[start:stop])
        if kind == b"IEND" or stop >= len(data):
            return b"".join(kept)
        start = stop
    raise ValueError(f"more than {MAX_CHUNKS} chunks")


def check_sides(height: int, width: int, name: str) -> None:
    """Raise RequestError for an image too small to be one, or too large for memory."""
    low, high = SIDES
    if not (low <= height <= high and low <= width <= high):
        raise RequestError(f"{name}: {height} x {width} pixels: each side must be {low}..{high}")


def parse_prefix(value, unnorm_key: str, policy: Policy) -> np.ndarray:
    """The chunk's first actions -> (k, A) float64."""
    prefix = np.atleast_1d(parse_array([] if value is None else value, "prefix"))
    prefix = prefix.astype(np.float64)
    return prefix if prefix.size else np.zeros((0, len(policy.convention(unnorm_key).action)))


def describe(policy: Policy, model: str) -> dict:
    """The model's facts, which a websocket sends first; /health gives more."""
    robots = {key: policy.convention(key) for key in sorted(policy.norm_stats)}
    facts = {
        "status": "ok",
        "model": model,
        "unnorm_keys": [*robots],
        "cameras": policy.cfg.cameras,
        "images": policy.vla.num_images,
        "proprio": policy.cfg.use_proprio,
        "action_shape": [policy.cfg.action_chunk, len(next(iter(robots.values())).action)],
        "max_prefix": policy.max_prefix,
        "action": {key: robot.action for key, robot in robots.items()}}
    if policy.cfg.use_proprio:
        facts["state"] = {key: robot.state for key, robot in robots.items()}
    return facts


def describe_actions(policy: Policy) -> dict:
    """More facts of /health, for programs that show, convert or check actions."""
    facts = {"center_crop": policy.cfg.image_aug, "gripper": {}, "action_q01_q99": {}}
    for key in sorted(policy.norm_stats):
        robot = policy.convention(key)
        stats = policy.norm_stats[key]["action"]
        ends = np.array([stats["q01"], stats["q99"]])
        facts["gripper"][key] = robot.gripper(policy.cfg.action_dim)
        facts["action_q01_q99"][key] = robot.to_robot(ends).tolist()
    return facts
