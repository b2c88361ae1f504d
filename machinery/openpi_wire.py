"""What is said over openpi's websocket: an observation to a request, checked, and the chunk of actions back.

    {"observation/image": array, "observation/wrist_image": array, "observation/state": array, "prompt": text}
    ->  {"actions": array (action_chunk, A), "server_timing": {"infer_ms": ...}}

in msgpack, where an array is a map of four: b"__ndarray__", b"data", b"dtype" and b"shape". Read
parse_observation. As in wire.py, all that comes in is measured before it is believed, and nothing is
unpickled. openpi (github.com/Physical-Intelligence/openpi) has a client for this, the package openpi-client.
"""

import msgpack
import numpy as np

from act import Policy
from machinery.wire import (
    Query,
    RequestError,
    parse_image,
    parse_key,
    parse_prefix,
    parse_proprio,
    parse_text,
)

MAX_LENGTH = 1024  # of a list or map; arrays of numbers come as bytes
MAX_PARTS = 1000  # lists and maps in a message; a good one has about ten
OTHER_KEYS = ("observation/state", "prompt", "unnorm_key", "prefix")
ARRAY = {b"__ndarray__", b"data", b"dtype", b"shape"}


def parse_observation(message: bytes | str, policy: Policy) -> Query:
    """Read and check an observation; text is none. Raises RequestError.

    An image's key is observation/ and its camera's name in the model's config, with or without _image;
    observation/image is the first camera. The state may come where the model has no use for it, as openpi's
    own clients always send it. Keys of ours may come, too: unnorm_key, and prefix (act.py).
    """
    observation, wanted = unpack(message), policy.cfg.use_proprio
    if policy.cfg.window_size > 1:
        raise RequestError(f"this model looks at {policy.cfg.window_size} frames of each camera, and an "
                           "observation of openpi's is one: POST /act instead")
    keys = image_keys(observation, policy.cfg.cameras)
    unnorm_key, robot = parse_key(observation.get("unnorm_key"), policy)
    state = observation.get("observation/state") if wanted else None
    return Query([parse_image(observation[key], key) for key in keys],
                 parse_text(observation.get("prompt"), "prompt"), unnorm_key,
                 parse_proprio(state, wanted, robot.state, "observation/state"),
                 parse_prefix(observation.get("prefix"), policy, unnorm_key), "openpi")


def image_keys(observation: dict, cameras: list[str]) -> list[str]:
    """The keys under which the cameras' images came, in the order of training; all others must be known."""
    first, *others = cameras
    best = {first: "observation/image", **{name: f"observation/{name}_image" for name in others}}
    owner = {best[first]: first}  # {key: camera}
    owner |= {f"observation/{name}{end}": name for name in cameras for end in ("", "_image")}
    for key in observation:
        if key not in owner and key not in OTHER_KEYS:
            raise RequestError(f"unknown key {str(key)[:80]!r}: the keys are "
                               f"{', '.join([*best.values(), *OTHER_KEYS])}")
    keys = []
    for camera, name in best.items():
        came = [key for key in observation if owner.get(key) == camera]
        if len(came) != 1:
            raise RequestError(f"{name}: {'two images' if came else 'no image'} of the camera {camera}: send "
                               "one")
        keys += came
    return keys


def unpack(message: bytes | str) -> dict:
    """msgpack -> the map it must be, with arrays in wire.py's form, still unread."""
    if isinstance(message, str):
        raise RequestError("the message: is text: send msgpack, in binary frames")
    parts = 0

    def count(part):
        nonlocal parts
        if (parts := parts + 1) > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS} lists and maps")
        if isinstance(part, dict) and part.keys() == ARRAY:
            return {"__numpy__": part[b"data"], "dtype": part[b"dtype"], "shape": part[b"shape"]}
        return part

    try:
        value = msgpack.unpackb(message, object_hook=count, list_hook=count, max_array_len=MAX_LENGTH,
                                max_map_len=MAX_LENGTH, max_ext_len=0)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the message: is not msgpack: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise RequestError("the message: must be a map {\"observation/image\": ..., \"prompt\": ...}, not a "
                           f"{type(value).__name__}")
    return value


def pack(value: dict) -> bytes:
    """A map that may hold arrays -> msgpack."""
    return msgpack.packb(value, default=lambda array: {
        b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape})


def pack_reply(actions: np.ndarray, milliseconds: float) -> bytes:
    """The reply to an observation: actions (action_chunk, A), or (A,) of a model that says one step."""
    chunk = actions.reshape(-1, actions.shape[-1])
    return pack({"actions": chunk, "server_timing": {"infer_ms": milliseconds}})
