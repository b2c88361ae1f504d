"""Act over HTTP: a robot's computer posts what its camera sees and an instruction, and gets the action.

    python serve_vla.py --checkpoint runs/demo+n1+b32+x7          a run, a checkpoint, OpenVLA's, a hub id

    POST /act   {"image": ..., "instruction": "open the drawer", "unnorm_key": "bridge_orig"}  ->  the action
    GET /health {"status": "ok", "model": ..., "unnorm_keys": [...], "cameras": [...], "action": {...}, ...}

OpenVLA's clients (its vla-scripts/deploy.py) work unchanged. An image is any of
    {"__numpy__": base64, "dtype": "|u1", "shape": [H, W, 3]}      what json_numpy makes of an array
    [[[r, g, b], ...], ...]                                        plain lists of whole numbers, 0..255
    "..."                                                          base64 of a JPEG or PNG file
A model trained with several cameras takes `images`, {camera: image}, or, also where it looks at several
frames, a list (window_size x cameras, oldest first); one trained with the robot's state takes `proprio`, its
numbers. unnorm_key may be left out if the model knows one dataset. The reply is the action, (A,) or
(action_chunk, A), in the form of the request: as json_numpy has it if an array came so, else plain lists; and
to a request {"encoded": "<all of this as a string>"}, a string. /health names the cameras, and what each
number of action and state is (convention.py). Mistakes get status 4xx and {"error": what is wrong and what to
do}.

Read `parse_request`, then Batcher: while the model computes, requests queue, and then go through it together.
There is no password: the server listens on this machine alone unless --host says otherwise (for a robot
elsewhere: `ssh -L 8000:127.0.0.1:8000 this-machine`). Nothing that comes in is ever unpickled.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import queue
import re
import signal
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from act import Policy, load_vla
from checkpoint import CheckpointError
from config import UserError, told_in_one_line
from images import decode_native

MAX_BODY = 32 << 20  # bytes of a request: as plain lists, images up to about full HD
BIG_BODY = 1 << 20  # bytes; longer ones are parsed one at a time, so that others get their turn
MAX_INSTRUCTION = 1000  # bytes; no token is shorter than one, so the prompt stays below max_length
SIDES = (16, 4096)  # pixels: smallest and largest height or width; also what one request can cost in memory
MAX_CONNECTIONS = 256  # more get status 503
BODY_SECONDS = 60  # to send a request in
STOP_SECONDS = 30  # to answer what is under way when told to stop


class RequestError(UserError):
    """A request that cannot be answered. The message names the field and the cure."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


# ---- From JSON to arrays and back --------------------------------------------------------------------------


@dataclass
class Query:
    """A checked request. views: N images (H, W, 3) uint8; proprio: (P,) float32 if the model uses it."""

    views: list[np.ndarray]
    instruction: str
    unnorm_key: str
    proprio: np.ndarray | None
    form: str  # of the reply: numpy, encoded or list


def parse_request(body: bytes, policy: Policy) -> Query:
    """Read and check a request to a model. Raises RequestError."""
    payload = read_object(body, "the request")
    encoded = "encoded" in payload
    if encoded:
        if len(payload) > 1 or not isinstance(payload["encoded"], str):
            raise RequestError("encoded: must be a string of JSON, and the only field")
        payload = read_object(payload["encoded"], "encoded")
    known = ("image", "images", "instruction", "unnorm_key", "proprio")
    for key in payload:
        if key not in known:
            raise RequestError(f"unknown field {key[:80]!r}: the fields are {', '.join(known)}")

    images = parse_images(payload, policy)
    instruction, unnorm_key = payload.get("instruction"), payload.get("unnorm_key")
    if not isinstance(instruction, str) or not instruction.strip():
        raise RequestError("instruction: must be text that says what to do, such as \"open the drawer\"")
    try:
        size = len(instruction.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"instruction: is no Unicode text: {error}: send UTF-8") from error
    if size > MAX_INSTRUCTION:
        raise RequestError(f"instruction: longer than {MAX_INSTRUCTION} bytes: shorten it")
    if not isinstance(unnorm_key, str | None):
        raise RequestError(f"unnorm_key: must be one of {', '.join(sorted(policy.norm_stats))}")
    try:
        robot = policy.convention(unnorm_key)
    except UserError as error:
        raise RequestError(f"{error}"[:2000]) from error

    several = payload.get("images", [])
    several = several.values() if isinstance(several, dict) else several
    sent = [*several, payload.get("image"), payload.get("proprio")]
    arrays = any(isinstance(value, dict) for value in sent)
    return Query(images, instruction, unnorm_key or next(iter(policy.norm_stats)),
                 parse_proprio(payload.get("proprio"), policy.cfg.use_proprio, robot.state),
                 "encoded" if encoded else "numpy" if arrays else "list")


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
    if isinstance(value, str):
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
        raise RequestError(f"{name}: is not base64 of a JPEG or PNG file") from error
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


