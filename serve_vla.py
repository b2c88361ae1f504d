"""Act over HTTP: a robot's computer posts camera images and an instruction and gets an action.

    python serve_vla.py --checkpoint runs/demo+n1+b32+x7   a run, a checkpoint, OpenVLA's, a hub id

    GET /       a page on which to try the model: open it in a browser
    POST /act   {"image": ..., "instruction": "open the drawer", "unnorm_key": "bridge_orig"}
                -> the action
    GET /health {"status": "ok", "model": ..., "unnorm_keys": [...], "cameras": [...], ...}
    websocket / {"observation/image": ..., "prompt": "open the drawer"} -> {"actions": ..., ...}

Clients of OpenVLA (its vla-scripts/deploy.py), of OpenVLA-OFT, and of openpi
(`openpi_client.websocket_client_policy`) work unchanged. An image is any of

    {"__numpy__": base64, "dtype": "|u1", "shape": [H, W, 3]}      json_numpy's form of an array
    [[[r, g, b], ...], ...]                                        lists of integers 0..255
    "..."                                                          base64 of a JPEG or PNG file

A model trained with several cameras takes `images`: {camera: image}, or a list (window_size x
cameras, oldest first). A model trained with the robot's state takes `proprio`, a list of numbers.
Both protocols also accept observation/NAME_image, NAME_image and observation.images.NAME for the
camera NAME, and `state`. Clients that always send a wrist's image or a state may send them to a
model without: the log names ignored fields once. unnorm_key may be left out if the model knows one
dataset. `prefix`, (k, A), holds the first actions of the chunk if they are settled already
(act.py). `episode`, any text or number, tells the episodes of --record apart. A `state` that the
model does not take is only recorded: doctor.py needs it.

The reply is the action, (A,) or (action_chunk, A): a json_numpy object if the request held one,
else plain lists. A request {"encoded": "<all of this as a string>"} gets a string. /health labels
each number of action and state (machinery/convention.py), tells which values of the action's last
one are an open and a closed gripper, if it is one, and has status 503 if the model fails.
/act?seen gives {"action": ..., "seen": [the images as the model takes them]}.
Mistakes get status 4xx and {"error": the problem and its cure}. A websocket first sends the facts
of /health, and answers a mistake with text.

Read Batcher: requests that arrive while the model computes are answered together, whichever
protocol they use. machinery/wire.py parses them, in processes of machinery/reader.py.

The server listens on 127.0.0.1. Any other --host requires a token: --token FILE or
--token VARIABLE, which clients send as `Authorization: Bearer ...` (openpi's: api_key). Web pages
of other servers are refused. Nothing is encrypted. On a network that you do not trust, put nginx in
front or use `ssh -L 8000:127.0.0.1:8000 this-machine`, which needs no token.
"""

import argparse
import asyncio
import hmac
import math
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from pathlib import Path

from machinery.config import PROJECT, UserError, exit_with_one_line, read_secret


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run, a checkpoint, or a hub id")
    parser.add_argument("--center_crop", choices=["yes", "no"],
                        help="show the middle of each image; default: as the checkpoint says")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to listen on; 0.0.0.0: reachable from the network")
    parser.add_argument("--token", help="a file or environment variable with the clients' token")
    parser.add_argument("--no_token", action="store_true", help="answer everyone who reaches it")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: a GPU, if there is one")
    parser.add_argument("--dtype", choices=["bf16", "fp32"],
                        help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--int8", action="store_true",
                        help="hold the language model's matrices in 8 bits: half the memory")
    parser.add_argument("--max_batch", type=int,
                        help="most requests the model sees at once; default: 16, with --speed_up 1")
    parser.add_argument("--speed_up", nargs="*", type=int, metavar="K",
                        help="on a GPU: compile for minutes before serving, then answer several "
                        "times as fast, requests without a prefix and with one of K steps")
    parser.add_argument("--record", type=Path, metavar="DIR",
                        help="keep requests and answers there as an RLDS dataset")
    return parser.parse_args()


if __name__ == "__main__":
    read_options()  # mistakes and --help, before PyTorch is imported for seconds

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from act import PROMPT_LENGTHS, ModelError, Policy, load_vla
from machinery.checkpoint import CheckpointError
from machinery.connections import is_foreign, uvicorn_config
from machinery.host import allow_open_files
from machinery.reader import Readers
from machinery.record import Recorder
from machinery.wire import (
    MAX_BODY,
    Query,
    describe,
    describe_actions,
    encode_action,
    encode_array,
    pack,
)

MAX_CLIENTS = 256  # requests at once; as many websockets; as many bodies that are arriving
BODY_SECONDS = 60  # for a request's body to arrive
STUCK_SECONDS = 300  # a model that computes for longer is reported by /health
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# ---- The model's thread ------------------------------------------------------------------------


class Batcher(threading.Thread):
    """Runs the model on all requests that arrived during its previous run."""

    def __init__(self, policy: Policy, max_batch: int):
        super().__init__(daemon=True)
        self.policy = policy
        self.max_batch = max_batch
        self.waiting: queue.SimpleQueue[tuple[Query, Future]] = queue.SimpleQueue()
        self.error: str | None = None  # why the model cannot act
        self.started = math.inf  # when it began to compute

    def ask(self, query: Query) -> Future:
        """Queue a request. The result will be (action, number of requests in its batch)."""
        future: Future = Future()
        self.waiting.put((query, future))
        return future

    def run(self) -> None:
        """The thread's loop. It never ends."""
        while True:
            batch = [self.waiting.get()]
            while len(batch) < self.max_batch and not self.waiting.empty():
                batch.append(self.waiting.get())  # does not block: this is the only reader
            groups: dict[tuple, list] = {}  # one call of the model each
            for query, future in batch:
                if future.set_running_or_notify_cancel():
                    group = groups.setdefault((query.unnorm_key, query.prefix.shape), [])
                    group.append((query, future))
            self.started = time.monotonic()
            for requests in groups.values():
                self.answer(requests)
            self.started = math.inf

    def answer(self, requests: list[tuple[Query, Future]]) -> None:
        """Run the model on requests of one unnorm_key and prefix length. If that fails, run each by
        itself, so that only the faulty ones get an error."""
        queries = [query for query, _ in requests]
        try:
            proprio = None
            if queries[0].proprio is not None:
                proprio = np.stack([query.proprio for query in queries])
            pixels = [query.pixels for query in queries]
            actions = self.policy.predict_action(
                torch.from_numpy(np.stack(pixels)),
                [query.instruction for query in queries],
                queries[0].unnorm_key,
                proprio,
                np.stack([query.prefix for query in queries]))
        except Exception as error:
            if len(requests) > 1:
                for request in requests:
                    self.answer([request])
                return
            if isinstance(error, ModelError) or not isinstance(error, UserError):
                self.examine()
            requests[0][1].set_exception(error)
            return
        self.error = None
        for (_, future), action in zip(requests, actions, strict=True):
            future.set_result((action, len(requests)))

    def examine(self) -> None:
        """Does the model fail on a black image, too? Then the request was not to blame."""
        try:
            act_on_black(self.policy)
            self.error = None
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"[:500]

    def failure(self) -> str | None:
        """Why the model does not act, if it doesn't."""
        seconds = time.monotonic() - self.started
        if seconds > STUCK_SECONDS:
            return f"the model has not answered for {seconds:.0f} seconds"
        return self.error


def act_on_black(policy: Policy) -> None:
    """An action for a black image. The first one takes longest. Raises if the model cannot act."""
    key = next(iter(policy.norm_stats))
    state = np.zeros(len(policy.convention(key).state)) if policy.cfg.use_proprio else None
    black = np.zeros((224, 224, 3), np.uint8)
    policy.predict_action([black] * policy.vla.num_images, "wait", key, state)


# ---- HTTP and websockets -----------------------------------------------------------------------