def parse_proprio(value, wanted: bool, labels: list[str]) -> np.ndarray | None:
    """The robot's state -> a float32 for each of the labels, which say what they are."""
    if not wanted:
        if value is not None:
            raise RequestError("proprio: this model was trained without the robot's state: leave it out")
        return None
    size = len(labels)
    if value is None:
        raise RequestError(f"proprio: missing: this model needs the robot's state, {size} numbers")
    state = parse_array(value, "proprio")
    if state.shape != (size,):
        raise RequestError(f"proprio: has shape {list(state.shape)}, must be [{size}]: {', '.join(labels)}")
    with np.errstate(over="ignore"):
        state = state.astype(np.float32)
    if not np.isfinite(state).all():
        raise RequestError("proprio: must hold finite numbers")
    return state


def parse_array(value, name: str) -> np.ndarray:
    """json_numpy's form of an array, or plain lists -> an array of whole or floating-point numbers."""
    if isinstance(value, list):
        try:
            array = np.array(value)
        except (ValueError, OverflowError) as error:
            raise RequestError(f"{name}: its lists are of different lengths, or too deep") from error
        if array.dtype.kind not in "iuf":
            raise RequestError(f"{name}: must hold numbers alone")
        return array
    if not isinstance(value, dict) or value.keys() != {"__numpy__", "dtype", "shape"}:
        raise RequestError(f'{name}: must be {{"__numpy__": base64, "dtype": ..., "shape": ...}}, or a list'
                           + (", or base64 of a JPEG or PNG file" if name.startswith("image") else ""))
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
    """Base64 text -> bytes."""
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


# ---- The model's thread ------------------------------------------------------------------------------------


class Batcher(threading.Thread):
    """Runs the model on all requests that came while it was busy with the ones before."""

    def __init__(self, policy: Policy, max_batch: int):
        super().__init__(daemon=True)
        self.policy, self.max_batch = policy, max_batch
        self.waiting: queue.SimpleQueue[tuple[Query, Future]] = queue.SimpleQueue()

    def ask(self, query: Query) -> Future:
        """Queue a request; the result will be (action, size of the batch it was in)."""
        future: Future = Future()
        self.waiting.put((query, future))
        return future

    def run(self) -> None:
        """The thread: for ever."""
        while True:
            batch = [self.waiting.get()]
            while len(batch) < self.max_batch and not self.waiting.empty():
                batch.append(self.waiting.get())  # nobody else takes any, so there is one
            datasets: dict[str, list] = {}
            for query, future in batch:
                if future.set_running_or_notify_cancel():
                    datasets.setdefault(query.unnorm_key, []).append((query, future))
            for asked in datasets.values():
                self.answer(asked)

    def answer(self, asked: list[tuple[Query, Future]]) -> None:
        """Requests of one unnorm_key. If they fail, each is tried on its own, so that none fails for
        another's sake."""
        queries = [query for query, _ in asked]
        try:
            proprio = None if queries[0].proprio is None else np.stack([query.proprio for query in queries])
            actions = self.policy.predict_action(
                [query.views for query in queries], [query.instruction for query in queries],
                queries[0].unnorm_key, proprio)
        except Exception as error:
            if len(asked) == 1:
                asked[0][1].set_exception(error)
            else:
                for one in asked:
                    self.answer([one])
            return
        for (_, future), action in zip(asked, actions, strict=True):
            future.set_result((action, len(asked)))


# ---- HTTP --------------------------------------------------------------------------------------------------