class Service:
    """The server's addresses. token: clients must send it, unless None; host: the server's name."""

    def __init__(self, batcher: Batcher, model: str, token: str | None, host: str = "localhost",
                 recorder: Recorder | None = None):
        self.batcher = batcher
        self.policy = batcher.policy
        self.token = token
        self.host = host
        self.facts = describe(self.policy, model)
        self.recorder = recorder
        self.readers = Readers(self.policy, keep_views=recorder is not None)
        self.clients = asyncio.Semaphore(MAX_CLIENTS)
        self.arriving: dict[asyncio.Future, None] = {}  # bodies of requests, the first first
        self.sockets: dict[WebSocket, float] = {}  # when each got its last action; busy: infinity
        self.ignored: set[tuple[str, ...]] = set()  # logged before

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/", self.page),
                                 Route("/act", self.act, methods=["POST"]),
                                 Route("/health", self.health),
                                 WebSocketRoute("/", self.websocket)])

    def authorized(self, request: HTTPConnection) -> bool:
        """Did the client send the token? openpi's client calls it Api-Key."""
        if self.token is None:
            return True
        kind, _, sent = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(sent.encode(), self.token.encode())
        return kind in ("Bearer", "Api-Key") and same

    def refusal(self, request: HTTPConnection) -> Response | None:
        """The reply to a client that is not authorized, or is one too many."""
        if is_foreign(request, self.host):
            return refuse("web pages of other servers are not served: send no Origin, or open this "
                          "server's page by its IP address", 403)
        if not self.authorized(request):
            return refuse("send the server's token in a header `Authorization: Bearer ...`", 401)
        if self.clients.locked():
            return refuse(f"there are {MAX_CLIENTS} requests: ask again later", 503)
        return None

    async def page(self, request: Request) -> Response:
        """GET /: machinery/page.html. It holds nothing secret, and asks for the token."""
        page, report = ((PROJECT / "machinery" / f"{name}.html").read_text()
                        for name in ("page", "report"))
        style = report.split("<style>")[1].split("</style>")[0]
        return HTMLResponse(page.replace("{{style of report.html}}", style))

    async def health(self, request: Request) -> Response:
        """GET /health."""
        facts = {"status": "ok"}
        if self.authorized(request):
            facts = self.facts | describe_actions(self.policy)
        error = self.batcher.failure()
        if error is None:
            return JSONResponse(facts)
        reason = {"error": error} if self.authorized(request) else {}
        return JSONResponse({**facts, "status": "failing", **reason}, 503)

    async def act(self, request: Request) -> Response:
        """POST /act."""
        if refused := self.refusal(request):
            return refused
        reading = asyncio.ensure_future(read_body(request))
        self.arriving[reading] = None
        if len(self.arriving) > MAX_CLIENTS:
            next(iter(self.arriving)).cancel()
        try:
            body = await asyncio.wait_for(reading, BODY_SECONDS)
        except (TimeoutError, asyncio.CancelledError, ClientDisconnect):
            return refuse("the request did not arrive in time", 408)
        finally:
            del self.arriving[reading]
        if len(body) > MAX_BODY:
            return refuse(f"more than {MAX_BODY} bytes: send a smaller image, or a JPEG", 413)
        async with self.clients:
            status, reply, query = await self.answer(body, "parse_request", request.client.host)
        if status != 200:
            return JSONResponse({"error": reply}, status)
        action = encode_action(reply, query)
        if "seen" in request.query_params:
            action = {"action": action, "seen": [*map(encode_array, query.pixels)]}
        return JSONResponse(action)

    async def websocket(self, socket: WebSocket) -> None:
        """openpi's protocol: the facts of /health, then actions for each observation. A mistake is
        answered with text and does not end the connection."""
        refused = self.refusal(socket)
        if not refused and len(self.sockets) >= MAX_CLIENTS and not self.close_one():
            refused = refuse(f"there are {MAX_CLIENTS} busy clients: ask again later", 503)
        if refused:
            return await socket.send_denial_response(refused)
        self.sockets[socket] = 0.0
        try:
            await socket.accept()
            await socket.send_bytes(pack(self.facts))
            while (message := await socket.receive())["type"] == "websocket.receive":
                last = self.sockets[socket]
                self.sockets[socket] = math.inf
                if await self.converse(socket, message.get("bytes", message.get("text"))):
                    last = time.monotonic()
                self.sockets[socket] = last
        except (WebSocketDisconnect, KeyError):  # KeyError: see close_one
            pass
        finally:
            self.sockets.pop(socket, None)
            if self.recorder:
                self.recorder.end("{}:{}".format(*socket.client))

    async def converse(self, socket: WebSocket, body: bytes | str) -> bool:
        """Answer one message. Returns whether it got an action."""
        started = time.perf_counter()
        name = "{}:{}".format(*socket.client)
        status, reply, _ = await self.answer(body, "parse_observation", name)
        if status != 200:
            await socket.send_text(reply)
            return False
        chunk = reply.reshape(-1, reply.shape[-1])  # (action_chunk, A) or (1, A)
        timing = {"infer_ms": 1000 * (time.perf_counter() - started)}
        await socket.send_bytes(pack({"actions": chunk, "server_timing": timing}))
        return True

    def close_one(self) -> bool:
        """Close the websocket whose last action is longest ago, if one is idle."""
        idle = min(self.sockets, key=self.sockets.get)
        if self.sockets[idle] == math.inf:
            return False
        del self.sockets[idle]
        self.closing = asyncio.ensure_future(idle.close(1013, "a new client takes its place"))
        return True

    async def answer(
        self, body: bytes | str, parse: str, client: str
    ) -> tuple[int, np.ndarray | str, Query | None]:
        """A request's bytes -> (status, the action or an error message, the request)."""
        started = time.perf_counter()
        query = None
        try:
            query = await self.readers.read(parse, body)
            if query.ignored and query.ignored not in self.ignored:
                self.ignored.add(query.ignored)
                log(f"warning: ignored {', '.join(query.ignored)!a}: the model does not use them")
            reply, size = await asyncio.wrap_future(self.batcher.ask(query))
            if self.recorder:
                self.recorder.add(client, query, reply)
            status = 200
            facts = f"batch {size} unnorm_key {query.unnorm_key} instruction {query.instruction!a}"
        except UserError as error:  # from parsing, or from predict_action about its arguments
            status = 500 if isinstance(error, ModelError) else 400
            reply = str(error)[:2000]
            facts = f"error {reply!a}"
        except Exception:
            traceback.print_exc()
            status = 500
            reply = "the model failed on this request: see the server's log"
            facts = "error 'see above'"
        log(f"act status {status} ms {1000 * (time.perf_counter() - started):.0f} {facts}")
        return status, reply, query


def refuse(message: str, status: int) -> Response:
    """Log an error and reply with it."""
    log(f"act status {status} error {message!a}")
    return JSONResponse({"error": message}, status)


async def read_body(request: Request) -> bytes:
    """A request's body, or its beginning if it is longer than MAX_BODY."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            break
    return bytes(body)


def log(text: str) -> None:
    print(text, flush=True)


# ---- The program -------------------------------------------------------------------------------


def serve(
    policy: Policy, model: str, listener: socket.socket, max_batch: int, token: str | None,
    host: str, record: Path | None
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish open ones."""
    batcher = Batcher(policy, max_batch)
    recorder = Recorder(record, describe(policy, model)) if record else None
    service = Service(batcher, model, token, host, recorder)
    service.readers.start()  # before there are threads
    act_on_black(policy)
    batcher.start()
    # the model waits this long for Python when other threads are busy: for each of its operations
    sys.setswitchinterval(1e-5)
    allow_open_files()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises the signal again after stopping
    listener.listen()  # before the next line invites clients
    keys = sorted(policy.norm_stats)
    cameras = ",".join(policy.cfg.cameras)
    for key in keys:
        robot = policy.convention(key)
        state = f" state {','.join(robot.state)}" if policy.cfg.use_proprio else ""
        log(f"unnorm_key {key} cameras {cameras} action {','.join(robot.action)}{state}")
    host, port, *_ = listener.getsockname()
    log(f"serving http://{host}:{port} model {model} unnorm_keys {','.join(keys)}")
    uvicorn.Server(uvicorn_config(service.app())).run([listener])
    if recorder:
        recorder.close()
    log("stopped")


def record_graphs(policy: Policy, max_batch: int, prefixes: list[int]) -> None:
    """Policy.speed_up for these prefixes, and for batches of a power of two. Raises UserError."""
    prefixes = sorted({0, *prefixes})
    if prefixes[0] < 0 or prefixes[-1] > policy.max_prefix:
        raise UserError(f"--speed_up {prefixes}: a prefix of this model has up to "
                        f"{policy.max_prefix} steps")
    batches = [2**i for i in range(max_batch.bit_length()) if 2**i < max_batch] + [max_batch]
    policy.speed_up(batches, prefixes)
    log(f"recorded batches {batches} prefixes {prefixes} prompt_tokens {PROMPT_LENGTHS}: other "
        "requests are not sped up")


def main() -> None:
    """Command line."""
    args = read_options()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bf16" if device == "cuda" else "fp32")
    with exit_with_one_line():
        if args.speed_up is not None and device == "cpu":
            raise UserError("--speed_up records CUDA graphs: it needs --device cuda")
        token = read_secret(args.token, "--token") if args.token else None
        if token == "":  # which every client would send
            raise UserError(f"--token: {args.token!r} is empty: write a long random text there")
        if args.host not in ("127.0.0.1", "::1", "localhost") and not (token or args.no_token):
            raise UserError(f"--host {args.host} is reachable from other machines: set a token "
                            "with --token FILE or --token VARIABLE, or pass --no_token")
        # fail on a bad address before loading the model for minutes
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        # asyncio sets TCP_NODELAY only if TCP is named; without, each reply is 40 ms late
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((args.host, args.port))
        crop = {"yes": True, "no": False}.get(args.center_crop)
        policy = load_vla(args.checkpoint, device, DTYPES[dtype], args.int8, crop)
        if not policy.norm_stats:
            raise CheckpointError(f"{args.checkpoint}: no dataset statistics, so it cannot act: "
                                  "give a VLA, not a plain VLM")
        max_batch = args.max_batch or (16 if args.speed_up is None else 1)
        if args.speed_up is not None:
            record_graphs(policy, max_batch, args.speed_up)
        serve(policy, args.checkpoint, listener, max_batch, token, args.host, args.record)


if __name__ == "__main__":
    main()