def make_app(batcher: Batcher, model: str) -> Starlette:
    """The two addresses of the server."""
    policy, one_at_a_time = batcher.policy, asyncio.Semaphore(1)

    async def act(request: Request) -> Response:
        started, facts = time.perf_counter(), ""
        try:
            body = await asyncio.wait_for(read_body(request), BODY_SECONDS)
            async with one_at_a_time if len(body) > BIG_BODY else contextlib.nullcontext():
                query = await asyncio.to_thread(parse_request, body, policy)
            action, size = await asyncio.wrap_future(batcher.ask(query))
            status, reply = 200, encode_action(action, query.form)
            facts = f"batch {size} unnorm_key {query.unnorm_key} instruction {query.instruction!a}"
        except RequestError as error:
            status, facts = error.status, f"error {str(error)!a}"
            reply = json.dumps({"error": str(error)})
        except (asyncio.TimeoutError, ClientDisconnect):  # noqa: UP041 (another one, in Python 3.10)
            status, facts, reply = 408, "error 'did not arrive'", '{"error": "the request did not arrive"}'
        except Exception:
            traceback.print_exc()
            status, facts = 500, "error 'see above'"
            reply = json.dumps({"error": "the model failed on this request; the server's log says why"})
        log(f"act status {status} ms {1000 * (time.perf_counter() - started):.0f} {facts}")
        return Response(reply, status, media_type="application/json")

    async def health(request: Request) -> Response:
        robots = {key: policy.convention(key) for key in sorted(policy.norm_stats)}
        facts = {"status": "ok", "model": model, "unnorm_keys": [*robots], "cameras": policy.cfg.cameras,
                 "images": policy.vla.num_images, "proprio": policy.cfg.use_proprio,
                 "action_shape": [policy.cfg.action_chunk, len(next(iter(robots.values())).action)],
                 "action": {key: robot.action for key, robot in robots.items()}}
        if policy.cfg.use_proprio:
            facts["state"] = {key: robot.state for key, robot in robots.items()}
        return Response(json.dumps(facts), media_type="application/json")

    async def nothing_here(request: Request, error: HTTPException) -> Response:
        reply = json.dumps({"error": f"{error.detail}: POST /act or GET /health"})
        return Response(reply, error.status_code, media_type="application/json")

    routes = [Route("/act", act, methods=["POST"]), Route("/health", health)]
    return Starlette(routes=routes, exception_handlers={HTTPException: nothing_here})


async def read_body(request: Request) -> bytes:
    """The body of a request, if it is not too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RequestError(f"the request: longer than {MAX_BODY} bytes: send a smaller image, or a JPEG",
                               413)
    return bytes(body)


def log(text: str) -> None:
    """One line of key value pairs."""
    print(text, flush=True)


def serve(policy: Policy, model: str, host: str, port: int, max_batch: int) -> None:
    """Answer requests until SIGTERM or Ctrl-C; then finish those under way."""
    batcher = Batcher(policy, max_batch)
    config = uvicorn.Config(make_app(batcher, model), host, port, log_level="warning", access_log=False,
                            lifespan="off", limit_concurrency=MAX_CONNECTIONS,
                            timeout_graceful_shutdown=STOP_SECONDS)
    listener = config.bind_socket()
    # a first action, before any robot asks: kernels are compiled, and a model that cannot act shows it
    key = next(iter(policy.norm_stats))
    state = np.zeros(len(policy.convention(key).state)) if policy.cfg.use_proprio else None
    policy.predict_action([np.zeros((224, 224, 3), np.uint8)] * policy.vla.num_images, "wait", key, state)
    batcher.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn sends itself the signal once more after it stopped
    listener.listen()  # who reads the next line may connect
    host, port, *_ = listener.getsockname()
    for key in sorted(policy.norm_stats):
        robot = policy.convention(key)
        log(f"unnorm_key {key} cameras {','.join(policy.cfg.cameras)} action {','.join(robot.action)}"
            + f" state {','.join(robot.state)}" * policy.cfg.use_proprio)
    log(f"serving http://{host}:{port} model {model} unnorm_keys {','.join(sorted(policy.norm_stats))}")
    uvicorn.Server(config).run([listener])
    log("stopped")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint, OpenVLA's, or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0: the whole network")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--device", choices=["cuda", "cpu"],
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--max_batch", type=int,
                        help="most requests the model sees at once; default: 16, with --speed_up 1")
    parser.add_argument("--speed_up", action="store_true",
                        help="on a GPU: compile for minutes whenever a size of batch or length of prompt is "
                        "new, then answer several times as fast")
    args = parser.parse_args()
    if args.speed_up and args.device == "cpu":
        parser.error("--speed_up records what a GPU does: it needs --device cuda")
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    with told_in_one_line():
        policy = load_vla(args.checkpoint, args.device, torch.bfloat16 if dtype == "bf16" else torch.float32)
        if not policy.norm_stats:
            raise CheckpointError(f"{args.checkpoint}: has no dataset statistics, so it cannot act: a VLA "
                                  "has them, a plain VLM does not")
        if args.speed_up:
            policy.speed_up()
        serve(policy, args.checkpoint, args.host, args.port, args.max_batch or (1 if args.speed_up else 16))


if __name__ == "__main__":
    main()
